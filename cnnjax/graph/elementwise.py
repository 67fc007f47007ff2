"""Label rules of elementwise operations, and how components of several operands meet."""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnjax.graph.ledger import Applied, Ledger
from cnnjax.graph.values import Comp, Value, common

# f(0) = 0
_ZERO_UNARY = frozenset(
    [
        "abs",
        "asin",
        "asinh",
        "atan",
        "atanh",
        "cbrt",
        "ceil",
        "convert_element_type",
        "copy",
        "copy_p",
        "erf",
        "expm1",
        "floor",
        "imag",
        "is_finite_not",
        "log1p",
        "neg",
        "optimization_barrier",
        "real",
        "reduce_precision",
        "round",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "tan",
        "tanh",
    ]
)
_UNARY = _ZERO_UNARY | frozenset(
    [
        "acos",
        "acosh",
        "bessel_i0e",
        "bessel_i1e",
        "conj",
        "cos",
        "cosh",
        "digamma",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "integer_pow",
        "is_finite",
        "lgamma",
        "log",
        "logistic",
        "not",
        "population_count",
        "rsqrt",
    ]
)
_SUM_LIKE = frozenset(["add", "add_any", "sub", "max", "min", "select_n", "clamp"])
_BINARY = _SUM_LIKE | frozenset(
    [
        "mul",
        "div",
        "and",
        "atan2",
        "complex",
        "eq",
        "ge",
        "gt",
        "le",
        "lt",
        "ne",
        "nextafter",
        "or",
        "pow",
        "rem",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "xor",
    ]
)
NAMES = _UNARY | _BINARY


def _zero(name: str, present: list[tuple[Value, Comp | None]], params: dict[str, Any]) -> bool:
    """Whether the result is 0 at removed channels: per operand its component there, or None."""
    if name in _ZERO_UNARY:
        return present[0][1] is not None and present[0][1].zero
    if name == "integer_pow":
        c = present[0][1]
        return params["y"] > 0 and c is not None and c.zero
    flags = [
        c.zero if c is not None else v.const is not None and not np.any(v.const) for v, c in present
    ]
    if name in ("mul", "and"):
        return any(flags)
    if name in ("div", "rem"):
        return flags[0]
    if name == "select_n":
        return all(flags[1:])
    if name in _SUM_LIKE or name in ("or", "xor"):
        return all(flags)
    return False


def aligned(ledger: Ledger, val: Value, shape: tuple[int, ...], reason: str) -> Value:
    """``val`` with components only on dims that have the result's length (others broadcast)."""
    comps = []
    for c in val.comps:
        wide = [d for d in c.dims if val.shape[d] != shape[d]]
        if wide:
            ledger.fix(c.labels, f"broadcast by {reason}")
            rest = tuple(d for d in c.dims if d not in wide)
            if not rest:
                continue
            index = tuple(0 if d in wide else slice(None) for d in c.dims)
            c = Comp(rest, c.labels[index], c.zero)
        comps.append(c)
    return val.like(comps=tuple(comps), const=val.const)


def meet(
    ledger: Ledger, vals: list[Value], shape: tuple[int, ...], reason: str
) -> list[tuple[tuple[int, ...], list[Comp | None]]]:
    """Lets the components of operands of one shape meet, dim by dim.

    Returns:
      For each set of dims that carries labels: the component of every operand there, or None.
      The labels of the operands are made equal; labels that meet distinct positions are fixed.
    """
    vals = [
        v if v.shape == shape or not v.shape else aligned(ledger, v, shape, reason) for v in vals
    ]
    if any(len(c.dims) > 1 for v in vals for c in v.comps):
        vals = _resolve(ledger, vals, shape, reason)
    table: dict[tuple[int, ...], list[Comp | None]] = {}
    for i, v in enumerate(vals):
        for c in v.comps:
            table.setdefault(c.dims, [None] * len(vals))[i] = c
    for dims, row in table.items():
        first = next(c for c in row if c is not None)
        for v, c in zip(vals, row):
            if c is not None:
                ledger.equal(first.labels, c.labels, reason)
            elif v.shape and len(dims) == 1 and _distinct(v, shape, dims[0]):
                ledger.fix(first.labels, f"meets {v.why or 'fixed positions'} in {reason}")
    return list(table.items())


def _distinct(v: Value, shape: tuple[int, ...], d: int) -> bool:
    return v.shape[d] == shape[d] and v.distinct[d] and v.comp_on(d) is None


def _resolve(ledger: Ledger, vals: list[Value], shape: tuple[int, ...], reason: str) -> list[Value]:
    """Joint components (over several dims) are tied until all operands agree on their dims."""
    vals = list(vals)
    for _ in range(8):
        change = False
        for i, v in enumerate(vals):
            for c in v.comps:
                if len(c.dims) == 1:
                    continue
                drop: set[int] = set()
                for j, w in enumerate(vals):
                    if j == i or not w.shape:
                        continue
                    others = [o for o in w.comps if set(o.dims) & set(c.dims)]
                    if any(o.dims == c.dims for o in others):
                        continue
                    if others:
                        # keep only the last dim on which the other side has labels
                        on = sorted({d for o in others for d in o.dims if d in c.dims})
                        drop |= set(c.dims) - {on[-1]}
                        for o in others:
                            if o.dims != (on[-1],) and len(o.dims) == 1:
                                ledger.fix(o.labels, f"meets a split dim in {reason}")
                    elif _distinct(w, shape, c.dims[-1]):
                        drop.add(c.dims[-1])
                if drop:
                    tied = ledger.tie_dims(c, tuple(sorted(drop)), reason)
                    if tied is None or drop >= set(c.dims):
                        ledger.fix(c.labels, f"meets fixed positions in {reason}")
                    comps = tuple(x for x in v.comps if x is not c) + ((tied,) if tied else ())
                    vals[i] = v = v.like(comps=comps, const=v.const)
                    change = True
                    break
        if not change:
            break
    # two joint components over different dims that are still there
    sets = [set(c.dims) for v in vals for c in v.comps]
    if any(a != b and a & b for a in sets for b in sets):
        for i, v in enumerate(vals):
            comps = []
            for c in v.comps:
                if any(s != set(c.dims) and s & set(c.dims) for s in sets):
                    ledger.fix(c.labels, f"meets another split of the dim in {reason}")
                else:
                    comps.append(c)
            vals[i] = v.like(comps=tuple(comps), const=v.const)
    return vals


def rule(ledger: Ledger, name: str, params: dict[str, Any], vals: list[Value], shape) -> Value:
    """The result of an elementwise operation."""
    if len(vals) == 1:
        v = vals[0]
        if v.comps and name not in _ZERO_UNARY:
            power = name == "integer_pow" and params["y"] > 0
            comps = tuple(c if power else c._replace(zero=False) for c in v.comps)
            out = v.like(comps=comps)
        else:
            out = v.like()
        if name in ("rsqrt", "sqrt"):
            out.normal = True
        return out
    shape = tuple(shape)
    rows = meet(ledger, vals, shape, name)
    comps = []
    for dims, row in rows:
        first = next(c for c in row if c is not None)
        zero = _zero(name, list(zip(vals, row)), params)
        comps.append(Comp(dims, first.labels, zero))
    distinct = [False] * len(shape)
    for v in vals:
        if v.shape:
            for d, n in enumerate(v.shape):
                if n > 1 and v.distinct[d]:
                    distinct[d] = True
    out = Value(shape, tuple(comps), tuple(distinct), **common(vals))
    out.src = ledger.gathered(out.src)
    if name in ("mul", "div"):
        _scales(ledger, vals, out)
    return _layers(ledger, name, vals, out)


def coincides(scale: float, n: int) -> bool:
    """Whether a constant is n, 1/n, sqrt(n) or 1/sqrt(n): a mean or a softmax temperature."""
    if n < 2 or scale <= 0:
        return False
    return any(abs(scale / c - 1) < 1e-5 for c in (n, 1 / n, n**0.5, n**-0.5))


def _scales(ledger: Ledger, vals: list[Value], out: Value) -> None:
    for v in vals:
        if v.const is not None and v.const.size == 1:
            c = float(abs(v.const.reshape(-1)[0]))
            if c not in (0.0, 1.0):
                out.scales = out.scales | {c} if len(out.scales) < 16 else frozenset({c})
                for n, labels in out.sums:
                    if coincides(c, n):
                        ledger.statistic(labels, "a mean over channels")


def _read_by(ledger: Ledger, src: frozenset[int], layer: int) -> bool:
    """Whether a layer reads all that ``src`` stands for."""
    if all((s, layer) in ledger.edges for s in src):
        return True
    read = frozenset(a for a, b in ledger.edges if b == layer)
    return ledger.behind(src) <= ledger.behind(read)


def _layers(ledger: Ledger, name: str, vals: list[Value], out: Value) -> Value:
    """An activation that meets variables: a bias, a normalization's scale, a learnt slope."""
    if not out.act:
        return out
    act = [v for v in vals if v.act]
    leaf = [v for v in vals if v.leaves and not v.act]
    if not leaf:
        if len(act) == 2 and act[0].src != act[1].src:
            # x * rsqrt(var) * scale: the normalization's own input doesn't bypass it
            for a, b in ((act[0], act[1]), (act[1], act[0])):
                norm = ledger.only(b.src)
                if norm is not None and norm.kind == "norm":
                    (i,) = b.src
                    if _read_by(ledger, a.src, i):
                        out.src = b.src
                        norm.output_shape, norm.output = out.shape, out
                        norm.input_shape = out.shape
        return out
    paths = sorted({p for v in leaf for p in v.leaves})
    owners = sorted({p.rpartition("/")[0] for p in paths})
    owner = owners[0] if owners[0] else paths[0]
    src = out.src
    last = ledger.only(src)
    if last is not None and owner in (last.path, (last.kernel or "").rpartition("/")[0]):
        last.output_shape, last.output = out.shape, out
        scale = [p for p in paths if p in ledger.parameters]
        if name == "mul" and scale and last.kind in ("scale", "batch_norm", "norm"):
            last.kernel = scale[0]
        if last.kind == "scale" and any(v.normal for v in leaf):
            last.kind = "batch_norm"
        return out
    kind = "scale"
    if any(v.normal for v in act):
        kind = "norm"
    elif any(v.normal for v in leaf):
        kind = "batch_norm"
    source = next((v for v in act if v.shape == out.shape), act[0])
    out.src = ledger.layer(
        Applied(
            owner,
            kind,
            paths[0],
            tuple(leaf[0].shape),
            source.shape,
            out.shape,
            {},
            source,
            out,
            ledger.info,
        ),
        src,
    )
    return out
