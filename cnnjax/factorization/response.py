"""Response-driven low rank: what a layer *answers* on data, linear and through its ReLU (Zhang).

``y = W^T x + c`` are the responses of a layer at sampled positions, one row a sample: (n, o). The
layer becomes ``k x k`` with r filters ``K1 = K Q`` and a 1x1 ``P^T`` with bias
``P Q^T c + b``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.factorization.matrix import check_rank, einsum, matmul, working
from cnnjax.typing import AnyArray

Responses = Float[AnyArray, "n o"]


class LowRankMap(NamedTuple):
    """``y -> P Q^T y + b``."""

    p: Array  # (o, r)
    q: Array  # (o, r)
    b: Array  # (o,)

    def __call__(self, y: Float[AnyArray, "*n o"]) -> Array:
        """Applies the map to responses along the last axis."""
        return matmul(matmul(y, self.q), self.p.T) + self.b


class ResponseMoments(NamedTuple):
    """Streamed means and centred sums: enough to solve the linear problem without the samples."""

    count: Array
    y_mean: Array  # (o,)
    z_mean: Array  # (o,)
    yy: Array  # (o, o), sum of (y - mean)(y - mean)^T
    zy: Array  # (o, o)


def empty_moments(outputs: int, dtype=jnp.float32) -> ResponseMoments:
    """Moments of no samples, for `add_moments`."""
    zero, square = jnp.zeros(outputs, dtype), jnp.zeros((outputs, outputs), dtype)
    return ResponseMoments(jnp.zeros((), dtype), zero, zero, square, square)


@jax.jit
def add_moments(moments: ResponseMoments, y: Responses, z: Responses) -> ResponseMoments:
    """Adds a batch of predictors ``y`` and targets ``z``, (n, o) each.

    Batches are centred before their products are summed, and merged exactly (Chan et al. 1979): a
    mean far from zero costs no precision.
    """
    y, z = working(y), working(z)
    n = y.shape[0]
    total = moments.count + n
    y_mean, z_mean = y.mean(0), z.mean(0)
    dy, dz = y_mean - moments.y_mean, z_mean - moments.z_mean
    yc, zc = y - y_mean, z - z_mean
    weight = moments.count * n / total
    return ResponseMoments(
        total,
        moments.y_mean + dy * (n / total),
        moments.z_mean + dz * (n / total),
        moments.yy + matmul(yc.T, yc) + weight * jnp.outer(dy, dy),
        moments.zy + matmul(zc.T, yc) + weight * jnp.outer(dz, dy),
    )


@functools.partial(jax.jit, static_argnames="eps")
def _ordered_map(moments: ResponseMoments, eps: float) -> tuple[Array, Array]:
    """P and Q of full rank (o, o): the best map of every lower rank is their first columns."""
    outputs = moments.yy.shape[0]
    yy, zy = moments.yy, moments.zy
    floor = max(eps, 10 * float(jnp.finfo(yy.dtype).eps))
    ridge = floor * jnp.trace(yy) / outputs + jnp.finfo(yy.dtype).tiny
    damped = yy + ridge * jnp.eye(outputs, dtype=yy.dtype)
    factor = jax.scipy.linalg.cho_factor(damped)
    full = jax.scipy.linalg.cho_solve(factor, zy.T).T
    explained = matmul(matmul(full, yy), full.T)
    _, vectors = jnp.linalg.eigh(0.5 * (explained + explained.T))
    p = vectors[:, ::-1]
    return p, matmul(full.T, p)


def solve_moments(moments: ResponseMoments, rank: int, eps: float = 1e-9) -> LowRankMap:
    """Reduced-rank regression of the targets on the predictors: ``min ||Z - M Y - b||``.

    Args:
      moments: of at least 2 samples; 10 samples per output are advisable.
      rank: 1 to o.
      eps: ridge relative to the trace of the covariance.
    """
    check_rank(rank, moments.yy.shape[0], "response")
    p, q = (a[:, :rank] for a in _ordered_map(moments, eps))
    return LowRankMap(p, q, moments.z_mean - matmul(p, matmul(q.T, moments.y_mean)))


def response_low_rank(
    y: Responses, rank: int, *, z: Responses | None = None, eps: float = 1e-9
) -> LowRankMap:
    """Linear response reconstruction; with ``z = y`` it is PCA of the responses.

    Args:
      y: (n, o) predictors: responses of the (possibly already approximated) network.
      rank: 1 to o.
      z: (n, o) targets; None is ``y`` (symmetric). Responses of the original network give the
        asymmetric form.
      eps: relative ridge.

    Raises:
      ValueError: for fewer than o samples, a rank out of range, or shapes that differ.

    Reference:
      Zhang et al., "Accelerating very deep convolutional networks", TPAMI 2016, arXiv 1505.06798.
    """
    z = y if z is None else z
    _check_samples(y, z)
    moments = add_moments(empty_moments(y.shape[1], working(y).dtype), y, z)
    return solve_moments(moments, rank, eps)


def _check_samples(y: AnyArray, z: AnyArray) -> None:
    if y.shape != z.shape:
        raise ValueError(f"predictors {y.shape} and targets {z.shape} must have the same shape")
    if y.shape[0] < y.shape[1]:
        raise ValueError(
            f"{y.shape[0]} samples for {y.shape[1]} outputs: at least {y.shape[1]} are needed "
            f"(10 times as many, {10 * y.shape[1]}, are advisable)"
        )


@jax.jit
def relaxed_targets(
    y: Responses, predicted: Responses, penalty: float | Array
) -> Float[Array, "n o"]:
    """The exact minimiser z of ``(r(y) - r(z))^2 + penalty (z - predicted)^2``, r = ReLU."""
    y, predicted = working(y), working(predicted)
    target = jax.nn.relu(y)
    negative = jnp.minimum(predicted, 0.0)
    positive = jnp.maximum((penalty * predicted + target) / (penalty + 1), 0.0)

    def cost(z):
        return (target - jax.nn.relu(z)) ** 2 + penalty * (z - predicted) ** 2

    return jnp.where(cost(negative) < cost(positive), negative, positive)


@functools.partial(jax.jit, static_argnames=("rounds", "eps"))
def _nonlinear(y, target, rank, penalties, rounds, eps):
    """The map in (o, o) arrays whose columns from ``rank`` on are zero: one program per size."""
    outputs = y.shape[1]
    kept = jnp.arange(outputs) < rank

    def fit(z):
        moments = add_moments(empty_moments(outputs, y.dtype), y, z)
        p, q = (jnp.where(kept, a, 0) for a in _ordered_map(moments, eps))
        return LowRankMap(p, q, moments.z_mean - matmul(p, matmul(q.T, moments.y_mean)))

    def alternate(solution, penalty):
        z = relaxed_targets(target, solution(y), penalty)
        return fit(z), None

    schedule = jnp.repeat(penalties, rounds)
    solution, _ = jax.lax.scan(alternate, fit(target), schedule)
    return solution


def nonlinear_response_low_rank(
    y: Responses,
    rank: int,
    *,
    target: Responses | None = None,
    penalties: tuple[float, ...] = (0.01, 1.0),
    rounds: int = 25,
    eps: float = 1e-9,
) -> LowRankMap:
    """Low rank that minimises the error *after the ReLU*: ``sum ||r(target) - r(M y + b)||^2``.

    Alternates reduced-rank regression on auxiliary targets with their exact update, the penalty
    small first, then large; starts from the linear solution.

    Args:
      y: (n, o) predictors.
      rank: 1 to o.
      target: (n, o) responses of the original network; None is ``y``. A different array gives
        the asymmetric reconstruction of a layer behind already approximated ones.
      penalties: lambda of each phase.
      rounds: alternations per phase.
      eps: relative ridge.

    Reference:
      Zhang et al., CVPR 2015, arXiv 1411.4229; TPAMI 2016, arXiv 1505.06798.
    """
    target = y if target is None else target
    _check_samples(y, target)
    check_rank(rank, y.shape[1], "response")
    y, target = working(y), working(target)
    phases = jnp.asarray(penalties, y.dtype)
    p, q, b = _nonlinear(y, target, rank, phases, rounds, eps)
    return LowRankMap(p[:, :rank], q[:, :rank], b)


@jax.jit
def response_factors(
    kernel: Float[AnyArray, "kh kw i o"],
    bias: Float[AnyArray, "o"],
    solution: LowRankMap,
) -> tuple[Float[Array, "kh kw i r"], Float[Array, "1 1 r o"], Float[Array, "o"]]:
    """The two kernels and the bias that make a layer answer ``P Q^T (W^T x + c) + b``."""
    spatial = einsum("abio,or->abir", kernel, solution.q)
    return spatial, solution.p.T[None, None], solution(bias)


@functools.partial(jax.jit, static_argnames="count")
def sample_positions(
    key: Array, response: Float[AnyArray, "n h w o"], count: int
) -> Float[Array, "nc o"]:
    """Responses at ``count`` random positions of each image: (n * count, o)."""
    n, h, w, o = response.shape
    where = jax.random.randint(key, (n, count), 0, h * w)
    flat = jnp.asarray(response).reshape(n, h * w, o)
    return jnp.take_along_axis(flat, where[..., None], axis=1).reshape(-1, o)


@jax.jit
def response_spectrum(y: Responses) -> Float[Array, "o"]:
    """Eigenvalues of the responses' covariance, in descending order (for `pca_energy_ranks`)."""
    centred = working(y) - working(y).mean(0)
    values = jnp.linalg.eigvalsh(matmul(centred.T, centred) / y.shape[0])
    return jnp.maximum(values[::-1], 0.0)
