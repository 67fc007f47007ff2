"""Matching outputs: soft targets (Hinton), logits (Ba & Caruana), decoupled (Zhao).

Every loss is a mean over examples, accumulates in float32, and stops the teacher's gradient.
Reductions: ``mask`` (n,) selects the examples that carry a label (or count at all); a mask of
zeros gives exactly zero value and zero gradient.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from cnnjax.typing import AnyArray

Logits = Float[AnyArray, "n c"]
Labels = Int[AnyArray, "n"]
Weights = Shaped[AnyArray, "n"]
Scalar = Float[Array, ""]


def _check_logits(student: AnyArray, teacher: AnyArray) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {student.shape} and teacher logits {teacher.shape} differ: both must "
            "be (examples, classes) over the same classes in the same order"
        )


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless ``temperature`` is positive (traced values are not checked)."""
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive (2 to 20 is usual)")


def _check_unit(name: str, value: float) -> None:
    if isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it weighs two terms and must lie in [0, 1]")


def masked_mean(values: Float[AnyArray, " n"], mask: Weights | None = None) -> Scalar:
    """Mean of per-example ``values`` over the examples with non-zero mask; 0 if there are none."""
    values = jnp.asarray(values, jnp.float32)
    if mask is None:
        return values.mean()
    mask = jnp.asarray(mask, jnp.float32)
    # where, not a product: a masked example may hold anything, inf included
    total = jnp.sum(jnp.where(mask != 0, values * mask, 0.0))
    return total / jnp.maximum(mask.sum(), 1e-8)


@jax.jit
def cross_entropy(logits: Logits, labels: Labels, mask: Weights | None = None) -> Scalar:
    """Mean cross-entropy of integer labels; masked examples' labels are never read."""
    logp = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    labels = jnp.asarray(labels)
    if mask is not None:
        labels = jnp.where(jnp.asarray(mask) != 0, labels, 0)
    picked = jnp.take_along_axis(logp, labels[:, None], axis=-1)[:, 0]
    return masked_mean(-picked, mask)


@jax.jit
def soft_targets(
    student: Logits, teacher: Logits, temperature: float | Array, mask: Weights | None = None
) -> Scalar:
    """``T^2 KL(softmax(teacher/T) || softmax(student/T))``, mean over examples.

    The factor T^2 keeps the gradient's size when T changes; the gradient with respect to the
    student's logits is ``T (q_T - p_T) / n``.
    """
    z = jnp.asarray(student, jnp.float32)
    v = jax.lax.stop_gradient(jnp.asarray(teacher, jnp.float32))
    log_p = jax.nn.log_softmax(v / temperature)
    log_q = jax.nn.log_softmax(z / temperature)
    p = jnp.exp(log_p)
    # p underflows to 0 before log_p reaches -inf, so 0 * log 0 does not occur
    kl = jnp.sum(p * (log_p - log_q), axis=-1)
    return temperature**2 * masked_mean(kl, mask)


def kd(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Labels | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    mask: Weights | None = None,
) -> Scalar:
    """Knowledge distillation with soft targets.

    ``alpha * T^2 KL(p_T || q_T) + (1 - alpha) * CE(labels, softmax(student))``; the temperature
    touches the soft term only.

    Args:
      student_logits: (n, c).
      teacher_logits: (n, c); no gradient flows into them.
      labels: (n,) integer classes; None drops the hard term (then ``alpha`` must be 1).
      temperature: T > 0; 2 to 20 is usual, lower for very small students.
      alpha: weight of the soft term, in [0, 1].
      mask: (n,) 1 where the example has a label, 0 where it does not; acts on the hard term only.

    Raises:
      ValueError: class counts differ, T <= 0, alpha outside [0, 1], or labels missing.

    Reference:
      Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015,
      arXiv 1503.02531.
    """
    _check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    _check_unit("alpha", alpha)
    if labels is None:
        if alpha != 1:
            raise ValueError(
                f"alpha is {alpha} but there are no labels: pass labels, or alpha=1.0 for the "
                "soft term alone"
            )
        return soft_targets(student_logits, teacher_logits, temperature)
    soft = soft_targets(student_logits, teacher_logits, temperature)
    return alpha * soft + (1 - alpha) * cross_entropy(student_logits, labels, mask)


@functools.partial(jax.jit, static_argnames="center")
def _logit_regression(student, teacher, scale, mask, center):
    z = jnp.asarray(student, jnp.float32)
    v = jax.lax.stop_gradient(jnp.asarray(teacher, jnp.float32))
    if center:
        z = z - z.mean(-1, keepdims=True)
        v = v - v.mean(-1, keepdims=True)
    difference = z - v
    if scale is not None:
        difference = difference / jnp.asarray(scale, jnp.float32)
    return 0.5 * masked_mean(jnp.sum(difference**2, axis=-1), mask)


def logit_regression(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    center: bool = False,
    scale: Float[AnyArray, " c"] | None = None,
    mask: Weights | None = None,
) -> Scalar:
    """``1/(2n) sum ||z - v||^2`` on pre-softmax logits.

    Args:
      student_logits: (n, c).
      teacher_logits: (n, c); an ensemble's average is fine.
      center: subtract each example's mean first (softmax ignores such shifts, this loss doesn't).
      scale: (c,) divides the differences, e.g. the teacher's per-class standard deviation over
        the transfer set.
      mask: (n,) weights of examples.

    Reference:
      Ba & Caruana, "Do deep nets really need to be deep?", NIPS 2014, arXiv 1312.6184.
    """
    _check_logits(student_logits, teacher_logits)
    return _logit_regression(student_logits, teacher_logits, scale, mask, center)


@jax.jit
def _dkd(student, teacher, labels, temperature, alpha, beta):
    z = jnp.asarray(student, jnp.float32) / temperature
    v = jax.lax.stop_gradient(jnp.asarray(teacher, jnp.float32)) / temperature
    target = jax.nn.one_hot(labels, z.shape[-1], dtype=jnp.bool_)

    def split(x):
        # log-probabilities of (target, rest), and of the classes within the rest
        log_all = jax.nn.logsumexp(x, axis=-1)
        rest = jnp.where(target, -jnp.inf, x)
        log_rest = jax.nn.logsumexp(rest, axis=-1)
        picked = jnp.sum(jnp.where(target, x, 0.0), axis=-1)
        binary = jnp.stack([picked - log_all, log_rest - log_all], axis=-1)
        within = jnp.where(target, 0.0, x - log_rest[:, None])
        return binary, within

    student_binary, student_within = split(z)
    teacher_binary, teacher_within = split(v)
    tckd = jnp.sum(jnp.exp(teacher_binary) * (teacher_binary - student_binary), axis=-1)
    p = jnp.where(target, 0.0, jnp.exp(teacher_within))
    nckd = jnp.sum(p * (teacher_within - student_within), axis=-1)
    return temperature**2 * jnp.mean(alpha * tckd + beta * nckd)


def dkd(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Labels,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Scalar:
    """Decoupled distillation: ``T^2 (alpha TCKD + beta NCKD)``, mean over examples.

    TCKD is the KL divergence of the (target, all others) pair, NCKD that of the classes within
    the others. Plain soft targets are ``TCKD + (1 - p_target) NCKD``.

    Reference:
      Zhao et al., "Decoupled knowledge distillation", CVPR 2022, arXiv 2203.08679.
    """
    _check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    if student_logits.shape[-1] < 3:
        raise ValueError(
            f"{student_logits.shape[-1]} classes: dkd needs at least 3 (with 2 classes the others "
            "are a single class and carry no information); use kd"
        )
    return _dkd(student_logits, teacher_logits, labels, temperature, alpha, beta)
