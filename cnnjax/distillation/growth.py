"""Which channels of a widened network are copies of which, and where they sit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.errors import did_you_mean
from cnnjax.graph import Graph, GraphError, Group, LabelError, label_check, trace

Key = tuple[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """How one axis grows.

    Attributes:
      source: old position of every new one, (new,) or per conv-group (conv_groups, new).
      copies: copies of the channel at every new position, same shape; 1 outside the group.
      fresh: bool, same shape: whether the position is an added copy.
      consumer: whether the axis is contracted away.
      outputs: for 2-d ``source``: the axis that the conv-groups partition.
    """

    source: np.ndarray
    copies: np.ndarray
    fresh: np.ndarray
    consumer: bool
    outputs: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Widening:
    """What was copied where; `widen_tree` does the same to trees that go with the model.

    Attributes:
      group: name of the widened group.
      mapping: (width,) the paper's g: old channel of every new one; g(j) = j for the first ones
        (within every conv-group, where there are some).
      copies: (width,) the paper's |{k: g(k) = g(j)}| of every new channel.
      moves: by (path, axis).
      shapes: of the variables before.
    """

    group: str
    mapping: np.ndarray
    copies: np.ndarray
    moves: Mapping[Key, Move]
    shapes: Mapping[str, tuple[int, ...]]

    def apply(self, path: str, leaf: Any, order: int = 0) -> Any:
        """The widened form of an array that has the shape of the variable at ``path``.

        Args:
          path: of the variable.
          leaf: the array.
          order: 0 for values (consumers divided by the copies), k for a k-th moment of gradients
            (producers divided by the k-th power of the copies).
        """
        for axis in range(len(self.shapes[path])):
            move = self.moves.get((path, axis))
            if move is not None and move.outputs is None:
                leaf = _grow(leaf, axis, move, order)
        for axis in range(len(self.shapes[path])):
            move = self.moves.get((path, axis))
            if move is not None and move.outputs is not None:
                leaf = _grow_grouped(leaf, axis, move, order)
        return leaf


def _grow(leaf: Any, axis: int, move: Move, order: int) -> Any:
    out = np.take(np.asarray(leaf), move.source, axis=axis)
    return _divide(out, axis, move.copies, order, move.consumer)


def _grow_grouped(leaf: Any, axis: int, move: Move, order: int) -> Any:
    leaf, outs = np.asarray(leaf), move.outputs
    assert outs is not None
    row = np.arange(leaf.shape[outs]) // (leaf.shape[outs] // len(move.source))
    source, copies = move.source[row], move.copies[row]
    if axis < outs:
        source, copies = source.T, copies.T
    shape = [1] * leaf.ndim
    shape[axis], shape[outs] = move.source.shape[1], leaf.shape[outs]
    out = np.take_along_axis(leaf, source.reshape(shape), axis=axis)
    power = 1 if order == 0 else 0
    return (out / copies.reshape(shape).astype(np.float64) ** power).astype(leaf.dtype)


def _divide(out: np.ndarray, axis: int, copies: np.ndarray, order: int, consumer: bool) -> Any:
    power = (1 if consumer else 0) if order == 0 else (0 if consumer else order)
    if not power or not jnp.issubdtype(out.dtype, jnp.floating):
        return out
    shape = [1] * out.ndim
    shape[axis] = -1
    scaled = out.astype(np.float64) / copies.reshape(shape).astype(np.float64) ** power
    return scaled.astype(out.dtype)


def _group(graph: Graph, path: str) -> Group:
    named = next((g for g in graph.groups if g.name == path), None)
    if named is not None:
        return named
    if path in graph.shapes:
        return graph.group_of(path)
    kernel = next((x.kernel for x in graph.layers if x.path == path and x.kernel), None)
    if kernel is None:
        options = [*graph.shapes, *(x.path for x in graph.layers), *(g.name for g in graph.groups)]
        raise KeyError(f"no group, layer or variable {path!r}.{did_you_mean(path, options)}")
    return graph.group_of(kernel)


def plan_widening(
    taken: surgery.Parts,
    model: nnx.Module,
    graph: Graph,
    path: str,
    width: int,
    rng: np.random.Generator,
) -> Widening:
    """The widening of one group, proved by the label check; see `cnnjax.distillation.widen`."""
    try:
        group = _group(graph, path)
    except ValueError as error:
        reason = str(error).replace("can't be pruned", "is fixed")
        raise ValueError(f"{path!r} can't be widened exactly: {reason}") from error
    n = group.size
    if width < n:
        raise ValueError(f"{group.name!r} has {n} channels already; widen to at least as many")
    if group.statistic:
        where = f" at {group.statistic_source}" if group.statistic_source else ""
        raise ValueError(
            f"{group.name!r} can't be widened exactly: {group.statistic}{where}; copies of "
            "channels change a statistic over channels"
        )
    shapes = {p: tuple(leaf.shape) for p, leaf in taken.leaves.items()}
    if shapes != dict(graph.shapes):
        raise ValueError("the graph was traced from another model; trace this one")
    if width == n:
        same = np.arange(n)
        return Widening(group.name, same, np.ones(n, np.int64), {}, shapes)
    blank = surgery.rebuild(taken, _shapes(graph, group, width), why="widen", abstract=True)
    try:
        wide = trace(blank, *graph.inputs, mode=graph.mode)
        roots, order = _roots(graph, group, wide, width, rng)
        alive = wide.alive()
        alive[[a for a, root in roots.items() if a != root]] = False
        index = label_check(model, wide, alive)
    except (GraphError, LabelError) as error:
        raise ValueError(f"{group.name!r} can't be widened: {error}") from error
    moves = {}
    for p, d in group.members:
        moves[p, d] = _move(wide, (p, d), roots, np.asarray(index[p, d]))
    at = {a: i for i, a in enumerate(a for a in order if roots[a] == a)}
    mapping = np.array([at[roots[a]] for a in order])
    copies = np.bincount(mapping, minlength=n)[mapping]
    return Widening(group.name, mapping, copies, moves, shapes)


def _shapes(graph: Graph, group: Group, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    n = group.size
    out = {}
    for path, shape in graph.shapes.items():
        new = list(shape)
        for d in range(len(shape)):
            axis = graph.axes[path, d]
            labels = axis.labels if axis.table is None else axis.table
            inside = np.isin(labels, group.atoms).reshape(-1, labels.shape[-1]).sum(axis=1)
            if (inside != inside[0]).any() or (inside[0] * width) % n:
                raise ValueError(
                    f"{group.name!r} can't be widened from {n} to {width}: {path} axis {d} holds "
                    f"{sorted(set(inside.tolist()))} of its channels in each of {len(inside)} "
                    "convolution groups; choose a width that divides evenly among them"
                )
            new[d] += int(inside[0]) * width // n - int(inside[0])
        if tuple(new) != shape:
            out[path] = jax.ShapeDtypeStruct(tuple(new), graph.dtypes[path])
    return out


def _cells(group: Group) -> dict[int, tuple[tuple[int, int], ...]]:
    """For every channel the parts (of splits and conv-groups) that it sits in."""
    cells: dict[int, list[tuple[int, int]]] = {int(a): [] for a in group.atoms}
    for i, c in enumerate(group.constraints):
        for j, part in enumerate((*c.parts, *c.paired)):
            for a in np.unique(part):
                if int(a) in cells:
                    cells[int(a)].append((i, j))
    return {a: tuple(sorted(set(cell))) for a, cell in cells.items()}


def _roots(
    graph: Graph, group: Group, wide: Graph, width: int, rng: np.random.Generator
) -> tuple[dict[int, int], list[int]]:
    """``{atom of the wide group: the atom that it copies}`` (itself for old ones), and the order
    of the atoms on the group's first axis. Copies stay within their part of a split axis."""
    found = [g for g in wide.groups if g.members == group.members]
    if len(found) != 1 or found[0].size != width:
        raise ValueError(
            f"{group.name!r} can't be widened to {width}: the program treats the new channels "
            "differently (a number of channels written into it?)"
        )
    (grown,) = found
    narrow, cells = _cells(group), _cells(grown)
    want: dict[Any, int] = {}
    for cell in narrow.values():
        want[cell] = want.get(cell, 0) + 1
    key = grown.producers[0] if grown.producers else grown.members[0]
    labels = wide.axes[key].labels if wide.axes[key].table is None else wide.axes[key].table
    assert labels is not None
    flat = labels.ravel()
    mine = flat[np.isin(flat, grown.atoms)]
    _, first = np.unique(mine, return_index=True)
    order = [int(mine[i]) for i in np.sort(first)]
    by_cell: dict[Any, list[int]] = {}
    for a in order:
        by_cell.setdefault(cells[a], []).append(a)
    if set(by_cell) != set(want) or any(len(by_cell[c]) < want[c] for c in want):
        raise ValueError(
            f"{group.name!r} can't be widened to {width}: splits and convolution groups would cut "
            "its channels differently; choose a multiple of the present width"
        )
    roots = {}
    for cell, atoms in by_cell.items():
        old = atoms[: want[cell]]
        drawn = rng.integers(0, len(old), len(atoms) - len(old))
        roots |= dict(zip(atoms, [*old, *(old[i] for i in drawn)]))
    return roots, order


def _move(wide: Graph, key: Key, roots: dict[int, int], index: np.ndarray) -> Move:
    axis = wide.axes[key]
    counts = np.bincount(list(roots.values()))
    if axis.table is None:
        source, copies, fresh = _row(axis.labels, roots, index, counts, key)
        return Move(source, copies, fresh, axis.consumer)
    rows = [
        _row(row, roots, index if index.ndim == 1 else index[i], counts, key)
        for i, row in enumerate(axis.table)
    ]
    source, copies, fresh = (np.stack(part) for part in zip(*rows))
    outputs = axis.table_axis
    return Move(
        source, copies, fresh, True, len(wide.shapes[key[0]]) - 1 if outputs is None else outputs
    )


def _row(
    labels: np.ndarray, roots: dict[int, int], index: np.ndarray, counts: np.ndarray, key: Key
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Old positions, copies and whether added, for every position of a wide axis."""
    source = np.full(len(labels), -1, np.int64)
    source[index] = np.arange(len(index))
    copies, fresh = np.ones(len(labels), np.int64), source < 0
    at: dict[int, np.ndarray] = {}
    inside = np.flatnonzero(np.isin(labels, list(roots)))
    by_atom = inside[np.argsort(labels[inside], kind="stable")]
    atoms, starts = np.unique(labels[by_atom], return_index=True)
    for a, places in zip(atoms.tolist(), np.split(by_atom, starts[1:])):
        at[a] = places
        copies[places] = counts[roots[a]]
    for a, places in at.items():
        root = at.get(roots[a])
        if root is None or len(root) != len(places):
            raise ValueError(f"{key[0]} axis {key[1]}: a channel and its copy lie in other parts")
        if roots[a] != a:
            source[places] = source[root]  # the k-th occurrence copies the k-th
    return source, copies, fresh
