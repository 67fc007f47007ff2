"""Shrinking: apply a decision to a model, or to any tree that goes with it, and prove the result.

Two proofs. The *label check* traces the shrunk program and demands that the same channels meet as
in the original; it also says in which order the program needs them (a channel shuffle interleaves
by rank among the survivors). The *numeric check* runs the shrunk network and the gated original,
where the removed channels are multiplied by zero, on random numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.graph import Graph, label_check
from cnnjax.graph.direct import no_collection
from cnnjax.graph.tracing import program_of as unrolled
from cnnjax.pruning.keep import Keep, check_keep
from cnnjax.pruning.proof import program_of, prove_equal
from cnnjax.tree import flatten, map_with_path

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """How a decision cuts each variable, after the label check.

    Attributes:
      index: ``{path: {axis: positions}}`` of the axes that change, in the order that the shrunk
        program needs; a 2-d array gives the positions for each conv-group.
      outputs: for a variable with such an array: the axis that the conv-groups partition.
      blank: the shrunk model (of a function: its parameters) with abstract leaves, as the label
        check proved it.
    """

    index: Mapping[str, Mapping[int, np.ndarray]]
    outputs: Mapping[str, int]
    blank: Any
    taken: surgery.Parts | None = None  # the shrunk model, taken apart

    def __call__(self, path: str, leaf: Any) -> Any:
        """The cut of one array of a variable's shape; works on abstract and traced arrays."""
        axes = self.index.get(path)
        if not axes:
            return leaf
        tables = {d: rows for d, rows in axes.items() if rows.ndim == 2}
        if not tables:
            return surgery.take(leaf, axes)
        ((d, rows),) = tables.items()
        return _take_grouped(leaf, axes, d, rows, self.outputs[path])


def _take_grouped(
    leaf: Any, axes: Mapping[int, np.ndarray], d: int, rows: np.ndarray, outs: int
) -> Any:
    plain = {e: i for e, i in axes.items() if e != d}
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return surgery.take(leaf, {**plain, d: rows[0]})
    leaf = surgery.take(leaf, plain)
    # position (i, o) of the new kernel is (rows[group of o, i], o) of the old one
    group = np.arange(leaf.shape[outs]) // (leaf.shape[outs] // len(rows))
    index = rows[group].T if d < outs else rows[group]
    shape = [1] * len(leaf.shape)
    shape[d], shape[outs] = rows.shape[1], leaf.shape[outs]
    where = index.reshape(shape)
    if isinstance(leaf, jax.Array):
        return jax.numpy.take_along_axis(leaf, jax.numpy.asarray(where), axis=d)
    return np.take_along_axis(leaf, where, axis=d)


def cut(
    model: nnx.Module | surgery.Parts | Callable[..., Any],
    graph: Graph,
    keep: Keep | np.ndarray,
    *,
    params: PyTree | None = None,
) -> Cut:
    """The cut of a decision, proved by the label check.

    Args:
      model: the original; its leaves may be abstract. Or a function ``fn(params, *inputs)`` whose
        code follows the shapes of its parameters.
      graph: of the model.
      keep: the decision.
      params: the parameters of a function.

    Returns:
      The `Cut`, for several trees at once: ``shrink_tree(opt_state, graph, keep, cut=...)``.

    Raises:
      ValueError: if the decision can't be applied, or a layer type is unknown to surgery.
      cnnjax.graph.LabelError: if the shrunk program would join other channels.
    """
    alive = _alive(keep)
    check_keep(graph, alive)
    if isinstance(model, nnx.Module):
        model = surgery.parts(model)
    leaves = model.leaves if isinstance(model, surgery.Parts) else flatten(params)
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if found != dict(graph.shapes):
        wrong = [p for p in {**found, **graph.shapes} if found.get(p) != graph.shapes.get(p)]
        raise ValueError(
            f"the graph was traced from another model: {wrong[0]!r} has shape "
            f"{found.get(wrong[0])} here and {graph.shapes.get(wrong[0])} in the graph"
        )
    shapes = cut_shapes(graph, alive)
    if not isinstance(model, surgery.Parts):
        blank = map_with_path(
            lambda p, x: shapes.get(p, jax.ShapeDtypeStruct(x.shape, x.dtype)), params
        )
        return Cut(*cut_index(graph, label_check(model, graph, alive, params=blank)), blank)
    blank = surgery.rebuild(
        model, shapes, static=_static(model, graph, alive), why="shrink", abstract=True
    )
    apart = surgery.parts(blank)
    order = label_check(unrolled(apart.skeleton or blank), graph, alive)
    return Cut(*cut_index(graph, order), blank, apart)


def cut_shapes(graph: Graph, alive: np.ndarray) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the variables that a decision makes smaller."""
    kept, at, shapes = graph.layout.kept(alive).tolist(), 0, {}
    for path, shape in graph.shapes.items():
        new = tuple(kept[at : at + len(shape)])
        at += len(shape)
        if new != shape:
            shapes[path] = jax.ShapeDtypeStruct(new, graph.dtypes[path])
    return shapes


def cut_index(
    graph: Graph, order: Mapping[tuple[str, int], np.ndarray]
) -> tuple[dict[str, dict[int, np.ndarray]], dict[str, int]]:
    """The axes that change, from what the label check gives; see `Cut`."""
    index: dict[str, dict[int, np.ndarray]] = {}
    outputs: dict[str, int] = {}
    for path, shape in graph.shapes.items():
        for d, n in enumerate(shape):
            positions = order[path, d]
            if positions.ndim == 1 and len(positions) == n and _in_order(positions):
                continue
            if positions.ndim == 2 and (positions == positions[0]).all():
                positions = positions[0]
            if positions.ndim == 2:
                on = graph.axes[path, d].table_axis
                outputs[path] = len(shape) - 1 if on is None else on
            elif len(positions) == n and _in_order(positions):
                continue
            index.setdefault(path, {})[d] = positions
    return index, outputs


def _in_order(positions: np.ndarray) -> bool:
    """Whether these are all positions of an axis, as they are."""
    return bool((positions[1:] > positions[:-1]).all())


def _alive(keep: Keep | np.ndarray) -> np.ndarray:
    return np.asarray(keep.alive if isinstance(keep, Keep) else keep, bool)


def _static(taken: surgery.Parts, graph: Graph, alive: np.ndarray) -> dict[str, dict[str, Any]]:
    """The counts of conv-groups and of normalization groups that are left."""
    out: dict[str, dict[str, Any]] = {}
    modules = taken.modules()
    for c in graph.constraints:
        owner = modules.get(c.path or "")
        if c.kind == "grouped" and hasattr(owner, "feature_group_count"):
            left = int((c.counts(alive)[0] > 0).sum())
            if left != len(c.parts):
                out[str(c.path)] = {"feature_group_count": left}
    for path, module in modules.items():
        prefix = f"{path}/" if path else ""
        if not isinstance(module, nnx.GroupNorm):
            continue
        leaf = next((n for n in ("scale", "bias") if f"{prefix}{n}" in graph.shapes), None)
        if leaf is not None:
            kept = graph.axes[f"{prefix}{leaf}", 0].kept(alive)
            out[path] = {"num_groups": len(np.unique(kept // module.group_size))}
    return out


def _cut_all(how: Cut, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The cut of every leaf; arrays cut on the host go back together, which is faster."""
    out, host = dict(leaves), {}
    for path in how.index:
        leaf = leaves[path]
        if (
            isinstance(leaf, jax.Array)
            and not isinstance(leaf, jax.core.Tracer)
            and leaf.is_fully_addressable
            and leaf.sharding.is_fully_replicated
        ):
            host[path] = how(path, np.asarray(leaf))
        else:
            out[path] = how(path, leaf)
    where = [leaves[path].sharding for path in host]
    return {**out, **dict(zip(host, jax.device_put(list(host.values()), where)))}


def shrink(
    model: nnx.Module,
    graph: Graph,
    keep: Keep | np.ndarray,
    *,
    check: bool | None = None,
    inputs: tuple[Any, ...] | None = None,
    seed: int = 0,
) -> Any:
    """A new, smaller model without the channels that the decision removes.

    Args:
      model: the NNX module that ``graph`` was traced from; untouched. Abstract leaves give an
        abstract result.
      graph: from `cnnjax.graph.trace`.
      keep: from `select_channels`.
      check: whether to run the numeric check "shrunk equals gated" to 1e-5 relative; the label
        check always runs. None (the default) runs it unless a statistic over channels is involved
        (then removing a channel changes what the others compute, and gating doesn't), or leaves
        are abstract. True where it doesn't apply is an error; False skips it.
      inputs: example inputs (arrays or shapes) for the numeric check, e.g. smaller images; those of
        ``graph`` by default.
      seed: of the random numbers of the numeric check.

    Returns:
      The shrunk module, of the same class, with an edit ``"rebuild"`` on its record.

    Raises:
      ValueError: if the decision can't be applied; if a layer type is unknown to surgery; if
        ``check=True`` doesn't apply.
      cnnjax.graph.LabelError: if the shrunk program would join other channels.
      ProofError: if the numbers differ.
    """
    alive = _alive(keep)
    with no_collection():
        taken = surgery.parts(model)
        how = cut(taken, graph, alive)
        old = taken.leaves
        assert how.taken is not None
        small = how.taken.build(_cut_all(how, old))
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in old.values())
    statistic = next((g for g in graph.groups if g.statistic and not alive[g.atoms].all()), None)
    if check and abstract:
        raise ValueError("check=True needs a model with numbers; its leaves are abstract")
    if check and statistic is not None:
        raise ValueError(
            f"check=True can't hold: the channels of {statistic.name!r} are under a statistic "
            f"({statistic.statistic}), which changes when channels go"
        )
    if check is not False and not abstract and statistic is None and not alive.all():
        prove_equal(
            program_of(model), program_of(small), old, graph, alive, how, inputs=inputs, seed=seed
        )
    return small


def shrink_tree(
    tree: PyTree,
    graph: Graph,
    keep: Keep | np.ndarray,
    *,
    model: nnx.Module | None = None,
    cut: Cut | None = None,
) -> PyTree:
    """Cuts every array of a tree that belongs to a variable: optimizer state, averages, masks.

    A leaf belongs to the variable whose path its own path ends with: ``"0/mu/conv1/kernel"`` to
    ``"conv1/kernel"``. Other leaves (counts, learning rates) stay as they are.

    Args:
      tree: any tree with the model's paths somewhere inside.
      graph: of the model.
      keep: the decision.
      model: the original model (abstract is enough); or
      cut: what `cut` gave, to cut several trees.

    Raises:
      ValueError: if neither or both of ``model`` and ``cut`` are given; if no leaf belongs to a
        variable; if one does but has another shape (a factored second moment, for example).
    """
    if (model is None) == (cut is None):
        raise ValueError("give the original model= or a cut=")
    how = _cut(model, graph, keep) if model is not None else cut
    assert how is not None
    met = 0

    def one(path: str, leaf: Any) -> Any:
        nonlocal met
        if not hasattr(leaf, "shape"):
            return leaf
        owner = _owner(path, graph.shapes)
        if owner is None:
            return leaf
        if tuple(leaf.shape) != graph.shapes[owner]:
            if not owner.count("/") or leaf.shape == ():
                return leaf
            raise ValueError(
                f"{path} has shape {tuple(leaf.shape)}, its variable {owner!r} has "
                f"{graph.shapes[owner]}; it can't be cut like it. Make this part of the tree anew"
            )
        met += 1
        return how(owner, leaf)

    out = map_with_path(one, tree)
    if not met:
        raise ValueError(
            f"no leaf of the tree belongs to a variable of the model; it has {_some(flatten(tree))}"
            f", the model {_some(graph.shapes)}"
        )
    return out


_cut = cut  # `shrink_tree` has an argument of this name


def _owner(path: str, shapes: Mapping[str, Any]) -> str | None:
    parts = path.split("/")
    for i in range(len(parts)):
        if (tail := "/".join(parts[i:])) in shapes:
            return tail
    return None


def _some(paths: Mapping[str, Any]) -> str:
    return ", ".join(repr(p) for p in list(paths)[:3]) or "none"
