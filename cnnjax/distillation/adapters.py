"""Explicit bridges between a student's and a teacher's features; dropped after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class ReviewFusion(nnx.Module):
    """ReviewKD's attention-based fusion: each student map meets the deeper ones, resized.

    From the deepest map upwards: a 1x1 convolution to ``middle`` channels; the fused map from
    below, resized to its place; two position-wise weights (a sigmoid of a 1x1 convolution of
    both) add them; a 3x3 convolution gives the teacher's channels. The authors' code has BatchNorm
    behind its convolutions; here biases instead, so that adapters carry no statistics.

    Args:
      channels: of the student's maps, from early to late.
      targets: the teacher's shapes (n, h, w, c), likewise.
      middle: channels of the fused maps; None: the narrowest of ``targets``.
      rngs: initialisation.

    Reference:
      Chen, Liu, Zhao, Jia, "Distilling knowledge via knowledge review", CVPR 2021,
      arXiv 2104.09044, figure 4.
    """

    def __init__(
        self,
        channels: Sequence[int],
        targets: Sequence[tuple[int, ...]],
        *,
        middle: int | None = None,
        rngs: nnx.Rngs,
    ):
        if any(len(t) != 4 for t in targets):
            raise ValueError(f"review compares maps (n, h, w, c); the teacher's are {targets}")
        middle = middle or min(t[3] for t in targets)
        self.sizes = tuple((t[1], t[2]) for t in targets)
        self.enter = nnx.List([nnx.Conv(c, middle, (1, 1), rngs=rngs) for c in channels])
        self.weigh = nnx.List(
            [nnx.Conv(2 * middle, 2, (1, 1), rngs=rngs) for _ in list(channels)[:-1]]
        )
        self.leave = nnx.List([nnx.Conv(middle, t[3], (3, 3), rngs=rngs) for t in targets])

    def __call__(self, maps: Sequence[Float[AnyArray, "_ _ _ _"]]) -> list[Array]:
        """The student's maps, fused, in the teacher's shapes."""
        out: list[Array] = []
        below = None
        for i in reversed(range(len(maps))):
            x = self.enter[i](jnp.asarray(maps[i]))
            size = (x.shape[0], *self.sizes[i], x.shape[3])
            if x.shape != size:
                x = jax.image.resize(x, size, "linear")
            if below is not None:
                below = jax.image.resize(below, size, "nearest")
                z = jax.nn.sigmoid(self.weigh[i](jnp.concatenate([x, below], axis=-1)))
                x = x * z[..., :1] + below * z[..., 1:]
            out.append(self.leave[i](x))
            below = x
        return out[::-1]
