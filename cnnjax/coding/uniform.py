"""Uniform (linear) quantization: symmetric or asymmetric, per tensor or channel, and its training.

``q = clip(round(w / scale) + zero_point)``, ``w ~ (q - zero_point) * scale``. The real number 0 is
always a point of the grid, so pruned weights stay exactly zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.typing import AnyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform:
    """One uniformly quantized tensor.

    Attributes:
      codes: the tensor's shape, integers ``0 .. 2**bits - 1`` (asymmetric) or
        ``-(2**(bits-1) - 1) .. 2**(bits-1) - 1`` (symmetric).
      scale: float32, () per tensor or (channels,).
      zero_point: int32 of the same shape as ``scale``; zeros when symmetric.
      bits: width of a code, 2 to 16.
      axis: the channel axis of ``scale``, or None.
      symmetric: whether the grid is centred on zero.
      dtype: of the tensor.
    """

    codes: Any
    scale: Any
    zero_point: Any
    bits: int = dataclasses.field(default=8, metadata={"static": True})
    axis: int | None = dataclasses.field(default=None, metadata={"static": True})
    symmetric: bool = dataclasses.field(default=True, metadata={"static": True})
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.codes.shape)

    def expand(self) -> AnyArray:
        """The tensor, ``(codes - zero_point) * scale``; of numpy arrays a numpy array."""
        rank = len(self.codes.shape)
        if all(isinstance(a, np.ndarray) for a in (self.codes, self.scale, self.zero_point)):
            scale = _spread(self.scale, self.axis, rank)
            steps = self.codes.astype(np.int32) - _spread(self.zero_point, self.axis, rank)
            return (steps.astype(np.float32) * scale).astype(jnp.dtype(self.dtype))
        scale = _spread(jnp.asarray(self.scale), self.axis, rank)
        zero = _spread(jnp.asarray(self.zero_point, jnp.int32), self.axis, rank)
        steps = jnp.asarray(self.codes, jnp.int32) - zero
        return (steps.astype(jnp.float32) * scale).astype(self.dtype)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code."""
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be 2 to 16, got {bits}")
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def _spread(per_channel: Any, axis: int | None, rank: int) -> Any:
    if axis is None:
        return per_channel
    shape = [1] * rank
    shape[axis] = -1
    return per_channel.reshape(shape)


def _axis(axis: int | None, rank: int) -> int | None:
    if axis is None:
        return None
    if not -rank <= axis < rank:
        raise ValueError(f"channel axis {axis} of a tensor of rank {rank}")
    return axis % rank


def grid(
    weight: Float[Array, " ..."], bits: int, *, symmetric: bool = True, axis: int | None = None
) -> tuple[Array, Array]:
    """Scale and zero point that cover a tensor's range.

    Args:
      weight: any shape.
      bits: 2 to 16.
      symmetric: centre on zero, range ``[-max|w|, max|w|]``; else ``[min(w, 0), max(w, 0)]``.
      axis: one grid per index of this axis; None for one grid.

    Returns:
      float32 scale and int32 zero point, () or (channels,). An all-zero channel gets scale 1.
    """
    low, high = code_range(bits, symmetric)
    axis = _axis(axis, weight.ndim)
    over = tuple(i for i in range(weight.ndim) if i != axis)
    weight = weight.astype(jnp.float32)
    if symmetric:
        reach = jnp.max(jnp.abs(weight), axis=over, initial=0.0)
        scale = reach / high
        scale = jnp.where(scale > 0, scale, 1.0)
        return scale, jnp.zeros(scale.shape, jnp.int32)
    least = jnp.min(weight, axis=over, initial=0.0)
    most = jnp.max(weight, axis=over, initial=0.0)
    scale = (most - least) / (high - low)
    scale = jnp.where(scale > 0, scale, 1.0)
    return scale, jnp.clip(jnp.round(-least / scale), low, high).astype(jnp.int32)


def _steps(weight: Any, scale: Any, zero: Any, bits: int, symmetric: bool) -> Any:
    low, high = code_range(bits, symmetric)
    # a weight of zero maps to the zero point itself: 0 / scale rounds to 0 exactly
    return jnp.clip(jnp.round(weight / scale) + zero, low, high)


def quantize(
    weight: Any, bits: int = 8, *, symmetric: bool = True, axis: int | None = None
) -> Uniform:
    """Quantizes one tensor.

    Args:
      weight: finite floating-point array.
      bits: 2 to 16.
      symmetric: see `grid`.
      axis: one scale per index of this axis, e.g. -1 for the output channels of a kernel.

    Raises:
      ValueError: for NaN or infinity, or bits out of range.
      TypeError: for integer tensors.
    """
    weight = jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(f"only floating-point tensors are quantized, got {weight.dtype}")
    if not bool(jnp.isfinite(weight).all()):
        raise ValueError("the weights hold NaN or infinity; only finite weights are quantized")
    axis = _axis(axis, weight.ndim)
    scale, zero = grid(weight, bits, symmetric=symmetric, axis=axis)
    spread = _spread(scale, axis, weight.ndim), _spread(zero, axis, weight.ndim)
    codes = _steps(weight.astype(jnp.float32), *spread, bits, symmetric)
    kind = ("int" if symmetric else "uint") + ("8" if bits <= 8 else "16")
    return Uniform(
        np.asarray(codes).astype(kind),
        np.asarray(scale),
        np.asarray(zero),
        bits,
        axis,
        symmetric,
        str(weight.dtype),
    )


def fake_quantize(
    weight: Float[AnyArray, " ..."],
    bits: int = 8,
    *,
    symmetric: bool = True,
    axis: int | None = None,
) -> Float[Array, " ..."]:
    """The quantized tensor in the forward pass, the identity in the backward pass.

    The straight-through estimator of quantization-aware training (Bengio et al., arXiv 1308.3432):
    apply it to the parameters inside the loss. The grid follows the weights and gets no gradient;
    nothing is clipped, so the gradient passes everywhere.

    Args:
      weight: any shape.
      bits: 2 to 16.
      symmetric: see `grid`.
      axis: see `grid`.
    """
    weight = jnp.asarray(weight)
    axis = _axis(axis, weight.ndim)
    frozen = jax.lax.stop_gradient(weight.astype(jnp.float32))
    scale, zero = grid(frozen, bits, symmetric=symmetric, axis=axis)
    scale, zero = _spread(scale, axis, weight.ndim), _spread(zero, axis, weight.ndim)
    rounded = (_steps(frozen, scale, zero, bits, symmetric) - zero) * scale
    # in this order the sum is exactly the rounded value
    return rounded.astype(weight.dtype) + (weight - jax.lax.stop_gradient(weight))
