"""What ReLU, Flax's Conv and BatchNorm, and concatenation compute, straight on labels.

Most of the time of a run goes into promotion, canonical axes and rules for derivatives that change
nothing. Here the same operations are applied in the same order; anything unusual (another dtype, a
subclass, batch statistics) takes the ordinary way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax import ops
from cnnjax.graph import movement
from cnnjax.graph.contraction import convolution
from cnnjax.graph.direct import Labelled, apply_elementwise
from cnnjax.graph.ledger import HERE, Applied
from cnnjax.graph.values import Comp

_FLOAT = np.dtype(np.float32)
_RELU = jax.nn.relu
_call_jvp = jax.custom_jvp.__call__
_call_norm = nnx.BatchNorm.__call__
_call_conv = nnx.Conv.__call__
_NORMS = (nnx.BatchNorm, ops.BatchNorm)  # the same in evaluation
_CONVS = (jax.lax.conv_general_dilated, ops.conv_general_dilated)
_promote = nnx.nn.dtypes.promote_dtype
_call_concatenate = jax.numpy.concatenate
_GET = nnx.Variable.get_value


def _plain(x: Any) -> bool:
    """A float32 array of the model's, neither weakly typed nor known."""
    return (
        type(x) is Labelled
        and x.aval.dtype == _FLOAT
        and not x.aval.weak_type
        and bool(x.aval.shape)
        and x.value.const is None
    )


def _raw(variable: Any) -> Any:
    """What ``variable[...]`` gives, without the copy that NNX makes where there's no more to it."""
    if type(variable).get_value is not _GET or "on_get_value" in variable.get_metadata():
        return variable[...]
    return variable.get_raw_value()


def _variable(x: Any, ndim: int) -> bool:
    """A variable as it is: nothing has happened to its labels."""
    v = x.value
    return (
        len(v.shape) == len(v.comps) == ndim and len(v.leaves) == 1 and not v.act and not v.normal
    )


def _one(x: Any, axis: int) -> bool:
    """An activation with channels on this axis alone."""
    v = x.value
    return v.act and len(v.comps) == 1 and v.comps[0].dims == (axis,)


def _jvp(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self is _RELU and len(args) == 1 and not kwargs and _plain(args[0]):
        (x,) = args
        x._trace.ledger.literals.append((0.0, None))
        return Labelled(x._trace, x.aval, x.value.like())
    return _call_jvp(self, *args, **kwargs)


def _norm(self: Any, x: Any, use_running_average: Any = None, *, mask: Any = None) -> Any:
    stored = self.use_running_average if use_running_average is None else use_running_average
    if (
        type(self) in _NORMS
        and stored is True
        and _plain(x)
        and type(self.axis) is int
        and (self.dtype is None or self.dtype == _FLOAT)
        and self.promote_dtype is _promote
    ):
        mean, var = _raw(self.mean), _raw(self.var)
        scale = None if self.scale is None else _raw(self.scale)
        bias = None if self.bias is None else _raw(self.bias)
        if all(v is None or _plain(v) for v in (mean, var, scale, bias)):
            args = (x, mean, var, scale, bias, self.axis % len(x.aval.shape), self.epsilon)
            out = _at_once(*args)
            return _normalized(*args) if out is None else out
    return _call_norm(self, x, use_running_average, mask=mask)


def _normalized(
    x: Any, mean: Any, var: Any, scale: Any, bias: Any, axis: int, epsilon: float
) -> Any:
    shape = [1] * len(x.aval.shape)
    shape[axis] = x.aval.shape[axis]
    mean, var = mean.reshape(shape), var.reshape(shape)
    y = x - mean
    mul = var + epsilon
    mul = apply_elementwise(mul._trace, "rsqrt", [mul.value], mul.aval.shape, mul.aval)
    if scale is not None:
        mul = mul * scale.reshape(shape)
    y = y * mul
    return y if bias is None else y + bias.reshape(shape)


def _at_once(x: Any, mean: Any, var: Any, scale: Any, bias: Any, axis: int, epsilon: float) -> Any:
    """What the steps of `_normalized` write down; None where anything is out of the common."""
    trace, v = x._trace, x.value
    ledger, n, ndim = trace.ledger, x.aval.shape[axis], len(x.aval.shape)
    held = [p for p in (mean, var, scale, bias) if p is not None]
    if n < 2 or not _one(x, axis):
        return None
    if not all(p.aval.shape == (n,) and _variable(p, 1) for p in held):
        return None
    paths = [next(iter(p.value.leaves)) for p in held]
    owner = paths[0].rpartition("/")[0]
    last = ledger.only(v.src)
    if not owner or any(p.rpartition("/")[0] != owner for p in paths):
        return None
    if last is not None and owner in (last.path, (last.kernel or "").rpartition("/")[0]):
        return None
    ledger.here()
    for _ in held:  # of the reshapes
        ledger.note((1, ndim), {(0,): (axis,)})
    labels = v.comps[0].labels
    own = [p.value.comps[0].labels for p in held]
    ledger.meet(labels, own[0], "sub")
    ledger.literals.append((float(np.float32(epsilon)), ledger.info))
    if scale is not None:
        ledger.meet(own[1], own[2], "mul")
    ledger.meet(labels, own[1], "mul")
    if bias is not None:
        ledger.meet(labels, own[-1], "add")
    zero = v.comps[0].zero or scale is not None
    out = v.like(comps=(Comp((axis,), labels, zero),), why=v.why or mean.value.why)
    if not v.distinct[axis]:
        out.distinct = (*v.distinct[:axis], True, *v.distinct[axis + 1 :])
    out.sums = out.sums[:8]
    kernel = paths[0]
    scales = sorted(paths[1:2] if scale is None else paths[1:3])
    for path in scales:
        if path in ledger.parameters:
            kernel = path
            break
    shape = x.aval.shape
    kind = "norm" if v.normal else "batch_norm"
    wide = tuple([n if d == axis else 1 for d in range(ndim)])
    applied = Applied(owner, kind, kernel, wide, shape, shape, {}, v, out, ledger.info)
    out.src = ledger.layer(applied, v.src)
    return Labelled(trace, x.aval, out)


def _conv(self: Any, inputs: Any, out_sharding: Any = None) -> Any:
    if (
        type(self) in (nnx.Conv, ops.Conv)
        and out_sharding is None
        and _plain(inputs)
        and len(inputs.aval.shape) == 4
        and self.mask is None
        and (self.dtype is None or self.dtype == _FLOAT)
        and self.promote_dtype is _promote
        and self.preferred_element_type is None
        and self.conv_general_dilated in _CONVS
        and self.in_features % self.feature_group_count == 0
        and len(self.kernel_size) == 2
        and (self.bias is not None or not self.use_bias)
    ):
        kernel = _raw(self.kernel)
        bias = _raw(self.bias) if self.use_bias and self.bias is not None else None
        spec = _spec(self)
        if spec is not None and _plain(kernel) and (bias is None or _plain(bias)):
            out = _convolved(inputs, kernel, spec)
            if out is not None:
                shape = None if bias is None else (1, 1, 1, bias.aval.shape[0])
                return out if bias is None else out + bias.reshape(shape)
    return _call_conv(self, inputs, out_sharding)


def _concatenate(arrays: Any, axis: Any = 0, **kwargs: Any) -> Any:
    if (
        not kwargs
        and type(axis) is int
        and type(arrays) in (list, tuple)
        and len(arrays) > 1
        and all(_plain(x) for x in arrays)
    ):
        shapes = [x.aval.shape for x in arrays]
        ndim = len(shapes[0])
        d = axis % ndim
        rest = shapes[0][:d] + shapes[0][d + 1 :]
        if -ndim <= axis < ndim and all(s[:d] + s[d + 1 :] == rest for s in shapes):
            first = arrays[0]
            trace = first._trace
            trace.ledger.info = HERE
            shape = (*rest[:d], sum(s[d] for s in shapes), *rest[d:])
            vals = [x.value for x in arrays]
            out = movement.concatenate(trace.ledger, {"dimension": d}, vals, shape)
            return Labelled(trace, trace.aval(shape, first.aval), out)
    return _call_concatenate(arrays, axis, **kwargs)


def _spec(layer: Any) -> ops.ConvSpec | None:
    """The layer's geometry, where it is written down in full."""
    pads = layer.padding
    if not (
        isinstance(pads, tuple | list)
        and len(pads) == 2
        and all(isinstance(p, tuple) and len(p) == 2 for p in pads)
        and all(type(n) is int for p in pads for n in p)
    ):
        return None
    strides, rate, grown = map(_two, (layer.strides, layer.kernel_dilation, layer.input_dilation))
    if strides is None or rate is None or grown != (1, 1):
        return None
    return ops.ConvSpec(strides, (pads[0], pads[1]), rate, layer.feature_group_count)


def _two(value: Any) -> tuple[int, int] | None:
    value = 1 if value is None else value
    value = (value, value) if type(value) is int else tuple(value)
    return value if len(value) == 2 and all(type(n) is int and n > 0 for n in value) else None


def _convolved(x: Any, kernel: Any, spec: ops.ConvSpec) -> Any:
    """The convolution; None where the shapes don't fit."""
    n, h, w, c = x.aval.shape
    kh, kw, per_group, outs = kernel.aval.shape
    if per_group * spec.groups != c or outs % spec.groups:
        return None
    shape = (n, *spec.out_size((h, w), (kh, kw)), outs)
    if min(shape) < 1:
        return None
    trace = x._trace
    trace.ledger.here()
    out = convolution(
        trace.ledger,
        x.value,
        kernel.value,
        shape,
        lhs=(0, 3, 1, 2),
        rhs=(3, 2, 0, 1),
        out=(0, 3, 1, 2),
        groups=spec.groups,
        geometry={
            "stride": spec.strides,
            "padding": spec.padding,
            "dilation": spec.dilation,
            "input_dilation": (1, 1),
        },
    )
    return Labelled(trace, trace.aval(shape, x.aval), out)


# (holder, name, what stands there, what is put there)
_PLACES: tuple[tuple[Any, str, Any, Any], ...] = (
    (jax.custom_jvp, "__call__", _call_jvp, _jvp),
    (nnx.BatchNorm, "__call__", _call_norm, _norm),
    (nnx.Conv, "__call__", _call_conv, _conv),
    (jax.numpy, "concatenate", _call_concatenate, _concatenate),
)
_lock = threading.Lock()
_running = 0


@contextlib.contextmanager
def shortcuts() -> Iterator[None]:
    """Puts the shortcuts in the places of four functions, which do as ever for other arrays.

    Whoever has put something else there keeps it. Threads share them: the last one takes them away.
    """
    global _running
    with _lock:
        _running += 1
        for holder, name, old, new in _PLACES:
            if getattr(holder, name) is old:
                setattr(holder, name, new)
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                for holder, name, old, new in _PLACES:
                    if getattr(holder, name) is new:
                        setattr(holder, name, old)
