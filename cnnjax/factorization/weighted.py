"""Metrics for low rank other than the kernel's own norm (Denton et al. 2014, section 3.4).

Two of them: the second moment of what a layer reads, under which the error of its *answers* counts
(solved by `cnnjax.factorization.weighted_svd`), and one weight per entry from the gradients of the
loss, the diagonal of a Mahalanobis distance (solved here by alternation).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cnnjax import surgery
from cnnjax.factorization.matrix import Matrix, check_rank, matmul, svd_dense, working
from cnnjax.factorization.sites import Batches, captured_sums, in_evaluation
from cnnjax.factorization.survey import spec_of


@functools.partial(jax.jit, static_argnames=("rank", "rounds"))
def entrywise_low_rank(
    matrix: Matrix, weights: Matrix, rank: int, rounds: int = 200
) -> tuple[Float[Array, "m r"], Float[Array, "r n"]]:
    """Rank-r factors that make ``sum_mn (weights_mn (matrix - L R)_mn)^2`` small.

    Starts from the exact solution for the weights' best product of a column and a row; every round
    replaces the entries by what the factors say, in so far as they have no weight, and truncates
    again: the weighted error never grows. No closed form exists for general weights.

    Args:
      matrix: (m, n).
      weights: (m, n), non-negative.
      rank: 1 to min(m, n).
      rounds: of the alternation.

    Reference:
      Denton et al., NIPS 2014, arXiv 1404.0736 (Mahalanobis metric); Srebro & Jaakkola, "Weighted
      low-rank approximations", ICML 2003.
    """
    check_rank(rank, min(matrix.shape), "entrywise_low_rank")
    matrix, weights = working(matrix), jnp.abs(working(weights))
    squares = weights**2
    share = squares / jnp.maximum(squares.max(), jnp.finfo(squares.dtype).tiny)
    # weights near zero would divide: a floor leaves the answer and keeps it finite
    column = jnp.maximum(jnp.sqrt(share.mean(1)), 1e-4)
    row = jnp.maximum(jnp.sqrt(share.mean(0)), 1e-4)
    left, right = svd_dense(column[:, None] * matrix * row, rank)
    begin = (left / column[:, None], right / row)

    def again(_: Any, factors: tuple[Array, Array]) -> tuple[Array, Array]:
        known = matmul(*factors)
        return svd_dense(known + share * (matrix - known), rank)

    return jax.lax.fori_loop(0, rounds, again, begin)


def input_moments(
    model: nnx.Module, paths: Sequence[str], batches: Batches
) -> dict[str, Float[Array, "g n n"]]:
    """Mean of x x^T over what every layer's kernel is multiplied with, for each of its groups.

    Args:
      model: any NNX network, run in evaluation mode.
      paths: of convolutions (n = kh * kw * i/groups, in the kernel's order) and dense layers.
      batches: inputs, arrays or mappings with ``"image"``.

    Raises:
      ValueError: no batches.
    """
    layers: dict[str, Any] = {path: surgery.module_at(model, path) for path in paths}

    def sums(found: dict[str, Any]) -> dict[str, Any]:
        rows = {path: _patches(layers[path], path, found[path]) for path in paths}
        return {
            path: (jnp.einsum("ngp,ngq->gpq", r, r, precision="highest"), r.shape[0])
            for path, r in rows.items()
        }

    total = captured_sums(model, dict.fromkeys(paths, "input"), sums, batches)
    return {path: moment / count for path, (moment, count) in total.items()}


def _patches(layer: Any, path: str, x: Array) -> Float[Array, "n g p"]:
    """What the kernel of each group is multiplied with, one row for each output position."""
    if isinstance(layer, nnx.Linear):
        return working(x).reshape(-1, 1, x.shape[-1])
    spec = spec_of(layer, path)
    kh, kw = layer.kernel_size
    # features come as (inputs, kh, kw)
    patches = jax.lax.conv_general_dilated_patches(
        working(x),
        (kh, kw),
        spec.strides,
        spec.padding,
        rhs_dilation=spec.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    groups, inputs = spec.groups, x.shape[-1] // spec.groups
    patches = patches.reshape(-1, groups, inputs, kh * kw)
    return patches.swapaxes(2, 3).reshape(-1, groups, kh * kw * inputs)


def loss_weights(
    model: nnx.Module, paths: Sequence[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Array]:
    """How much the loss of the wrong classes depends on each entry of the layers' kernels.

    ``alpha = sqrt(sum_n sum_{c != y_n} (d loss(x_n, c) / d w)^2)`` with the cross-entropy; one
    Jacobian of the logits per image.

    Args:
      model: a classifier, run in evaluation mode.
      paths: of convolutions and dense layers.
      batches: mappings with ``"image"`` and ``"label"``; a few hundred images do.

    Returns:
      For each path an array of the kernel's shape.

    Raises:
      ValueError: no batches, or batches without labels.

    Reference:
      Denton et al., NIPS 2014, arXiv 1404.0736, section 3.4.
    """
    graphdef, state = nnx.split(in_evaluation(model))
    kernels = {path: surgery.module_at(model, path).kernel[...] for path in paths}  # pyright: ignore

    def logits(kernels: Any, state: Any, x: Any) -> Array:
        inner = nnx.merge(graphdef, state, copy=True)
        for path, kernel in kernels.items():
            layer: Any = surgery.module_at(inner, path)
            layer.kernel[...] = kernel
        return inner(x[None])[0]  # pyright: ignore[reportCallIssue]

    @jax.jit
    def more(kernels: Any, state: Any, x: Any, y: Any) -> dict[str, Any]:
        def one(total: Any, sample: Any) -> tuple[Any, None]:
            image, label = sample
            chance = jax.nn.softmax(logits(kernels, state, image))
            slopes = jax.jacrev(logits)(kernels, state, image)
            wrong = (jnp.arange(len(chance)) != label).astype(chance.dtype)

            def squares(slope: Array) -> Array:
                # the loss of class c is log sum exp - logit c
                apart = jnp.tensordot(chance, slope, 1) - slope
                return jnp.tensordot(wrong, apart**2, 1)

            return jax.tree.map(lambda t, s: t + squares(s), total, slopes), None

        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, kernels), (x, y))[0]

    total: Any = None
    for batch in batches:
        if not isinstance(batch, Mapping) or "label" not in batch:
            raise ValueError("weights of the loss need batches with 'image' and 'label'")
        found = more(kernels, state, jnp.asarray(batch["image"]), jnp.asarray(batch["label"]))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("no batches: weights of the loss need at least one")
    return {path: jnp.sqrt(squares) for path, squares in total.items()}
