"""Beyond the survey: contrastive representation distillation and knowledge review."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.distillation.logits import check_temperature
from cnnjax.typing import AnyArray

Embedding = Float[AnyArray, "n d"]
Map = Float[AnyArray, "_ _ _ _"]


def _normalised(x: AnyArray) -> Array:
    x = jnp.asarray(x, jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-16)


@jax.jit
def _crd(student, teacher, temperature):
    s, t = _normalised(student), _normalised(jax.lax.stop_gradient(teacher))
    scores = jnp.matmul(s, t.T, precision="highest") / temperature
    diagonal = jnp.diagonal(scores)
    return -0.5 * jnp.mean(
        2 * diagonal - jax.nn.logsumexp(scores, axis=0) - jax.nn.logsumexp(scores, axis=1)
    )


def contrastive(
    student: Embedding, teacher: Embedding, *, temperature: float = 0.1
) -> Float[Array, ""]:
    """Contrastive representation distillation with in-batch negatives (symmetric InfoNCE).

    Embeddings are normalised; the student's and the teacher's embedding of the same example are
    the positive pair, all others of the batch the negatives. The paper draws negatives from a
    memory bank with a noise-contrastive estimate; in-batch negatives need no state and are what
    later work uses, so results differ from the paper's at small batches.

    Args:
      student: (n, d) projected features.
      teacher: (n, d) projected features; no gradient.
      temperature: positive.

    Raises:
      ValueError: shapes differ, fewer than two examples, temperature <= 0.

    Reference:
      Tian, Krishnan, Isola, "Contrastive representation distillation", ICLR 2020,
      arXiv 1910.10699.
    """
    check_temperature(temperature)
    if student.shape != teacher.shape:
        raise ValueError(
            f"embeddings {student.shape} and {teacher.shape} differ: project both to one size"
        )
    if student.shape[0] < 2:
        raise ValueError("a contrastive loss needs at least 2 examples in the batch")
    return _crd(student, teacher, temperature)


@functools.partial(jax.jit, static_argnames="levels")
def _hcl(student, teacher, levels):
    difference_full = (
        jnp.asarray(student, jnp.float32),
        jax.lax.stop_gradient(jnp.asarray(teacher, jnp.float32)),
    )
    total = jnp.mean((difference_full[0] - difference_full[1]) ** 2)
    weight, weights = 1.0, 1.0
    n, h, w, c = student.shape
    for level in levels:
        if level >= h or level >= w:
            continue
        weight /= 2
        weights += weight
        pooled = [
            jax.image.resize(x, (n, level, level, c), "linear", antialias=True)
            if h % level or w % level
            else x.reshape(n, level, h // level, level, w // level, c).mean((2, 4))
            for x in difference_full
        ]
        total += weight * jnp.mean((pooled[0] - pooled[1]) ** 2)
    return total / weights


def hierarchical_context(
    student: Sequence[Map], teacher: Sequence[Map], *, levels: tuple[int, ...] = (4, 2, 1)
) -> Float[Array, ""]:
    """ReviewKD's loss: squared distance of maps at full size and pooled to ``levels``.

    Each coarser level has half the weight of the one before; the weighted mean is returned,
    summed over pairs. The student's maps come out of fusion modules of the user's, with the
    teacher's shapes.

    Raises:
      ValueError: numbers of maps or shapes differ.

    Reference:
      Chen et al., "Distilling knowledge via knowledge review", CVPR 2021, arXiv 2104.09044.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(f"{len(student)} student and {len(teacher)} teacher maps")
    total = jnp.zeros((), jnp.float32)
    for k, (s, t) in enumerate(zip(student, teacher)):
        if s.shape != t.shape:
            raise ValueError(
                f"pair {k}: student map {s.shape}, teacher map {t.shape}: fuse or adapt first"
            )
        total += _hcl(s, t, levels)
    return total
