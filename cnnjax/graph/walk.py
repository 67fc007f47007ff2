"""Walks a jaxpr with the label algebra: calls are entered, loops unrolled, the rest refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from cnnjax.graph import contraction, elementwise, indexing, movement, reduction, reshaping
from cnnjax.graph.ledger import Ledger, frames
from cnnjax.graph.values import Value, common, constant, opaque

MAX_STEPS = 4096  # iterations of a scan that are followed one by one
FOLD = 1 << 16  # constants up to this size are computed

_CALLS = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "custom_lin",
        "cnnjax_channel_shuffle",
    ]
)
_MOVES: dict[str, Callable[..., Value]] = {
    "transpose": movement.transpose,
    "broadcast_in_dim": movement.broadcast_in_dim,
    "squeeze": movement.squeeze,
    "expand_dims": movement.expand_dims,
    "rev": movement.rev,
    "reshape": reshaping.reshape,
    "slice": movement.slice_,
    "concatenate": movement.concatenate,
    "pad": movement.pad,
    "conv_general_dilated": contraction.conv_general_dilated,
    "dot_general": contraction.dot_general,
    "gather": indexing.gather,
    "cnnjax_depthwise_conv": contraction.own_conv,
    "cnnjax_grouped_conv": contraction.own_conv,
    "cnnjax_pointwise_conv": contraction.own_conv,
    "cnnjax_dense_conv": contraction.own_conv,
}

_FOLDS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda a, b: a // b if np.issubdtype(a.dtype, np.integer) else a / b,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "exp": np.exp,
    "log": np.log,
    "square": np.square,
    "pow": np.power,
    "copy": np.asarray,
    "stop_gradient": np.asarray,
}


def _fold(name: str, params: dict[str, Any], vals: list[Value], aval: Any) -> np.ndarray | None:
    """The constant result, where all operands are known and small; None where it isn't computed."""
    if int(np.prod(aval.shape)) > FOLD:
        return None
    a: list[Any] = [v.const for v in vals]
    try:
        with np.errstate(all="ignore"):
            if name in _FOLDS:
                out = _FOLDS[name](*a)
            elif name == "iota":
                shape, d = params["shape"], params["dimension"]
                index = [None] * len(shape)
                index[d] = slice(None)  # type: ignore[call-overload]
                out = np.broadcast_to(np.arange(shape[d])[tuple(index)], shape)
            elif name == "integer_pow":
                out = np.power(a[0], params["y"])
            elif name == "convert_element_type":
                out = a[0].astype(params["new_dtype"])
            elif name == "reshape":
                out = a[0].reshape(params["new_sizes"])
            elif name == "squeeze" or name == "expand_dims":
                out = a[0].reshape(aval.shape)
            elif name == "transpose":
                out = a[0].transpose(params["permutation"])
            elif name == "broadcast_in_dim":
                index = [None] * len(aval.shape)
                for d in params["broadcast_dimensions"]:
                    index[d] = slice(None)  # type: ignore[call-overload]
                kept = a[0].reshape(list(a[0].shape))
                out = np.broadcast_to(kept[tuple(index)], aval.shape)
            elif name == "concatenate":
                out = np.concatenate(a, axis=params["dimension"])
            elif name == "rev":
                out = np.flip(a[0], params["dimensions"])
            elif name == "select_n":
                out = np.where(a[0], a[2], a[1]) if len(a) == 3 else None
            elif name == "slice":
                strides = params["strides"] or (1,) * len(aval.shape)
                bounds = zip(params["start_indices"], params["limit_indices"], strides)
                out = a[0][tuple(slice(*b) for b in bounds)]
            else:
                return None
    except (TypeError, ValueError):
        return None
    if out is None or tuple(np.shape(out)) != tuple(aval.shape):
        return None
    return np.asarray(out).astype(aval.dtype)


def _is_key(aval: Any) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)


def walk(
    ledger: Ledger, jaxpr: Jaxpr, consts: list[Value], args: list[Value], *, called: bool = False
) -> list[Value]:
    """Values of a jaxpr's outputs. Each call has its own environment: inner jaxprs are shared.

    Slices that are only put back in another order are looked for in ``called`` programs (such as
    ``jnp.roll``): a whole model is also read without its equations, where nobody can look ahead.
    """
    env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts))
    env.update(zip(jaxpr.invars, args))

    def read(atom: Any) -> Value:
        if isinstance(atom, Literal):
            return constant(atom.val)
        return env[atom]

    rearranged = indexing.rearranged(jaxpr) if called else frozenset()
    for eqn in jaxpr.eqns:
        vals = [read(v) for v in eqn.invars]
        outer = ledger.info
        ledger.rearranged = id(eqn) in rearranged
        if ledger.located:
            ledger.info = eqn.source_info
        outs = equation(ledger, eqn, vals)
        ledger.info = outer
        env.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def enter(ledger: Ledger, closed: Any, args: list[Value]) -> list[Value]:
    """Walks an inner jaxpr, closed or open."""
    if isinstance(closed, ClosedJaxpr):
        consts = [constant_of(c) for c in closed.consts]
        return walk(ledger, closed.jaxpr, consts, args, called=True)
    return walk(ledger, closed, [], args, called=True)


def constant_of(value: Any) -> Value:
    """The value of a constant that the program closes over."""
    if hasattr(value, "dtype") and _is_key(value):
        return opaque(np.shape(value), "a random key")
    return constant(value)


def _users(inner: Any, name: str | None) -> bool:
    """Whether a called program is a user's function: only then do its own lines mean something.

    Programs of library functions are cached, with the lines of whoever called them first.
    """
    eqns = getattr(inner, "jaxpr", inner).eqns
    if name is None:
        return True
    return bool(eqns) and any(
        frame.function_name.split(".")[-1] == name for frame in frames(eqns[0].source_info)
    )


def equation(ledger: Ledger, eqn: Any, vals: list[Value]) -> list[Value]:
    """The values that one equation computes."""
    name, params = eqn.primitive.name, eqn.params
    avals = [v.aval for v in eqn.outvars]
    if len(avals) == 1 and all(v.const is not None for v in vals):
        folded = _fold(name, params, vals, avals[0])
        if folded is not None:
            return [constant(folded)]
    if name in elementwise.NAMES:
        if len(vals) > 1:
            for v in vals:
                if v.const is not None and v.const.size == 1 and v.const.dtype.kind == "f":
                    ledger.literals.append((float(v.const.reshape(-1)[0]), ledger.info))
        return [elementwise.rule(ledger, name, params, vals, avals[0].shape)]
    if name in _MOVES:
        return [_MOVES[name](ledger, params, vals, avals[0].shape)]
    if name == "split":
        return movement.split(ledger, params, vals, [a.shape for a in avals])
    if name in _CALLS:
        inner = params.get("jaxpr") or params.get("call_jaxpr") or params.get("fun_jaxpr")
        if inner is not None:
            before = ledger.located
            ledger.located = before and _users(inner, params.get("name"))
            outs = enter(ledger, inner, vals)
            ledger.located = before
            return outs
    if name in reduction.REDUCTIONS:
        return [reduction.reduction(ledger, name, params, vals, avals[0].shape)]
    if name in ("argmax", "argmin"):
        for c in vals[0].comps:
            if set(c.dims) & set(params["axes"]):
                ledger.fix(c.labels, f"{name} over channels")
        kept = tuple(c for c in vals[0].comps if not set(c.dims) & set(params["axes"]))
        val = vals[0].like(comps=tuple(c._replace(zero=False) for c in kept))
        return [reduction.reduction(ledger, name, params, [val], avals[0].shape)]
    if name.startswith("reduce_window") or name.startswith("select_and_"):
        window = params["window_dimensions"]
        dims = tuple(
            d for d in range(len(window)) if window[d] > 1 or avals[0].shape[d] != vals[0].shape[d]
        )
        return [reduction.windowed(ledger, name, dims, vals[:1], avals[0].shape)]
    if name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"):
        return [reduction.windowed(ledger, name, (params["axis"],), vals, avals[0].shape)]
    if name == "sort":
        return [
            reduction.windowed(ledger, name, (params["dimension"],), [v], a.shape)
            for v, a in zip(vals, avals)
        ]
    if name == "iota":
        return [
            constant(_fold("iota", params, [], avals[0]))
            if avals[0].size <= FOLD
            else opaque(avals[0].shape, "positions")
        ]
    if name == "dynamic_slice" and all(v.const is not None for v in vals[1:]):
        return [_dynamic_slice(ledger, params, vals, avals[0].shape)]
    if name == "cond":
        return _cond(ledger, params, vals, avals)
    if name == "scan":
        return _scan(ledger, params, vals, avals)
    return refuse(ledger, name, vals, avals)


def refuse(ledger: Ledger, name: str, vals: list[Value], avals: list[Any]) -> list[Value]:
    """An operation that isn't known: nothing that goes in may be pruned."""
    for v in vals:
        ledger.fix_all(v, f"operation {name!r} isn't analysed")
    info = common(vals) if vals else {}
    info.pop("sums", None)
    return [
        opaque(getattr(a, "shape", ()), f"output of {name!r}", **{**info, "why": ""})
        if not info
        else opaque(
            getattr(a, "shape", ()),
            f"output of {name!r}",
            act=info["act"],
            leaves=info["leaves"],
            src=info["src"],
        )
        for a in avals
    ]


def _dynamic_slice(ledger: Ledger, params: dict[str, Any], vals: list[Value], shape) -> Value:
    val = vals[0]
    for d, (start, size) in enumerate(zip(vals[1:], params["slice_sizes"])):
        n = val.shape[d]
        if size != n:
            assert start.const is not None
            a = int(np.clip(int(start.const), 0, n - size))
            val = movement.slice_dim(ledger, val, d, a, a + size, 1)
    return val


def _join(ledger: Ledger, rows: list[list[Value]], avals: list[Any], name: str) -> list[Value]:
    """Outputs of several branches: their channels are the same."""
    out = []
    for vals, aval in zip(zip(*rows), avals):
        first = elementwise.rule(
            ledger, "select_n", {}, [constant(False), *vals], tuple(aval.shape)
        )
        out.append(first)
    return out


def _cond(ledger: Ledger, params: dict[str, Any], vals: list[Value], avals) -> list[Value]:
    index, args = vals[0], vals[1:]
    branches = params["branches"]
    if index.const is not None:
        at = int(np.clip(int(index.const), 0, len(branches) - 1))
        return enter(ledger, branches[at], args)
    return _join(ledger, [enter(ledger, b, args) for b in branches], avals, "cond")


def _scan(ledger: Ledger, params: dict[str, Any], vals: list[Value], avals) -> list[Value]:
    """Follows every iteration: the slices of stacked variables share their channels' labels."""
    length, body = params["length"], params["jaxpr"]
    # stacked inputs and outputs have a dim more outside than inside, whatever JAX calls them
    inner = [a.aval.ndim for a in body.jaxpr.invars]
    nx = sum(len(v.shape) > n for v, n in zip(vals, inner))
    nk = sum(a.ndim == b.aval.ndim for a, b in zip(avals, body.jaxpr.outvars))
    nc = len(vals) - nx - nk
    if length > MAX_STEPS:
        return refuse(ledger, f"scan of {length} steps", vals, avals)
    consts, carry, xs = vals[:nc], vals[nc : nc + nk], vals[nc + nk :]
    for x in xs:
        c = x.comp_on(0)
        if c is not None:
            ledger.fix(c.labels, "the axis that a scan runs over")
    xs = [x.like(comps=tuple(c for c in x.comps if 0 not in c.dims), const=x.const) for x in xs]
    steps = range(length - 1, -1, -1) if params["reverse"] else range(length)
    ys: list[list[Value]] = []
    for t in steps:
        row = []
        for x in xs:
            if x.const is not None:
                row.append(constant(x.const[t]))
            else:
                one = movement.take(ledger, x, 0, np.array([t]), (1, *x.shape[1:]))
                row.append(movement.squeeze(ledger, {"dimensions": (0,)}, [one], x.shape[1:]))
        outs = enter(ledger, body, [*consts, *carry, *row])
        carry = outs[:nk]
        ys.append(outs[nk:])
    if params["reverse"]:
        ys.reverse()
    stacked = []
    for k, aval in enumerate(avals[nk:]):
        rows = [
            movement.expand_dims(ledger, {"dimensions": (0,)}, [y[k]], (1, *y[k].shape)) for y in ys
        ]
        if not rows:
            stacked.append(opaque(aval.shape, "an empty scan"))
            continue
        stacked.append(movement.concatenate(ledger, {"dimension": 0}, rows, aval.shape))
    return [*carry, *stacked]
