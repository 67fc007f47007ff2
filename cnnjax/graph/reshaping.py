"""Label rule of reshapes: dims are merged, or split under joint labels that are decided later."""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnjax.graph.ledger import Ledger
from cnnjax.graph.movement import fix_repeated, transpose
from cnnjax.graph.values import Comp, Value, minimise, opaque


def segments(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Minimal pairs of runs of dims with the same number of elements."""
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        left, right, m, n = [i], [j], a[i], b[j]
        i, j = i + 1, j + 1
        while m != n:
            if m < n:
                left.append(i)
                m, i = m * a[i], i + 1
            else:
                right.append(j)
                n, j = n * b[j], j + 1
        out.append((left, right))
    if out:
        out[-1][0].extend(range(i, len(a)))
        out[-1][1].extend(range(j, len(b)))
    return out


def reshape(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """Merges dims, splits dims (joint labels, to be decided later), or both."""
    val = vals[0]
    shape = tuple(shape)
    if params.get("dimensions") is not None:
        val = transpose(
            ledger,
            {"permutation": params["dimensions"]},
            [val],
            tuple(val.shape[d] for d in params["dimensions"]),
        )
    if 0 in shape or not val.shape or not shape:
        ledger.fix_all(val, "reshaped to nothing")
        return opaque(shape, val.why, **_origin(val))
    parts = segments(val.shape, shape)
    distinct = [False] * len(shape)
    for left, right in parts:
        if any(val.distinct[d] for d in left):
            for e in right:
                distinct[e] = shape[e] > 1
    hints = ledger.hint((len(val.shape), len(shape)))
    comps: list[Comp] = []
    for c in val.comps:
        new = _reshape_comp(ledger, c, val, shape, parts, hints.get(c.dims, ()))
        comps.append(new)
    ledger.note((len(val.shape), len(shape)), {c.dims: n.dims for c, n in zip(val.comps, comps)})
    out = val.like(shape=shape, comps=(), distinct=tuple(distinct))
    out.comps = tuple(_disjoint(ledger, comps))
    return out


def _origin(val: Value) -> dict[str, Any]:
    return {"act": val.act, "leaves": val.leaves, "src": val.src}


def _disjoint(ledger: Ledger, comps: list[Comp]) -> list[Comp]:
    """At most one component per dim: two that share a dim after a merge are both fixed."""
    out: list[Comp] = []
    for c in comps:
        clash = [o for o in out if set(o.dims) & set(c.dims)]
        if clash:
            for o in (*clash, c):
                ledger.fix(o.labels, "merged with another prunable dim by a reshape")
            continue
        out.append(c)
    return out


def _reshape_comp(
    ledger: Ledger,
    c: Comp,
    val: Value,
    shape: tuple[int, ...],
    parts: list[Any],
    wanted: tuple[int, ...],
) -> Comp:
    if len(wanted) == len(c.dims) and all(shape[e] == val.shape[d] for d, e in zip(c.dims, wanted)):
        return Comp(wanted, c.labels, c.zero)
    touched = [(left, right) for left, right in parts if set(left) & set(c.dims)]
    # a joint component one of whose dims melts into other distinct dims: that dim stays
    if len(c.dims) > 1:
        for left, _ in touched:
            mine = [d for d in left if d in c.dims]
            alien = [d for d in left if d not in c.dims and val.distinct[d] and val.shape[d] > 1]
            if alien and len(mine) < len(c.dims):
                tied = ledger.tie_dims(c, tuple(mine), "channels folded into space")
                assert tied is not None
                return _reshape_comp(ledger, tied, val, shape, parts, wanted)
    if all(
        len([d for d in left if d in c.dims]) == len(left) == 1 and len(right) == 1
        for left, right in touched
    ):
        return Comp(tuple(right[0] for _, right in touched), c.labels, c.zero)
    before = [d for left, _ in touched for d in left]
    after = [e for _, right in touched for e in right]
    index = tuple(slice(None) if d in c.dims else None for d in before)
    full = np.broadcast_to(c.labels[index], [val.shape[d] for d in before])
    full = full.reshape([shape[e] for e in after])
    new = minimise(tuple(after), full, c.zero, wanted)
    for left, right in touched:
        cut = [e for e in new.dims if e in right]
        if len(cut) > 1 and len(cut) > len([d for d in left if d in c.dims]):
            order = [k for k, e in enumerate(new.dims) if e not in cut]
            order += [k for k, e in enumerate(new.dims) if e in cut]
            rows = new.labels.transpose(order).reshape(-1, new.labels.shape[order[-1]])
            fix_repeated(ledger, c)
            ledger.split(rows, f"split into {tuple(shape[e] for e in cut)}", reshape=True)
    return new
