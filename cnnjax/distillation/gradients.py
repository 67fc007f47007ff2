"""Gradient-based attention transfer: matching the loss's gradient at the input."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cnnjax.distillation.logits import cross_entropy
from cnnjax.typing import AnyArray

Images = Float[AnyArray, "n h w c"]
Apply = Callable[[Array], Array]


def input_gradient(
    apply: Apply, images: Images, labels: Int[AnyArray, " n"]
) -> Float[Array, "n h w c"]:
    """``d CE(apply(x), y) / d x`` of each example.

    The inner loss is the sum over the batch, so that the examples' gradients stay apart; this
    asks that ``apply`` does not couple examples (BatchNorm in eval mode).
    """

    def total(x):
        return cross_entropy(apply(x), labels) * x.shape[0]

    return jax.grad(total)(jnp.asarray(images, jnp.float32))


def gradient_attention(
    student: Apply,
    teacher: Apply,
    images: Images,
    labels: Int[AnyArray, " n"],
    *,
    beta: float = 1.0,
    form: str = "mean_square",
) -> Float[Array, ""]:
    """``beta/2`` times the distance of the student's and the teacher's input gradients.

    Differentiating this with respect to the student's parameters is double backpropagation.
    ``mean_square`` averages the squared difference over everything; ``norm`` is the printed
    formula, the l2 norm of each example's difference, averaged over examples.

    Args:
      student: images -> logits, closed over the student's parameters.
      teacher: images -> logits in eval mode.
      images: (n, h, w, c).
      labels: (n,).
      beta: weight.
      form: see above.

    Reference:
      Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928, section 3.2.
    """
    ours = input_gradient(student, images, labels)
    theirs = jax.lax.stop_gradient(input_gradient(teacher, images, labels))
    return 0.5 * beta * _distance(ours - theirs, form)


def gradient_symmetry(
    student: Apply,
    images: Images,
    labels: Int[AnyArray, " n"],
    *,
    beta: float = 1.0,
    form: str = "mean_square",
) -> Float[Array, ""]:
    """``beta/2 ||J(x) - flip(J(flip(x)))||``: no teacher; J should commute with the mirror.

    Reference:
      Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928, section 3.2.
    """
    images = jnp.asarray(images, jnp.float32)
    straight = input_gradient(student, images, labels)
    mirrored = input_gradient(student, images[:, :, ::-1], labels)[:, :, ::-1]
    return 0.5 * beta * _distance(straight - mirrored, form)


def _distance(difference: Array, form: str) -> Array:
    if form == "mean_square":
        return jnp.mean(difference**2)
    if form != "norm":
        raise ValueError(f"form is {form!r}; expected 'mean_square' or 'norm'")
    squares = jnp.sum(difference**2, axis=tuple(range(1, difference.ndim)))
    safe = jnp.where(squares > 0, squares, 1.0)
    return jnp.mean(jnp.where(squares > 0, jnp.sqrt(safe), 0.0))
