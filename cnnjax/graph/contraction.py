"""Label rules of convolutions, matrix products, and the layers they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cnnjax.graph.elementwise import coincides, meet
from cnnjax.graph.ledger import Applied, Event, Grouped, Ledger
from cnnjax.graph.values import Comp, Value, common, opaque


def _single(ledger: Ledger, val: Value, d: int, reason: str) -> tuple[Value, np.ndarray | None]:
    """Ties joint components so that dim ``d`` has labels of its own; returns them."""
    c = val.comp_on(d)
    if c is None:
        return val, None
    if len(c.dims) > 1:
        tied = ledger.tie_dims(c, tuple(e for e in c.dims if e != d), reason)
        assert tied is not None
        val = val.like(comps=tuple(tied if x is c else x for x in val.comps))
        c = tied
    return val, c.labels


def _consume(ledger: Ledger, labels: np.ndarray | None) -> None:
    if labels is not None and labels.size:
        ledger.consumed.add(int(labels.reshape(-1)[0]))


def _contract(
    ledger: Ledger, a: Value, i: int, b: Value, j: int, reason: str
) -> tuple[Value, Value]:
    """Contracts dim i of ``a`` with dim j of ``b``: their channels are the same."""
    a, la = _single(ledger, a, i, reason)
    b, lb = _single(ledger, b, j, reason)
    _meet_contracted(ledger, a, i, la, b, j, lb, reason)
    return a, b


def _meet_contracted(ledger, a, i, la, b, j, lb, reason) -> None:
    if la is not None and lb is not None:
        ledger.equal(la, lb, reason)
        n = la.size
        if not a.act or not b.act:
            # a kernel that is computed, a learnt query say: its scale may follow the width
            made = b if a.act else a
            if a.act != b.act and any(coincides(s, n) for s in made.scales):
                ledger.statistic(la, "a scale that depends on the number of channels")
            return
        za, zb = a.comp_on(i), b.comp_on(j)
        if not ((za is not None and za.zero) or (zb is not None and zb.zero)):
            ledger.statistic(la, f"a {reason} over channels that aren't 0 when removed")
        if any(coincides(s, n) for s in a.scales | b.scales):
            ledger.statistic(la, "a scale that depends on the number of channels")
        return
    for labels, other, k in ((la, b, j), (lb, a, i)):
        if other.const is not None and not np.any(other.const):
            continue  # a sum of nothing, however many channels
        if labels is not None and other.shape[k] == labels.size:
            why = other.why if other.distinct[k] else "copies of one channel"
            ledger.fix(labels, f"meets {why or 'fixed positions'} in {reason}")


def _leaf_path(val: Value) -> str | None:
    return next(iter(val.leaves)) if len(val.leaves) == 1 and not val.act else None


def convolution(
    ledger: Ledger,
    x: Value,
    kernel: Value,
    shape: tuple[int, ...],
    *,
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    out: tuple[int, ...],
    groups: int,
    geometry: dict[str, Any],
) -> Value:
    """A convolution. ``lhs``, ``rhs``, ``out``: (batch, feature, *spatial), (O, I, *spatial)."""
    name = _leaf_path(kernel) or ""
    reason = f"convolution {name}".strip()
    for d in lhs[2:]:
        c = x.comp_on(d)
        if c is not None:
            ledger.fix(c.labels, "a convolution slides over it")
            x = x.like(comps=tuple(o for o in x.comps if o is not c))
    for d in rhs[2:]:
        c = kernel.comp_on(d)
        if c is not None:
            ledger.fix(c.labels, "spatial axis of a kernel")
            kernel = kernel.like(comps=tuple(o for o in kernel.comps if o is not c))
    f, ki, ko = lhs[1], rhs[1], rhs[0]
    kernel, outs = _single(ledger, kernel, ko, reason)
    per_group = kernel.shape[ki]
    once = name in ledger.always_grouped or name in ledger.always_depthwise
    if groups == 1 and not once:
        x, kernel = _contract(ledger, x, f, kernel, ki, reason)
        if kernel.comp_on(ki) is not None:
            _consume(ledger, kernel.comp_on(ki).labels)  # type: ignore[union-attr]
    else:
        x, ins = _single(ledger, x, f, reason)
        kernel, inner = _single(ledger, kernel, ki, reason)
        _groups(ledger, x, ins, kernel, inner, outs, groups, per_group, name, reason)
    comps = []
    if outs is not None:
        comps.append(Comp((out[1],), outs, True))
    batch = x.comp_on(lhs[0])
    if batch is not None and batch.dims == (lhs[0],):
        comps.append(Comp((out[0],), batch.labels, batch.zero))
    distinct = [n > 1 for n in shape]
    distinct[out[0]] = x.distinct[lhs[0]]
    result = Value(tuple(shape), tuple(comps), tuple(distinct), **common([x, kernel]))
    result.why = result.why if outs is None else f"output of {name or 'a convolution'}"
    result.sums = ()
    result.normal = False
    result.scales = frozenset()
    if name and x.act:
        transposed = any(d > 1 for d in geometry["input_dilation"])
        sites = math.prod(shape[d] for d in out[2:])
        taps = math.prod(kernel.shape[d] for d in rhs[2:])
        macs = sites * taps * per_group * shape[out[1]]
        if transposed:
            # every input site meets every tap once
            macs = math.prod(x.shape[d] for d in lhs[2:]) * taps * per_group * shape[out[1]]
        applied = Applied(
            name.rpartition("/")[0] or name,
            "conv_transpose" if transposed else "conv",
            name,
            kernel.shape,
            x.shape,
            tuple(shape),
            {"in_axis": f, "out_axis": out[1], "groups": groups, "macs": macs, **geometry},
            x,
            result,
            ledger.info,
        )
        result.src = ledger.layer(applied, x.src)
    return result


def _groups(ledger, x, ins, kernel, inner, outs, groups, per_group, name, reason) -> None:
    """Grouped convolution: depthwise ties input to outputs; else a constraint on the groups."""
    if ins is None or outs is None:
        for labels in (ins, inner, outs):
            if labels is not None:
                ledger.fix(labels, f"grouped {reason} with fixed channels: {x.why}")
        return
    if per_group == 1 and name not in ledger.always_grouped:
        m = outs.size // groups
        ins, outs = ins.reshape(groups, 1), outs.reshape(groups, m)
        ledger.depthwise.append(Event(ins.reshape(-1), f"depthwise {reason}", ledger.info))
        ledger.tie(outs, ins, f"depthwise {reason}")
        ledger.bond(np.concatenate([ins, outs], axis=1), f"depthwise {reason}")
        if inner is not None:
            ledger.fix(inner, "input axis of a depthwise kernel")
        return
    if inner is None:
        ledger.fix(ins, f"grouped {reason} with a fixed kernel")
        ledger.fix(outs, f"grouped {reason} with a fixed kernel")
        return
    _consume(ledger, inner)
    if ledger.axis_of(inner) is None or ledger.axis_of(outs) is None:
        for labels in (ins, inner, outs):
            ledger.fix(labels, f"grouped {reason} whose kernel isn't a variable as it is")
        return
    ledger.grouped.append(
        Grouped(ins.reshape(groups, -1), inner, outs.reshape(groups, -1), name, ledger.info)
    )


def conv_general_dilated(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """``lax.conv_general_dilated``."""
    x, kernel = vals
    if params["batch_group_count"] != 1:
        for v in vals:
            ledger.fix_all(v, "a convolution with batch groups")
        return opaque(shape, "a convolution with batch groups", act=x.act, src=x.src)
    dims = params["dimension_numbers"]
    return convolution(
        ledger,
        x,
        kernel,
        shape,
        lhs=dims.lhs_spec,
        rhs=dims.rhs_spec,
        out=dims.out_spec,
        groups=params["feature_group_count"],
        geometry={
            "stride": tuple(params["window_strides"]),
            "padding": tuple(tuple(p) for p in params["padding"]),
            "dilation": tuple(params["rhs_dilation"]),
            "input_dilation": tuple(params["lhs_dilation"]),
        },
    )


def own_conv(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """The primitives of `cnnjax.ops`: NHWC images, HWIO kernel, a ``spec`` with the geometry."""
    spec = params["spec"]
    return convolution(
        ledger,
        vals[0],
        vals[1],
        shape,
        lhs=(0, 3, 1, 2),
        rhs=(3, 2, 0, 1),
        out=(0, 3, 1, 2),
        groups=spec.groups,
        geometry={
            "stride": tuple(spec.strides),
            "padding": tuple(tuple(p) for p in spec.padding),
            "dilation": tuple(spec.dilation),
            "input_dilation": (1,) * len(spec.strides),
        },
    )


def dot_general(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """Matrix products: contracted dims meet, batch dims meet, free dims go through."""
    (ca, cb), (ba, bb) = params["dimension_numbers"]
    a, b = vals
    kernel = b if not b.act and b.leaves else a if not a.act and a.leaves else None
    name = (_leaf_path(kernel) if kernel is not None else None) or ""
    reason = f"product with {name}" if name else "product"
    free_a = [d for d in range(len(a.shape)) if d not in ca and d not in ba]
    free_b = [d for d in range(len(b.shape)) if d not in cb and d not in bb]
    contracted: list[np.ndarray] = []
    # a batch dim and a contracted dim under one joint label on both sides: heads
    for i, j in zip(ca, cb):
        x, y = a.comp_on(i), b.comp_on(j)
        if x is not None and y is not None and len(x.dims) > 1 and len(y.dims) > 1:
            to = {**dict(zip(ca, cb)), **dict(zip(ba, bb))}
            if all(d in to for d in x.dims) and sorted(to[d] for d in x.dims) == list(y.dims):
                order = [y.dims.index(to[d]) for d in x.dims]
                ledger.equal(x.labels, y.labels.transpose(order), reason)
                flag = x.zero or y.zero or not (a.act and b.act)
                size = a.shape[i]
                if not flag:
                    ledger.statistic(x.labels, f"a {reason} over channels that aren't 0 then")
                if a.act and b.act and any(coincides(s, size) for s in a.scales | b.scales):
                    ledger.statistic(x.labels, "a scale that depends on the number of channels")
                contracted.append(x.labels)
                a = a.like(comps=tuple(c for c in a.comps if c is not x))
                b = b.like(comps=tuple(c for c in b.comps if c is not y))
                continue
        a, b = _contract(ledger, a, i, b, j, reason)
        for v, d in ((a, i), (b, j)):
            c = v.comp_on(d)
            if c is None:
                continue
            contracted.append(c.labels)
            if not v.act:
                _consume(ledger, c.labels)
    position = {("a", d): k for k, d in enumerate(ba)}
    position |= {("b", d): k for k, d in enumerate(bb)}
    position |= {("a", d): len(ba) + k for k, d in enumerate(free_a)}
    position |= {("b", d): len(ba) + len(free_a) + k for k, d in enumerate(free_b)}
    shape = tuple(shape)
    sides = []
    for tag, v, gone in (("a", a, ca), ("b", b, cb)):
        comps, distinct = [], [False] * len(shape)
        for d, n in enumerate(v.shape):
            if d not in gone:
                distinct[position[tag, d]] = n > 1 and v.distinct[d]
        for c in v.comps:
            if set(c.dims) & set(gone):
                continue
            dims = [position[tag, d] for d in c.dims]
            order = np.argsort(dims)
            comps.append(Comp(tuple(dims[k] for k in order), c.labels.transpose(order), c.zero))
        own = {position[tag, d] for d in range(len(v.shape)) if d not in gone}
        sizes = tuple(n if k in own else 1 for k, n in enumerate(shape))
        sides.append(v.like(shape=sizes, comps=tuple(comps), distinct=tuple(distinct)))
    rows = meet(ledger, sides, shape, reason)
    comps = tuple(
        Comp(
            dims,
            next(c for c in row if c is not None).labels,
            any(c is not None and c.zero for c in row),
        )
        for dims, row in rows
    )
    distinct = tuple(p or q for p, q in zip(sides[0].distinct, sides[1].distinct))
    out = Value(shape, comps, distinct, **common(vals))
    out.why = f"output of {name}" if name else out.why
    out.scales, out.normal, out.sums = frozenset(), False, ()
    size = math.prod(a.shape[i] for i in ca)
    computed = kernel is not None and len(kernel.leaves) > 1  # a learnt query, not a kernel
    if contracted and ((a.act and b.act) or (out.act and computed)):
        out.sums = ((size, np.concatenate([c.reshape(-1) for c in contracted])),)
    macs = size * math.prod(
        n for k, n in enumerate(shape) if not (k == 0 and _is_batch(a, b, ba, free_a))
    )
    if kernel is not None and out.act and name:
        act = a if kernel is vals[1] else b
        act_dims, kernel_dims = (ca, free_b) if kernel is vals[1] else (cb, free_a)
        tag = "b" if kernel is vals[1] else "a"
        out_axis = position[tag, kernel_dims[-1]] if kernel_dims else None
        applied = Applied(
            name.rpartition("/")[0] or name,
            "dense",
            name,
            kernel.shape,
            act.shape,
            shape,
            {"in_axis": act_dims[-1] if act_dims else None, "out_axis": out_axis, "macs": macs},
            act,
            out,
            ledger.info,
        )
        out.src = ledger.layer(applied, act.src)
    elif a.act and b.act:
        applied = Applied(
            "", "matmul", None, (), a.shape, shape, {"macs": macs}, a, out, ledger.info
        )
        out.src = ledger.layer(applied, a.src | b.src)
    return out


def _is_batch(a: Value, b: Value, batch_dims: Any, free_a: list[int]) -> bool:
    """Whether the first dim of the product is the example's batch (then it isn't counted)."""
    if batch_dims:
        return batch_dims[0] == 0 and a.act and b.act
    return a.act and bool(free_a) and free_a[0] == 0
