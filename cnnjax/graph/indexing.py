"""Label rules of indexing by constants, and of slices that are only put back in another order.

Moving channels by a constant is exact whatever the constant: the labels move along, and the label
check of a shrunk program sees where they went. What can't be read off one program is whether the
constant *follows the width*, as ``np.arange(c)[::-1]`` does and ``[3, 1, 0, 2]`` doesn't. Index
arrays of a form that code computes from the width are believed to; channels behind any other
constant stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, Literal

from cnnjax.graph import movement
from cnnjax.graph.ledger import Ledger
from cnnjax.graph.values import Comp, Value


def gather(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """``x[..., indices, :]``: constant indices pick labels; other indices fix the indexed dim."""
    val, idx = vals[0], vals[1]
    dn, sizes = params["dimension_numbers"], params["slice_sizes"]
    shape = tuple(shape)
    rank = len(val.shape)
    indexed = tuple(dn.start_index_map)
    whole = [d for d in range(rank) if sizes[d] == val.shape[d] and d not in indexed]
    collapsed = tuple(dn.collapsed_slice_dims)
    kept = [d for d in range(rank) if d not in collapsed]
    to = dict(zip(kept, dn.offset_dims))
    simple = not getattr(dn, "operand_batching_dims", ()) and len(kept) == len(dn.offset_dims)
    if simple and indexed == collapsed and len(indexed) == 1 and len(whole) == rank - 1:
        (d,) = indexed
        index = _constant(idx, val.shape[d])
        if index is not None:
            (at,) = set(range(len(shape))) - set(to.values())
            picked = _pick(ledger, val, d, index)
            return movement.rename(picked, {**to, d: at}, shape)
    comps, distinct = [], [n > 1 for n in shape]
    for c in val.comps:
        if simple and all(d in whole and d in to for d in c.dims):
            comps.append(Comp(tuple(to[d] for d in c.dims), c.labels, c.zero))
            continue
        ledger.fix(c.labels, "indexed by fixed or computed positions")
    for d, e in to.items():
        if simple and d in whole:
            distinct[e] = val.distinct[d]
    act = val.act or idx.act
    return Value(
        shape,
        tuple(comps),
        tuple(distinct),
        act=act,
        leaves=frozenset() if act else val.leaves,
        src=val.src | idx.src,
        why=val.why or "indexed positions",
    )


def _constant(idx: Value, n: int) -> np.ndarray | None:
    """The indices, if they're known, one-dimensional and in range."""
    if idx.const is None or idx.const.ndim != 2 or idx.const.shape[1] != 1 or not idx.const.size:
        return None
    index = idx.const[:, 0].astype(np.int64)
    return index if index.min() >= 0 and index.max() < n else None


def _pick(ledger: Ledger, val: Value, d: int, index: np.ndarray) -> Value:
    """``val`` indexed on dim ``d``, and what the form of the index asks of the channels there."""
    n = val.shape[d]
    c = val.comp_on(d)
    steps = np.unique(np.diff(index))
    if len(steps) == 1 and steps[0] > 0:
        return movement.slice_dim(ledger, val, d, int(index[0]), int(index[-1]) + 1, int(steps[0]))
    if c is not None and d == c.dims[-1]:  # else whole parts move, as many as there were
        movement.fix_repeated(ledger, c)
        parts = _interleaved(index, n)
        if parts and len(c.dims) == 1:
            ledger.split(c.labels.reshape(parts, -1), "interleaved by an index array", reshape=True)
        elif not _follows(index, n):
            ledger.fix(
                c.labels,
                "indexed by a constant array that may not follow the width",
                policy=True,
            )
    shape = tuple(len(index) if e == d else m for e, m in enumerate(val.shape))
    return movement.take(ledger, val, d, index, shape)


def _follows(index: np.ndarray, n: int) -> bool:
    """Whether code that knows the width n makes this index: reversed, rolled, repeated, tiled."""
    ramp = np.arange(n)
    if len(index) == n:
        if np.array_equal(index, ramp[::-1]):
            return True
        return np.array_equal(index, np.roll(ramp, -int(index[0])))
    m, rest = divmod(len(index), n)
    if rest or m < 2:
        return False
    return np.array_equal(index, np.repeat(ramp, m)) or np.array_equal(index, np.tile(ramp, m))


def _interleaved(index: np.ndarray, n: int) -> int:
    """g if the index is ``arange(n).reshape(g, n // g).T.ravel()`` (a channel shuffle), else 0."""
    if len(index) != n or n < 4 or index[0] != 0:
        return 0
    inner = int(index[1])
    if inner < 2 or n % inner or inner == n:
        return 0
    same = np.array_equal(index, np.arange(n).reshape(n // inner, inner).T.ravel())
    return n // inner if same else 0


def rearranged(jaxpr: Jaxpr) -> frozenset[int]:
    """Slices (by ``id`` of their equations) that are only put back together in another order.

    ``jnp.roll(x, 3, -1)``, or ``a, b = x[..., :k], x[..., k:]`` joined to (b, a): all of x is
    there again, so wherever the cut is, only the order of the channels changes.
    """
    joins = [e for e in jaxpr.eqns if e.primitive.name == "concatenate" and len(e.invars) > 1]
    if not joins:
        return frozenset()
    made = {v: e for e in jaxpr.eqns if e.primitive.name in ("slice", "split") for v in e.outvars}
    if not made:
        return frozenset()
    uses: dict[Any, int] = {}
    for v in [*(v for e in jaxpr.eqns for v in e.invars), *jaxpr.outvars]:
        if not isinstance(v, Literal):
            uses[v] = uses.get(v, 0) + 1
    found: set[int] = set()
    for join in joins:
        d = int(join.params["dimension"])
        pieces: dict[Any, list[tuple[int, int, int]]] = {}  # of each array: start, stop, equation
        for v in join.invars:
            eqn = made.get(v) if not isinstance(v, Literal) else None
            if eqn is None or uses[v] != 1:
                continue
            bounds = _bounds(eqn, v, d)
            if bounds is not None:
                pieces.setdefault(eqn.invars[0], []).append((*bounds, id(eqn)))
        for x, found_here in pieces.items():
            found_here.sort()
            ends = [0, *(stop for _, stop, _ in found_here)]
            starts = [*(start for start, _, _ in found_here), x.aval.shape[d]]
            if starts == ends:
                found.update(i for _, _, i in found_here)
    return frozenset(found)


def _bounds(eqn: Any, v: Any, d: int) -> tuple[int, int] | None:
    """(start, stop) on dim d of a piece that is whole on every other dim."""
    shape = eqn.invars[0].aval.shape
    if eqn.primitive.name == "split":
        if eqn.params["axis"] != d:
            return None
        start = 0
        for out, size in zip(eqn.outvars, map(int, eqn.params["sizes"])):
            if out is v:
                return start, start + size
            start += size
        return None
    p = eqn.params
    strides = p["strides"] or (1,) * len(shape)
    for e, (a, b, s) in enumerate(zip(p["start_indices"], p["limit_indices"], strides)):
        if s != 1 or (e != d and (a, b) != (0, shape[e])):
            return None
    return int(p["start_indices"][d]), int(p["limit_indices"][d])
