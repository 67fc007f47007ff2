"""What shallow students of logits need: standardized targets and a linear bottleneck."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cnnjax.typing import AnyArray

Logits = Float[AnyArray, "n c"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitScale:
    """Mean and standard deviation of every class's logits over a transfer set, see `logit_scale`.

    A student that learns ``standardize(teacher logits)`` answers with
    ``unstandardize(its outputs)``; keep the scale with it.

    Attributes:
      mean: (c,).
      std: (c,), positive.
    """

    mean: Any
    std: Any

    def standardize(self, logits: Logits) -> Float[Array, "n c"]:
        """(n, c) -> (n, c) of zero mean and unit variance over the transfer set."""
        return (jnp.asarray(logits, jnp.float32) - self.mean) / self.std

    def unstandardize(self, outputs: Logits) -> Float[Array, "n c"]:
        """The inverse of `standardize`."""
        return jnp.asarray(outputs, jnp.float32) * self.std + self.mean


def logit_scale(teacher_logits: Logits, *, floor: float = 1e-3) -> LogitScale:
    """The scale of a teacher's logits over a transfer set.

    Args:
      teacher_logits: (n, c).
      floor: least standard deviation, for classes whose logit never changes.

    Raises:
      ValueError: fewer than two examples, or a floor that is not positive.

    Reference:
      Ba & Caruana, "Do deep nets really need to be deep?", NIPS 2014, arXiv 1312.6184, section 2.
    """
    if len(teacher_logits) < 2:
        raise ValueError(f"a scale needs at least 2 examples, got {len(teacher_logits)}")
    if not floor > 0:
        raise ValueError(f"floor is {floor}; it must be positive")
    v = jnp.asarray(teacher_logits, jnp.float32)
    return LogitScale(v.mean(0), jnp.maximum(v.std(0), floor))


class LinearBottleneck(nnx.Module):
    """``x U V + b`` without a non-linearity between: a dense layer of limited rank.

    Speeds the learning of a shallow, wide student up and saves memory: rank (d + h) weights instead
    of d h. With ``rank = min(d, h)`` it can be any dense layer, see `represent`.

    Reference:
      Ba & Caruana, NIPS 2014, arXiv 1312.6184, section 2.4.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, rngs: nnx.Rngs):
        """Args: d inputs, h outputs, the rank k, initialisation.

        Raises:
          ValueError: a rank that is not in 1..min(d, h).
        """
        most = min(in_features, out_features)
        if not 1 <= rank <= most:
            raise ValueError(f"rank is {rank}; expected 1 to min(inputs, outputs) = {most}")
        self.first = nnx.Linear(in_features, rank, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(rank, out_features, rngs=rngs)

    def __call__(self, x: Any) -> Array:
        """(..., d) -> (..., h)."""
        return self.second(self.first(x))

    def represent(
        self, kernel: Float[AnyArray, "d h"], bias: Float[AnyArray, " h"] | None = None
    ) -> None:
        """Takes over the nearest matrix of this rank (in the Frobenius norm) and a bias.

        Raises:
          ValueError: a kernel of another shape.
        """
        shape = (self.first.kernel.shape[0], self.second.kernel.shape[1])
        if tuple(kernel.shape) != shape:
            raise ValueError(f"the kernel is {tuple(kernel.shape)}; expected {shape}")
        rank = self.first.kernel.shape[1]
        u, s, v = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
        root = np.sqrt(s[:rank])
        self.first.kernel.set_value(jnp.asarray(u[:, :rank] * root, jnp.float32))
        self.second.kernel.set_value(jnp.asarray(root[:, None] * v[:rank], jnp.float32))
        if bias is not None and self.second.bias is not None:
            self.second.bias.set_value(jnp.asarray(bias, jnp.float32))
