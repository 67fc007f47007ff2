"""Detection distillation: weighted soft cross-entropy and teacher-bounded regression."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from cnnjax.distillation.logits import masked_mean
from cnnjax.typing import AnyArray

Logits = Float[AnyArray, "b c"]
Deltas = Float[AnyArray, "p 4"]
Scalar = Float[Array, ""]


@jax.jit
def weighted_soft_cross_entropy(
    student_logits: Logits,
    teacher_probabilities: Logits,
    weights: Float[AnyArray, " c"],
    mask: Shaped[AnyArray, " b"] | None = None,
) -> Scalar:
    """``-sum_c w_c p_c log q_c``, mean over boxes (T = 1); class 0 is the background.

    Args:
      student_logits: (b, c).
      teacher_probabilities: (b, c).
      weights: (c,), 1.5 for the background and 1 for the others in the paper.
      mask: (b,) which boxes count; none counting gives 0.

    Reference:
      Chen et al., "Learning efficient object detection models with knowledge distillation",
      NIPS 2017.
    """
    log_q = jax.nn.log_softmax(jnp.asarray(student_logits, jnp.float32))
    p = jax.lax.stop_gradient(jnp.asarray(teacher_probabilities, jnp.float32))
    return masked_mean(-jnp.sum(weights * p * log_q, axis=-1), mask)


@jax.jit
def detection_classification(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Int[AnyArray, " b"],
    mu: float | Array = 0.5,
    background_weight: float | Array = 1.5,
    mask: Shaped[AnyArray, " b"] | None = None,
) -> Scalar:
    """``mu CE(labels, q) + (1 - mu) weighted soft CE``; the weights touch the soft term only."""
    q = jnp.asarray(student_logits, jnp.float32)
    weights = jnp.ones(q.shape[-1], jnp.float32).at[0].set(background_weight)
    teacher = jax.nn.softmax(jnp.asarray(teacher_logits, jnp.float32))
    soft = weighted_soft_cross_entropy(q, teacher, weights, mask)
    picked = jnp.take_along_axis(jax.nn.log_softmax(q), labels[:, None], axis=-1)[:, 0]
    return mu * masked_mean(-picked, mask) + (1 - mu) * soft


@jax.jit
def bounded_regression(
    student: Deltas,
    teacher: Deltas,
    target: Deltas,
    margin: float | Array = 0.0,
    mask: Shaped[AnyArray, " p"] | None = None,
) -> Scalar:
    """``||R_s - y||^2`` where ``||R_s - y||^2 + m > ||R_t - y||^2``, else 0; mean over boxes.

    The teacher is a bound, not a target: once the student is better by ``margin``, the box has
    neither value nor gradient. No positive box gives 0.

    Args:
      student: (p, 4) encoded deltas.
      teacher: (p, 4), of the same anchors.
      target: (p, 4).
      margin: m.
      mask: (p,) which boxes are positive.
    """
    ours = jnp.sum((jnp.asarray(student, jnp.float32) - target) ** 2, axis=-1)
    theirs = jax.lax.stop_gradient(
        jnp.sum((jnp.asarray(teacher, jnp.float32) - target) ** 2, axis=-1)
    )
    return masked_mean(jnp.where(ours + margin > theirs, ours, 0.0), mask)


@jax.jit
def smooth_l1(
    prediction: Deltas, target: Deltas, mask: Shaped[AnyArray, " p"] | None = None
) -> Scalar:
    """Huber loss with threshold 1, summed over the 4 deltas, mean over boxes."""
    difference = jnp.abs(jnp.asarray(prediction, jnp.float32) - target)
    values = jnp.where(difference < 1, 0.5 * difference**2, difference - 0.5)
    return masked_mean(values.sum(-1), mask)


@jax.jit
def detection_regression(
    student: Deltas,
    teacher: Deltas,
    target: Deltas,
    nu: float | Array = 0.5,
    margin: float | Array = 0.0,
    mask: Shaped[AnyArray, " p"] | None = None,
) -> Scalar:
    """``smooth_l1(student, target) + nu bounded_regression``."""
    bounded = bounded_regression(student, teacher, target, margin, mask)
    return smooth_l1(student, target, mask) + nu * bounded
