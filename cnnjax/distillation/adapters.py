"""Explicit bridges between a student's and a teacher's features; dropped after training."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cnnjax.typing import AnyArray


class HintRegressor(nnx.Module):
    """VALID convolution from the guided layer's shape to the hint layer's shape (FitNets).

    The kernel is ``(h_s - h_t + 1, w_s - w_t + 1)``, so equal sizes give a 1x1 convolution.

    Args:
      student_shape: (h, w, c) of the guided layer.
      teacher_shape: (h, w, c) of the hint layer.
      activation: the hint layer's non-linearity; None is the identity.
      rngs: initialisation.

    Raises:
      ValueError: if the student's map is smaller than the teacher's.

    Reference:
      Romero et al., ICLR 2015, arXiv 1412.6550, section 2.2.
    """

    def __init__(
        self,
        student_shape: tuple[int, int, int],
        teacher_shape: tuple[int, int, int],
        *,
        activation: Callable[[Array], Array] | None = jax.nn.relu,
        rngs: nnx.Rngs,
    ):
        kernel = tuple(student_shape[i] - teacher_shape[i] + 1 for i in (0, 1))
        if min(kernel) < 1:
            raise ValueError(
                f"a regressor maps the larger map to the smaller: student {student_shape}, teacher "
                f"{teacher_shape}; choose an earlier student layer or a later teacher layer"
            )
        self.activation = activation
        self.conv = nnx.Conv(student_shape[2], teacher_shape[2], kernel, padding="VALID", rngs=rngs)

    def __call__(self, x: Float[AnyArray, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        y = self.conv(jnp.asarray(x))
        return y if self.activation is None else self.activation(y)


class ChannelAdapter(nnx.Module):
    """1x1 convolution between channel counts (detection hints, FSP of unequal widths).

    Args:
      in_channels: the student's.
      out_channels: the teacher's.
      rngs: initialisation.
    """

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(in_channels, out_channels, (1, 1), rngs=rngs)

    def __call__(self, x: Float[AnyArray, "n h w c"]) -> Float[Array, "n h w c2"]:
        return self.conv(jnp.asarray(x))
