"""Label rules of operations that move elements: the same operation on the label arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cnnjax.graph.ledger import STAY, Ledger
from cnnjax.graph.values import Comp, Value, common

MAX_PARTS = 8  # chunks of a dim that a slice is believed to follow


def rename(val: Value, new: dict[int, int], shape: tuple[int, ...]) -> Value:
    """Moves dims: ``new[d]`` is where dim d went (absent if it's gone)."""
    comps = []
    for c in val.comps:
        kept = [k for k, d in enumerate(c.dims) if d in new]
        if not kept:
            continue
        labels = c.labels
        if len(kept) < len(c.dims):
            labels = labels[tuple(slice(None) if k in kept else 0 for k in range(len(c.dims)))]
        dims = [new[c.dims[k]] for k in kept]
        order = np.argsort(dims)
        comps.append(Comp(tuple(dims[k] for k in order), labels.transpose(order), c.zero))
    distinct = [False] * len(shape)
    for d, e in new.items():
        distinct[e] = val.distinct[d] and shape[e] > 1
    return val.like(shape=tuple(shape), comps=tuple(comps), distinct=tuple(distinct))


def transpose(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """Permutes dims."""
    return rename(vals[0], {d: i for i, d in enumerate(params["permutation"])}, shape)


def broadcast_in_dim(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """New dims, and dims of length 1 that get longer, are uniform."""
    val = vals[0]
    to = params["broadcast_dimensions"]
    comps = []
    for c in val.comps:
        wide = [d for d in c.dims if val.shape[d] != shape[to[d]]]
        if wide:
            ledger.fix(c.labels, "broadcast to more channels")
            c = ledger.tie_dims(c, tuple(wide), "broadcast")
        if c is not None and not set(c.dims) & set(wide):
            comps.append(c)
    return rename(val.like(comps=tuple(comps)), dict(enumerate(to)), shape)


def squeeze(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """Removes dims of length 1."""
    gone = {d % len(vals[0].shape) for d in params["dimensions"]}
    kept = [d for d in range(len(vals[0].shape)) if d not in gone]
    return rename(vals[0], {d: i for i, d in enumerate(kept)}, shape)


def expand_dims(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """Inserts dims of length 1."""
    new = {d % len(shape) for d in params["dimensions"]}
    kept = [d for d in range(len(shape)) if d not in new]
    return rename(vals[0], dict(enumerate(kept)), shape)


def fix_repeated(ledger: Ledger, c: Comp) -> None:
    """An array that carries channels twice stays whole where it is cut or put in another order.

    ``concatenate([x, relu(x)])`` has every channel twice, with other numbers. As long as the order
    stays, the first is the first; behind a roll or a slice of a narrower array, whichever channel
    it lost, the labels can't tell any more which of the two a reader meets.
    """
    flat = c.labels.reshape(-1)
    if (flat[1:] > flat[:-1]).all():
        return
    found, count = np.unique(flat, return_counts=True)
    if (count[found != STAY] > 1).any():
        reason = "in an array that carries channels twice and is cut or rearranged"
        ledger.fix(flat, reason, policy=True)


def rev(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """Reverses dims."""
    comps = []
    for c in vals[0].comps:
        flip = tuple(k for k, d in enumerate(c.dims) if d in params["dimensions"])
        if flip:
            fix_repeated(ledger, c)
        comps.append(Comp(c.dims, np.flip(c.labels, flip), c.zero))
    return vals[0].like(comps=tuple(comps))


def take(ledger: Ledger, val: Value, d: int, index: np.ndarray, shape: tuple[int, ...]) -> Value:
    """``val`` with dim ``d`` indexed by constants (1-D), labels alike; no constraint recorded."""
    comps = []
    for c in val.comps:
        if d in c.dims:
            c = Comp(c.dims, np.take(c.labels, index, axis=c.dims.index(d)), c.zero)
        comps.append(c)
    distinct = tuple(x and n > 1 for x, n in zip(val.distinct, shape))
    return val.like(shape=tuple(shape), comps=tuple(comps), distinct=distinct)


def slice_dim(ledger: Ledger, val: Value, d: int, start: int, stop: int, stride: int) -> Value:
    """``val[..., start:stop:stride]`` on dim ``d``, and what it asks of the channels there."""
    n = val.shape[d]
    size = len(range(start, stop, stride))
    c = val.comp_on(d)
    if c is not None and size < n:
        fix_repeated(ledger, c)
        if len(c.dims) > 1 and d == c.dims[-1]:
            # picks within the parts of a split dim: parts go whole
            tied = ledger.tie_dims(c, (d,), "sliced within a split dim")
            val = val.like(
                comps=tuple(tied if x is c else x for x in val.comps if x is not c or tied)
            )
        elif len(c.dims) == 1 and not ledger.rearranged:
            text = f"sliced {start}:{stop}" + (f":{stride}" if stride > 1 else "")
            unit = math.gcd(start, stop, n)
            if stride > 1:
                if n % stride == 0 and stop - start > n - stride:
                    rows = c.labels.reshape(n // stride, stride)
                    ledger.tie(rows, rows[:, :1], text)
                    ledger.bond(rows, text)
                else:
                    ledger.fix(
                        c.labels, f"{text}: its bounds may not follow the width", policy=True
                    )
            elif unit > 1 and n // unit <= MAX_PARTS:
                ledger.split(c.labels.reshape(n // unit, unit), text)
            else:
                ledger.fix(c.labels, f"{text}: its bounds may not follow the width", policy=True)
    shape = tuple(size if i == d else m for i, m in enumerate(val.shape))
    return take(ledger, val, d, np.arange(start, stop, stride), shape)


def slice_(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """Static slices."""
    val = vals[0]
    strides = params["strides"] or (1,) * len(shape)
    for d, (a, b, s) in enumerate(zip(params["start_indices"], params["limit_indices"], strides)):
        if (a, b, s) != (0, val.shape[d], 1):
            val = slice_dim(ledger, val, d, a, b, s)
    return val


def split(ledger: Ledger, params: dict[str, Any], vals: list[Value], shapes) -> list[Value]:
    """``jnp.split``: several slices of one dim."""
    out, start = [], 0
    for size in map(int, params["sizes"]):
        out.append(slice_dim(ledger, vals[0], params["axis"], start, start + size, 1))
        start += size
    return out


def concatenate(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """Label arrays one after the other; on the other dims the operands must agree."""
    d, shape = int(params["dimension"]), tuple(shape)
    lengths = [v.shape[d] for v in vals]
    touching = [[c for c in v.comps if d in c.dims] for v in vals]
    joint = sorted({e for row in touching for c in row for e in c.dims if e != d})
    stack = any(n == 1 for n in lengths) and not any(touching)
    comps: list[Comp] = []
    dims: set[tuple[int, ...]] = {c.dims for v in vals for c in v.comps if d not in c.dims}
    done: set[int] = set()
    for key in sorted(dims):
        if set(key) & (set(joint) | done):
            for v in vals:
                for c in v.comps:
                    if c.dims == key:
                        ledger.fix(c.labels, "concatenated with a split dim")
            continue
        done |= set(key)
        row = [next((c for c in v.comps if c.dims == key), None) for v in vals]
        first = next(c for c in row if c is not None)
        zero = all(
            c.zero if c else not np.any(v.const) if v.const is not None else False
            for v, c in zip(vals, row)
        )
        for v, c in zip(vals, row):
            if c is None and any(v.distinct[e] and v.comp_on(e) is None for e in key):
                ledger.fix(first.labels, f"concatenated with {v.why or 'fixed positions'}")
            elif c is None and any(v.comp_on(e) is not None for e in key):
                ledger.fix(first.labels, "concatenated with another split of the dim")
        labelled = [c for c in row if c is not None]
        same = all(np.array_equal(c.labels, first.labels) for c in labelled)
        if stack and not same and all(row) and len(key) == 1:
            rows = np.concatenate(
                [np.repeat(c.labels[None], n, 0) for c, n in zip(labelled, lengths)]
            )
            ledger.split(rows, "stacked")
            both = (d, *key) if d < key[0] else (*key, d)
            comps.append(Comp(both, rows if d < key[0] else rows.T, zero))
            continue
        for c in labelled[1:]:
            ledger.equal(first.labels, c.labels, "concatenate")
        comps.append(Comp(key, first.labels, zero))
    if any(touching):
        key = tuple(sorted({d, *joint}))
        pieces = []
        for v, row in zip(vals, touching):
            size = [v.shape[e] for e in key]
            if row and len(row) == 1:
                index = tuple(slice(None) if e in row[0].dims else None for e in key)
                pieces.append(np.broadcast_to(row[0].labels[index], size))
            else:
                pieces.append(np.full(size, STAY))
        zero = all(row[0].zero if row else True for row in touching)
        comps.append(Comp(key, np.concatenate(pieces, axis=key.index(d)), zero))
    distinct = [any(v.distinct[e] for v in vals) for e in range(len(shape))]
    distinct[d] = shape[d] > 1
    out = Value(shape, tuple(comps), tuple(distinct), **common(vals))
    out.src = ledger.gathered(out.src)
    return out


def pad(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """Padding adds positions that stay."""
    val, shape = vals[0], tuple(shape)
    comps = []
    distinct = list(val.distinct)
    zero_pad = vals[1].const is not None and not np.any(vals[1].const)
    for d, (lo, hi, inner) in enumerate(params["padding_config"]):
        if (lo, hi, inner) != (0, 0, 0):
            distinct[d] = shape[d] > 1
    for c in val.comps:
        for d in c.dims:
            lo, hi, inner = params["padding_config"][d]
            if (lo, hi, inner) == (0, 0, 0):
                continue
            if inner or lo < 0 or hi < 0:
                ledger.fix(c.labels, "padded between or below its channels")
            k = c.dims.index(d)
            source = np.full(
                [shape[d] if i == k else m for i, m in enumerate(c.labels.shape)], STAY
            )
            at = lo + np.arange(val.shape[d]) * (inner + 1)
            ok = (at >= 0) & (at < shape[d])
            index = tuple(at[ok] if i == k else slice(None) for i in range(len(c.dims)))
            source[index] = np.compress(ok, c.labels, axis=k)
            c = Comp(c.dims, source, c.zero and zero_pad)
        comps.append(c if zero_pad else c._replace(zero=False))
    return val.like(shape=shape, comps=tuple(comps), distinct=tuple(distinct))
