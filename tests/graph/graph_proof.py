"""An independent shrink for tests: kept positions, a rebuilt module, and the gated original."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.graph import Graph, label_check
from cnnjax.tree import flatten


def decide(graph: Graph, ratio: float, seed: int, *, statistics: bool = False) -> np.ndarray:
    """A random decision that satisfies every constraint: cells of atoms that sit in the same part
    of every constraint keep equal numbers; what still breaks a constraint is put back.
    """
    rng = np.random.default_rng(seed)
    alive = graph.alive()
    parts = [p for c in graph.constraints for ps in (c.parts, c.paired) for p in ps]
    member = np.zeros((graph.num_atoms, len(parts)), bool)
    for k, p in enumerate(parts):
        member[p[p >= 0], k] = True
    smallest = {}
    for g in graph.groups:
        if g.statistic and not statistics:
            continue
        cells: dict[bytes, list[int]] = {}
        for a in g.atoms.tolist():
            cells.setdefault(member[a].tobytes(), []).append(a)
        smallest[g.index] = (min(len(c) for c in cells.values()), cells)
    least = min((n for g, (n, _) in smallest.items() if graph.groups[g].constraints), default=1)
    for index, (size, cells) in smallest.items():
        free = not graph.groups[index].constraints
        for cell in cells.values():
            n = len(cell) if free else size
            keep = max(1, n - round(ratio * n))
            if not free and len(cells) > 1:
                keep = max(1, least - round(ratio * least)) if rng.random() < 0.5 else keep
            alive[rng.permutation(cell)[keep:]] = False
    for _ in range(1000):
        broken = [c for c in graph.constraints if not c.holds(alive)]
        if not broken:
            return alive
        for c in broken:
            for ps in (c.parts, c.paired):
                counts = [int(np.append(alive, True)[p].sum()) for p in ps]
                for p, n in zip(ps, counts):
                    gone = p[(p >= 0) & ~alive[p]]
                    if n < max(counts) and len(gone):
                        alive[rng.choice(gone)] = True
    for c in graph.constraints:
        if not c.holds(alive):
            alive[c.atoms] = True
    return graph.alive() if any(not c.holds(alive) for c in graph.constraints) else alive


def sliced(a: Any, index: dict[int, np.ndarray], graph: Graph, path: str) -> Any:
    """A leaf cut to ``index`` per axis; a 2-D index is per conv-group."""
    out = np.asarray(a)
    for axis, rows in index.items():
        if rows.ndim == 1:
            continue
        outs = graph.axes[path, axis].table_axis
        assert outs is not None
        per = graph.shapes[path][outs] // len(graph.axes[path, axis].table)
        chosen = index[outs]
        each = len(chosen) // len(rows)
        pieces = []
        for q, row in enumerate(rows):
            mine = chosen[q * each : (q + 1) * each]
            assert len(set((mine // per).tolist())) <= 1
            pieces.append(np.take(np.take(out, mine, outs), row, axis))
        out = np.concatenate(pieces, outs)
        index = {**index, outs: np.arange(out.shape[outs])}
    for axis, rows in index.items():
        if rows.ndim == 1:
            out = np.take(out, rows, axis)
    return out


def statics_of(model: nnx.Module, graph: Graph, alive: np.ndarray) -> dict[str, dict[str, int]]:
    """Group counts that change because whole groups went."""
    out: dict[str, dict[str, int]] = {}
    for path, module in surgery.modules(model).items():
        if isinstance(module, nnx.GroupNorm):
            kept = graph.axes[f"{path}/scale", 0].kept(alive)
            out[path] = {"num_groups": len(set((kept // module.group_size).tolist()))}
    for c in graph.constraints:
        if c.kind == "grouped" and c.path is not None:
            counts, _ = c.counts(alive)
            if (counts == 0).any():
                out[c.path] = {"feature_group_count": int((counts > 0).sum())}
    return out


def shrink(model: nnx.Module, graph: Graph, alive: np.ndarray) -> nnx.Module:
    """The module cut to ``alive``, its order from the label check."""
    statics = statics_of(model, graph, alive)
    shapes = {}
    for path, shape in graph.shapes.items():
        new = [graph.axes[path, d].kept(alive).shape[-1] for d in range(len(shape))]
        if tuple(new) != tuple(shape):
            dtype = graph.dtypes[path]
            shapes[path] = jax.ShapeDtypeStruct(tuple(new), dtype)
    blank = surgery.rebuild(surgery.abstract(model), shapes, static=statics)
    index = label_check(blank, graph, alive)
    old = flatten(nnx.state(model))
    leaves = {}
    for path, shape in graph.shapes.items():
        mine = {d: index[path, d] for d in range(len(shape))}
        whole = all(np.array_equal(i, np.arange(n)) for i, n in zip(mine.values(), shape))
        if not whole:
            leaves[path] = jnp.asarray(sliced(old[path], mine, graph, path))
    return surgery.rebuild(model, leaves, static=statics)


def gate(graph: Graph, alive: np.ndarray, path: str, leaf: Any) -> Any:
    """A leaf with zeros wherever a position was removed."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    out = np.array(leaf)
    for d, n in enumerate(out.shape):
        axis = graph.axes[path, d]
        mask = axis.alive(alive)
        if axis.table is not None:
            # (groups, I) -> (O, I)
            assert axis.table_axis is not None
            mask = np.repeat(mask, out.shape[axis.table_axis] // len(mask), axis=0)
            shape = [1] * out.ndim
            shape[axis.table_axis], shape[d] = mask.shape
            mask = mask.T if d < axis.table_axis else mask
            out = out * mask.reshape(shape)
        else:
            out = out * mask.reshape([n if e == d else 1 for e in range(out.ndim)])
    return jnp.asarray(out, leaf.dtype)


def gated(model: nnx.Module, graph: Graph, alive: np.ndarray) -> nnx.Module:
    """The original with zeros wherever a variable's position was removed."""
    return surgery.map_leaves(model, lambda path, leaf: gate(graph, alive, path, leaf))


def gate_tree(params: dict[str, Any], graph: Graph, alive: np.ndarray) -> dict[str, Any]:
    """`gated` of a flat dict of arrays."""
    return {path: gate(graph, alive, path, leaf) for path, leaf in params.items()}


def shrink_tree(
    fn: Any, params: dict[str, Any], graph: Graph, alive: np.ndarray
) -> dict[str, np.ndarray]:
    """`shrink` of the variables (a flat dict) of a function whose shapes follow from them."""
    blank = {}
    for path, shape in graph.shapes.items():
        new = [graph.axes[path, d].kept(alive).shape[-1] for d in range(len(shape))]
        blank[path] = jax.ShapeDtypeStruct(tuple(new), graph.dtypes[path])
    index = label_check(fn, graph, alive, params=blank)
    return {
        path: sliced(a, {d: index[path, d] for d in range(a.ndim)}, graph, path)
        for path, a in params.items()
    }


def outputs(model: nnx.Module, inputs: tuple[Any, ...]) -> list[np.ndarray]:
    """All outputs of a module in evaluation mode."""
    view = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
    graphdef, state = nnx.split(view)
    return [np.asarray(a) for a in jax.tree.leaves(_run(graphdef, state, inputs))]


def _run(graphdef: Any, state: Any, inputs: Any) -> Any:
    return jax.jit(lambda s, i: nnx.merge(graphdef, s)(*i))(state, inputs)


def assert_equal(small: list[np.ndarray], big: list[np.ndarray]) -> None:
    """Equal to 1e-5 of the largest value."""
    assert len(small) == len(big)
    for a, b in zip(small, big):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max())))
