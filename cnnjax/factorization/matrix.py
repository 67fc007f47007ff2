"""Matrix methods: truncated SVD, its data-weighted form, and the K-filter basis of a kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.typing import AnyArray

Matrix = Float[AnyArray, "m n"]
Kernel = Float[AnyArray, "kh kw i o"]

# factorizations are precise: TPUs and TF32 units would round the inputs to 8 or 10 bits otherwise
einsum = functools.partial(jnp.einsum, precision="highest")
matmul = functools.partial(jnp.matmul, precision="highest")


def working(x: AnyArray) -> Array:
    """The array in float32, or in float64 if it is so already."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def check_rank(rank: int, maximum: int, what: str) -> None:
    """Raises ValueError unless 1 <= rank <= maximum; the message names the maximum."""
    if isinstance(rank, float) or not 1 <= rank <= maximum:
        raise ValueError(f"{what} rank is {rank}; expected 1 to {maximum}")


def check_finite(x: AnyArray, what: str = "kernel") -> None:
    """Raises ValueError if a concrete array holds NaN or infinity."""
    if isinstance(x, jax.core.Tracer):
        return
    bad = int(np.size(x) - np.isfinite(np.asarray(x, np.float64)).sum())
    if bad:
        raise ValueError(f"the {what} of shape {tuple(x.shape)} holds {bad} non-finite values")


@functools.partial(jax.jit, static_argnames="rank")
def svd_dense(
    weight: Float[AnyArray, "i o"], rank: int
) -> tuple[Float[Array, "i r"], Float[Array, "r o"]]:
    """Best rank-r factors of a dense layer, with the singular values split evenly.

    Args:
      weight: (in, out).
      rank: 1 to min(in, out); cheaper than the layer below ``in * out / (in + out)``.

    Returns:
      (in, r) and (r, out), whose product is the truncated SVD.

    Reference:
      Eckart & Young, 1936; for networks Denton et al., NIPS 2014, arXiv 1404.0736.
    """
    check_rank(rank, min(weight.shape), "svd_dense")
    u, s, vt = jnp.linalg.svd(working(weight), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _roots(moment: Array, damping: float) -> tuple[Array, Array]:
    """C^(1/2) and C^(-1/2) of a damped second moment."""
    n = moment.shape[0]
    damped = moment + (damping * jnp.trace(moment) / n) * jnp.eye(n, dtype=moment.dtype)
    values, vectors = jnp.linalg.eigh(damped)
    # round-off can leave values below the damping, or negative
    values = jnp.maximum(values, damping * jnp.trace(moment) / n)
    root = jnp.sqrt(values)
    return matmul(vectors * root, vectors.T), matmul(vectors / root, vectors.T)


@functools.partial(jax.jit, static_argnames=("rank", "damping"))
def weighted_svd(
    weight: Float[AnyArray, "i o"],
    second_moment: Float[AnyArray, "i i"],
    rank: int,
    damping: float = 1e-6,
) -> tuple[Float[Array, "i r"], Float[Array, "r o"]]:
    """The rank-r factors that minimise the *response* error ``E ||(W - W1 W2)^T x||^2``.

    ``C^(-1/2) (C^(1/2) W)_r`` with C = E[x x^T] + damping * tr(C)/n * I.

    Args:
      weight: (in, out).
      second_moment: (in, in), mean of x x^T over inputs (image patches for a convolution).
      rank: 1 to min(in, out).
      damping: relative ridge that keeps a singular C finite.

    Reference:
      Denton et al., NIPS 2014, arXiv 1404.0736 (data covariance metric).
    """
    check_rank(rank, min(weight.shape), "weighted_svd")
    root, inverse = _roots(working(second_moment), damping)
    left, right = svd_dense(matmul(root, working(weight)), rank)
    return matmul(inverse, left), right


@functools.partial(jax.jit, static_argnames="rank")
def filter_basis(
    kernel: Kernel, rank: int
) -> tuple[Float[Array, "kh kw i r"], Float[Array, "1 1 r o"]]:
    """K basis filters and their mixing: ``k x k, I -> r`` then ``1x1, r -> O`` (survey, Fig. 3).

    Args:
      kernel: (kh, kw, i, o).
      rank: 1 to min(kh*kw*i, o); cheaper below ``kh kw i o / (kh kw i + o)``.
    """
    kh, kw, i, o = kernel.shape
    check_rank(rank, min(kh * kw * i, o), "filter_basis")
    left, right = svd_dense(working(kernel).reshape(-1, o), rank)
    return left.reshape(kh, kw, i, rank), right[None, None]


@functools.partial(jax.jit, static_argnames="rank")
def dual_filter_basis(
    kernel: Kernel, rank: int
) -> tuple[Float[Array, "1 1 i r"], Float[Array, "kh kw r o"]]:
    """The dual of `filter_basis`: ``1x1, I -> r`` then ``k x k, r -> O``.

    Args:
      kernel: (kh, kw, i, o).
      rank: 1 to min(i, kh*kw*o).
    """
    kh, kw, i, o = kernel.shape
    check_rank(rank, min(i, kh * kw * o), "dual_filter_basis")
    unfolded = jnp.moveaxis(working(kernel), 2, 0).reshape(i, -1)
    left, right = svd_dense(unfolded, rank)
    return left[None, None], jnp.moveaxis(right.reshape(rank, kh, kw, o), 0, 2)


def tail_norm(singular_values: Float[AnyArray, "k"], rank: int) -> float:
    """Frobenius error of truncation at ``rank``: root of the discarded squared singular values."""
    tail = np.asarray(singular_values, np.float64)[rank:]
    return float(np.sqrt(np.sum(tail**2)))


def energy_rank(singular_values: Float[AnyArray, "k"], energy: float) -> int:
    """Smallest rank that retains the share ``energy`` of the squared singular values.

    Raises:
      ValueError: unless 0 < energy <= 1.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; the retained share must lie in (0, 1]")
    squares = np.asarray(singular_values, np.float64) ** 2
    total = squares.sum()
    if total == 0:
        return 1
    # the sum's own rounding must not push a full share past the last value
    reached = np.cumsum(squares) >= energy * total * (1 - 1e-12)
    return int(np.argmax(reached)) + 1
