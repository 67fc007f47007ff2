"""Label rules of reductions and windows."""

from __future__ import annotations

import math
from typing import Any

from cnnjax.graph.ledger import Event, Ledger
from cnnjax.graph.values import Comp, Value, common

REDUCTIONS = frozenset(
    [
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "reduce_xor",
    ]
)


def reduction(ledger: Ledger, name: str, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """Reductions: over channels they are statistics, over a dim of a split they tie it."""
    val, axes = vals[0], tuple(params["axes"])
    comps, sums = [], list(val.sums)
    for c in val.comps:
        gone = tuple(d for d in c.dims if d in axes)
        if len(gone) == len(c.dims):
            if not (name == "reduce_sum" and c.zero):
                ledger.statistic(c.labels, f"{name} over channels")
            ledger.pools.append(Event(c.labels.reshape(-1), f"{name} over channels", ledger.info))
            sums.append((math.prod(val.shape[d] for d in axes), c.labels.reshape(-1)))
            continue
        if gone:
            tied = ledger.tie_dims(c, gone, name)
            assert tied is not None
            c = tied
        comps.append(
            c if name == "reduce_sum" else c._replace(zero=c.zero and name != "reduce_and")
        )
    new = {d: k for k, d in enumerate(d for d in range(len(val.shape)) if d not in axes)}
    comps = tuple(Comp(tuple(new[d] for d in c.dims), c.labels, c.zero) for c in comps)
    distinct = tuple(val.distinct[d] for d in new)
    out = Value(tuple(shape), comps, distinct, **common(vals))
    out.sums, out.normal = tuple(sums[-8:]), False
    return out


def windowed(ledger: Ledger, name: str, dims: tuple[int, ...], vals: list[Value], shape) -> Value:
    """Windows, sorts and cumulative operations over ``dims``; the other dims go through."""
    val, shape = vals[0], tuple(shape)
    comps, distinct = [], [n > 1 and x for n, x in zip(shape, val.distinct)]
    for d in dims:
        distinct[d] = shape[d] > 1
    for c in val.comps:
        if set(c.dims) & set(dims):
            ledger.fix(c.labels, f"{name} over channels")
        else:
            comps.append(c)
    return Value(shape, tuple(comps), tuple(distinct), **common(vals))
