"""Batch normalization whose backward pass needs its input alone.

Differentiating Flax's layer as it is written keeps the centred input for the backward pass beside
the input: one more array as large as the feature map to write, hold and read, for every layer. Here
the derivative is two linear primitives, each the transpose of the other, which know the input and
the statistics of its channels: ``tangent`` (forward mode) and ``cotangent`` (reverse mode).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from cnnjax.ops import primitives

Maps = Float[Array, "*map c"]
Channels = Float[Array, "c"]
_LINEAR = 3  # the first arguments of both primitives


def _axes(x: Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _tangent(
    dx: Maps, dscale: Channels, dbias: Channels,
    x: Maps, mean: Channels, rstd: Channels, scale: Channels,
) -> list[Array]:  # fmt: skip
    """Tangents of (output, mean, variance)."""
    axes, centred = _axes(x), x - mean
    dx = dx.astype(mean.dtype)
    dmean = dx.mean(axes)
    dvar = 2 * (centred * dx).mean(axes)
    dmul = rstd * dscale - 0.5 * rstd**3 * scale * dvar
    dy = (dx - dmean) * (rstd * scale) + centred * dmul + dbias
    return [dy.astype(x.dtype), dmean, dvar]


def _cotangent(
    dy: Maps, dmean: Channels, dvar: Channels,
    x: Maps, mean: Channels, rstd: Channels, scale: Channels,
) -> list[Array]:  # fmt: skip
    """Cotangents of (input, scale, bias): what comes back for (output, mean, variance)."""
    axes, count = _axes(x), x.size // x.shape[-1]
    # were the centred input one expression, here and in the forward pass, XLA would store it
    mean = lax.optimization_barrier(mean)
    dy = dy.astype(mean.dtype)
    total = dy.sum(axes)
    along = (dy * (x - mean)).sum(axes)
    mul = rstd * scale
    constant = (dmean - mul * total) / count
    slope = (2 * dvar - mul * rstd**2 * along) / count
    again, slope = lax.optimization_barrier((mean, slope))
    dx = dy * mul + ((x - again) * slope + constant)
    return [dx.astype(x.dtype), along * rstd, total]


_TANGENT, _COTANGENT = Primitive("cnnjax_norm_tangent"), Primitive("cnnjax_norm_cotangent")


def _define(primitive: Primitive, rule: Any, other: Primitive) -> None:
    """Linear in the first three arguments; other transformations take the rule apart."""
    primitive.multiple_results = True

    def transpose(cts: Any, *args: Any) -> list[Any]:
        if all(type(ct) is ad.Zero for ct in cts):
            return [None] * len(args)
        known = args[_LINEAR:]
        outs = other.bind(*map(ad.instantiate_zeros, cts), *known)
        return [o if ad.is_undefined_primal(a) else None for o, a in zip(outs, args)] + [
            None for _ in known
        ]

    def jvp(primals: Any, tangents: Any) -> Any:
        linear = tangents[:_LINEAR]
        if all(type(t) is ad.Zero for t in tangents[_LINEAR:]):
            # linear: the same primitive, so that it can be transposed
            out = primitive.bind(*primals)
            return out, primitive.bind(*map(ad.instantiate_zeros, linear), *primals[_LINEAR:])
        return jax.jvp(rule, primals, tuple(map(ad.instantiate_zeros, tangents)))

    def batch(args: Any, dims: Any) -> Any:
        outs = jax.vmap(rule, in_axes=tuple(dims))(*args)
        return outs, [0] * len(outs)

    def abstract(*args: Any) -> Any:
        *_, x, mean, _, _ = args
        outs = jax.eval_shape(rule, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args))
        return [(x if o.shape == x.shape else mean).update(weak_type=False) for o in outs]

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(rule, multiple_results=True))
    primitive.def_impl(primitives.eagerly(primitive, ()))
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch


_define(_TANGENT, _tangent, _COTANGENT)
_define(_COTANGENT, _cotangent, _TANGENT)


def _statistics(x: Maps, fast: bool) -> tuple[Channels, Channels]:
    axes = _axes(x)
    mean = x.mean(axes)
    if fast:
        return mean, jnp.maximum(jnp.square(x).mean(axes) - jnp.square(mean), 0)
    return mean, jnp.square(x - mean).mean(axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _normalize(
    x: Maps, scale: Channels, bias: Channels, epsilon: float, fast: bool
) -> tuple[Maps, Channels, Channels]:
    """Output, of the input's type, and mean and variance, of the scale's."""
    wide = x.astype(scale.dtype)
    mean, var = _statistics(wide, fast)
    y = (wide - mean) * (lax.rsqrt(var + epsilon) * scale) + bias
    return y.astype(x.dtype), mean, var


@_normalize.defjvp
def _normalize_jvp(epsilon: float, fast: bool, primals: Any, tangents: Any) -> Any:
    x, scale, _ = primals
    out = _normalize(*primals, epsilon, fast)
    _, mean, var = out
    return out, tuple(_TANGENT.bind(*tangents, x, mean, lax.rsqrt(var + epsilon), scale))


class BatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` (same arguments, attributes and numbers) that trains with less memory.

    In training mode its backward pass keeps the input and two numbers a channel
    (``benchmarks/batch_norm.py``). With a mask, an ``axis_name``, another axis than the last or
    integers it is ``nnx.BatchNorm`` itself, and so it is in evaluation mode. Code that handles
    ``nnx.BatchNorm`` handles it too.
    """

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        """(..., C) -> (..., C), normalised over all axes but the last."""
        running = self.use_running_average if use_running_average is None else use_running_average
        ours = (
            running is False
            and mask is None
            and self.axis_name is None
            and x.ndim > 1
            and self.axis in (-1, x.ndim - 1)
            and jnp.issubdtype(x.dtype, jnp.floating)
        )
        if not ours:
            return super().__call__(x, use_running_average, mask=mask)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        x, _, _, scale, bias = self.promote_dtype(
            (x, self.mean[...], self.var[...], scale, bias), dtype=self.dtype
        )
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale = jnp.ones(x.shape[-1:], wide) if scale is None else scale.astype(wide)
        bias = jnp.zeros(x.shape[-1:], wide) if bias is None else bias.astype(wide)
        y, mean, var = _normalize(x, scale, bias, self.epsilon, self.use_fast_variance)
        for old, new in ((self.mean, mean), (self.var, var)):
            kept = self.momentum * old[...] + (1 - self.momentum) * lax.stop_gradient(new)
            old[...] = kept
        return y
