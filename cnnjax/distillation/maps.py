"""Matching feature maps: hints (FitNets), attention maps, FSP matrices, saliency maps.

Feature maps are (n, h, w, c), taken after the activation. Losses are means over examples in
float32; teachers carry no gradient. Shapes that do not match are errors: bridge them with an
explicit adapter (`cnnjax.distillation.adapters`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax import ops
from cnnjax.typing import AnyArray

Map = Float[AnyArray, "n h w c"]
AnyMap = Float[AnyArray, "_ _ _ _"]  # in lists, where each map has a shape of its own
Scalar = Float[Array, ""]


def _f32(x: AnyArray) -> Array:
    return jnp.asarray(x, jnp.float32)


def hint(student: Float[AnyArray, " n *s"], teacher: Float[AnyArray, " n *s"]) -> Scalar:
    """``1/(2n) sum ||teacher - student||^2``: sum over positions and channels, mean over examples.

    Args:
      student: the regressor's output, same shape as ``teacher``.
      teacher: the hint layer's output.

    Raises:
      ValueError: if the shapes differ (name of the remedy: a regressor).

    Reference:
      Romero et al., "FitNets: hints for thin deep nets", ICLR 2015, arXiv 1412.6550.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's features {student.shape} and the teacher's {teacher.shape} differ: put "
            "a regressor between them (cnnjax.distillation.HintRegressor)"
        )
    return _hint(student, teacher)


@jax.jit
def _hint(student, teacher):
    difference = _f32(student) - jax.lax.stop_gradient(_f32(teacher))
    return 0.5 * jnp.mean(jnp.sum(difference**2, axis=tuple(range(1, difference.ndim))))


def attention_map(features: Map, *, p: float = 2.0, reduce: str = "sum") -> Float[Array, "n hw"]:
    """``sum_c |F|^p`` (or the maximum over channels), flattened over positions."""
    if reduce not in ("sum", "max"):
        raise ValueError(f"reduce is {reduce!r}; expected 'sum' or 'max'")
    if not p > 0:
        raise ValueError(f"p is {p}; the power must be positive")
    x = jnp.abs(_f32(features))
    x = x**p if p != 2 else x * x
    x = x.sum(-1) if reduce == "sum" else x.max(-1)
    return x.reshape(x.shape[0], -1)


def _pooled(x: Array, height: int, width: int) -> Array:
    # average pooling of whole cells: exact, and the same for every backend
    n, h, w = x.shape
    return x.reshape(n, height, h // height, width, w // width).mean((2, 4))


def _unit(q: Array) -> Array:
    # an all-zero map stays zero with a finite gradient
    return q * jax.lax.rsqrt(jnp.sum(q * q, axis=-1, keepdims=True) + 1e-16)


def attention_transfer(
    pairs: Sequence[tuple[AnyMap, AnyMap]],
    *,
    beta: float = 1e3,
    p: float = 2.0,
    reduce: str = "sum",
    form: str = "code",
) -> Scalar:
    """Activation-based attention transfer, summed over (student, teacher) pairs of feature maps.

    ``form="code"`` is the authors' code: ``beta/2 * mean over examples and positions of the
    squared difference`` of the normalised maps. ``form="paper"`` is the printed formula:
    ``beta/2 * mean over examples of the difference's l2 norm`` (use a smaller beta, about 0.1).
    Channel counts may differ. Where one spatial size divides the other, the larger map is
    average-pooled before it is normalised.

    Raises:
      ValueError: no pairs, or spatial sizes that do not divide each other.

    Reference:
      Zagoruyko & Komodakis, "Paying more attention to attention", ICLR 2017, arXiv 1612.03928.
    """
    if not pairs:
        raise ValueError("attention_transfer needs at least one (student, teacher) pair of maps")
    if form not in ("code", "paper"):
        raise ValueError(f"form is {form!r}; expected 'code' or 'paper'")
    total = jnp.zeros((), jnp.float32)
    for student, teacher in pairs:
        total += _attention_pair(student, teacher, p, reduce, form)
    return 0.5 * beta * total


@functools.partial(jax.jit, static_argnames=("p", "reduce", "form"))
def _attention_pair(student, teacher, p, reduce, form):
    q = attention_map(student, p=p, reduce=reduce)
    t = attention_map(jax.lax.stop_gradient(teacher), p=p, reduce=reduce)
    size_s, size_t = student.shape[1:3], teacher.shape[1:3]
    if size_s != size_t:
        small = (min(size_s[0], size_t[0]), min(size_s[1], size_t[1]))
        if any(size[i] % small[i] for size in (size_s, size_t) for i in (0, 1)):
            raise ValueError(
                f"attention maps of sizes {size_s} (student) and {size_t} (teacher): one must be a "
                "multiple of the other; pick layers of equal resolution or resize first"
            )
        q = _pooled(q.reshape(-1, *size_s), *small).reshape(q.shape[0], -1)
        t = _pooled(t.reshape(-1, *size_t), *small).reshape(t.shape[0], -1)
    squared = (_unit(q) - _unit(t)) ** 2
    if form == "code":
        return squared.mean()
    sums = squared.sum(-1)
    # d sqrt at 0 is infinite; where the maps agree the gradient is 0
    safe = jnp.where(sums > 0, sums, 1.0)
    return jnp.mean(jnp.where(sums > 0, jnp.sqrt(safe), 0.0))


@jax.jit
def fsp_matrix(first: Map, second: Float[AnyArray, "n h2 w2 d"]) -> Float[Array, "n c d"]:
    """Gram matrix between two layers: ``1/(h w) sum_{s,t} first[n,s,t,i] second[n,s,t,j]``.

    The larger map is max-pooled to the smaller one's size when it is a whole multiple.

    Raises:
      ValueError: if the spatial sizes are not multiples.

    Reference:
      Yim et al., "A gift from knowledge distillation", CVPR 2017.
    """
    a, b = _f32(first), _f32(second)
    height, width = min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2])

    def fit(x):
        _, h, w, _ = x.shape
        if h % height or w % width:
            raise ValueError(
                f"FSP layers of sizes {first.shape[1:3]} and {second.shape[1:3]}: the larger must "
                "be a whole multiple of the smaller"
            )
        if (h, w) == (height, width):
            return x
        window = (h // height, w // width)
        return ops.max_pool(x, window, window)

    gram = jnp.einsum("nhwi,nhwj->nij", fit(a), fit(b), precision="highest")
    return gram / (height * width)


def fsp(
    student: Sequence[tuple[AnyMap, AnyMap]],
    teacher: Sequence[tuple[AnyMap, AnyMap]],
    *,
    weights: Sequence[float] | None = None,
) -> Scalar:
    """``1/n sum_x sum_k weights_k ||G_T^k - G_S^k||_F^2`` over pairs of layers.

    Args:
      student: for each section, (first, last) feature maps of the student.
      teacher: the same of the teacher, with the same channel counts.
      weights: one per section; None is 1 for each.

    Raises:
      ValueError: numbers of sections or channel counts differ.

    Reference:
      Yim et al., "A gift from knowledge distillation", CVPR 2017.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"{len(student)} student and {len(teacher)} teacher sections: expected the same "
            "number, at least one"
        )
    weights = [1.0] * len(student) if weights is None else list(weights)
    if len(weights) != len(student):
        raise ValueError(f"{len(weights)} weights for {len(student)} sections")
    total = jnp.zeros((), jnp.float32)
    for k, (s, t, weight) in enumerate(zip(student, teacher, weights)):
        gs, gt = fsp_matrix(*s), jax.lax.stop_gradient(fsp_matrix(*t))
        if gs.shape != gt.shape:
            raise ValueError(
                f"section {k}: the student's FSP matrix is {gs.shape[1:]}, the teacher's "
                f"{gt.shape[1:]}: paired layers need equal channel counts (use 1x1 adapters)"
            )
        total += weight * jnp.mean(jnp.sum((gs - gt) ** 2, axis=(1, 2)))
    return total


@jax.jit
def saliency(
    student_scores: Float[AnyArray, "n h w"],
    teacher_probabilities: Float[AnyArray, "n h w"],
    fixations: Float[AnyArray, "n h w"],
    soft_weight: float | Array = 0.9,
) -> Scalar:
    """``(1-w) CE(fixations) + w CE(teacher)`` for maps that are distributions over positions.

    Args:
      student_scores: (n, h, w) unnormalised log-probabilities; softmax runs over h*w.
      teacher_probabilities: (n, h, w), each summing to 1.
      fixations: (n, h, w), each summing to 1.
      soft_weight: w, 0.9 in the paper.

    Reference:
      Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
      arXiv 1801.05787.
    """
    n = student_scores.shape[0]
    log_q = jax.nn.log_softmax(_f32(student_scores).reshape(n, -1))
    soft = jax.lax.stop_gradient(_f32(teacher_probabilities)).reshape(n, -1)
    hard = _f32(fixations).reshape(n, -1)
    target = soft_weight * soft + (1 - soft_weight) * hard
    return -jnp.mean(jnp.sum(target * log_q, axis=-1))
