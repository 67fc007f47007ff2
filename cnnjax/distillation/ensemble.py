"""Several teachers as one."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.distillation.logits import check_temperature
from cnnjax.typing import AnyArray


def ensemble_logits(
    members: Sequence[Float[AnyArray, "n c"]] | Float[AnyArray, "k n c"],
    *,
    mode: str = "geometric",
    temperature: float = 1.0,
    weights: Sequence[float] | Float[AnyArray, " k"] | None = None,
) -> Float[Array, "n c"]:
    """Logits of the combined teacher, to be used with the same ``temperature`` in `kd`.

    ``geometric`` averages the logits: ``softmax(v/T)`` is then the normalised geometric mean of
    the members' softened probabilities. ``arithmetic`` averages the members' probabilities
    softened at T *before* averaging; the result is ``T log p``, so that ``softmax(result / T)``
    is that average.

    Args:
      members: k arrays (n, c).
      mode: the mean.
      temperature: T of the arithmetic mean.
      weights: k non-negative numbers, normalised here; None is the plain mean.

    Raises:
      ValueError: no members, unequal shapes, or weights that do not fit.

    Reference:
      Hinton, Vinyals, Dean, 2015, arXiv 1503.02531, allows both means; Ba & Caruana, 2014,
      arXiv 1312.6184, average logits.
    """
    check_temperature(temperature)
    if len(members) == 0:
        raise ValueError("an ensemble needs at least one member")
    shapes = {tuple(m.shape) for m in members}
    if len(shapes) != 1:
        raise ValueError(f"the members' logits have different shapes: {sorted(shapes)}")
    stacked = jnp.stack([jnp.asarray(m, jnp.float32) for m in members])
    if weights is None:
        w = jnp.full(len(members), 1 / len(members), jnp.float32)
    else:
        w = jnp.asarray(weights, jnp.float32)
        if w.shape != (len(members),):
            raise ValueError(f"{w.shape} weights for {len(members)} members")
        if not isinstance(w, jax.core.Tracer) and (bool((w < 0).any()) or not float(w.sum()) > 0):
            raise ValueError(f"weights {weights} must be non-negative with a positive sum")
        w = w / w.sum()
    if mode == "geometric":
        return jnp.einsum("k,knc->nc", w, stacked, precision="highest")
    if mode == "arithmetic":
        log_p = jax.nn.log_softmax(stacked / temperature)
        return temperature * jax.nn.logsumexp(log_p, axis=0, b=w[:, None, None])
    raise ValueError(f"mode is {mode!r}; expected 'geometric' or 'arithmetic'")
