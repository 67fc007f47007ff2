"""Classic separable transforms as layers: DCT, Haar wavelet, and learned separable filters."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.factorization.chain import Chain, ConvSpec
from cnnjax.factorization.matrix import einsum, matmul, working
from cnnjax.typing import AnyArray


def dct_matrix(n: int) -> Float[np.ndarray, "n n"]:
    """Orthonormal DCT-II: ``D[k, m] = c_k cos(pi (2m + 1) k / (2n))``, float64."""
    if n < 1:
        raise ValueError(f"n is {n}; a transform has at least one point")
    k, m = np.mgrid[:n, :n]
    matrix = np.cos(math.pi * (2 * m + 1) * k / (2 * n)) * math.sqrt(2 / n)
    matrix[0] = math.sqrt(1 / n)
    return matrix


def haar_matrix(n: int) -> Float[np.ndarray, "n n"]:
    """One orthonormal Haar level for even ``n``: n/2 averages, then n/2 differences, float64."""
    if n < 2 or n % 2:
        raise ValueError(f"n is {n}; a Haar level needs an even size")
    half = np.arange(n // 2)
    matrix = np.zeros((n, n))
    matrix[half, 2 * half] = matrix[half, 2 * half + 1] = math.sqrt(0.5)
    matrix[n // 2 + half, 2 * half] = math.sqrt(0.5)
    matrix[n // 2 + half, 2 * half + 1] = -math.sqrt(0.5)
    return matrix


def separable_transform_chain(matrix: Float[AnyArray, "k n"], channels: int = 1) -> Chain:
    """The 2-D transform of n x n blocks as two depthwise convolutions of stride n.

    Output channel ``(c * k + p) * k + q`` holds ``(matrix X_c matrix^T)[p, q]`` of each block:
    2n multiplications per coefficient instead of n^2.

    Args:
      matrix: (k, n) one-dimensional transform, one row per coefficient.
      channels: c input channels.
    """
    m = working(matrix)
    k, n = m.shape
    vertical = jnp.tile(m.T[:, None, None, :], (1, 1, 1, channels))
    horizontal = jnp.tile(m.T[None, :, None, :], (1, 1, 1, channels * k))
    specs = (
        ConvSpec((n, 1), "VALID", groups=channels),
        ConvSpec((1, n), "VALID", groups=channels * k),
    )
    return Chain((vertical, horizontal), specs)


@functools.partial(jax.jit, static_argnames=("count", "steps"))
def learn_separable_filters(
    key: Array,
    filters: Float[AnyArray, "n d d2"],
    count: int,
    *,
    penalty: float | Array = 1e-2,
    steps: int = 3000,
) -> tuple[Float[Array, "m d"], Float[Array, "m d2"], Float[Array, "n m"]]:
    """``count`` rank-1 filters and mixing weights: ``f_n ~ sum_m w_nm v_m h_m^T``.

    Minimises ``sum_n ||f_n - sum_m w_nm s_m||^2 + penalty sum_m ||s_m||_*`` by alternating least
    squares in w with proximal gradient steps in s (singular values are soft-thresholded), the
    penalty falling to zero; in the second half of the steps every s keeps its first singular pair
    only. At last w is refitted. A filter that the penalty has emptied restarts from the filter
    that is fitted worst.

    Args:
      key: random key of the start.
      filters: (n, d, d2).
      count: m.
      penalty: first weight of the nuclear norms, relative to the mean energy of a filter.
      steps: alternations.

    Returns:
      (v, h, w): (m, d), (m, d2) unit vectors, (n, m).

    Reference:
      Rigamonti, Sironi, Lepetit, Fua, "Learning separable filters", CVPR 2013.
    """
    f = working(filters)
    n, d, d2 = f.shape
    if count < 1:
        raise ValueError(f"count is {count}; expected at least one filter")
    flat = f.reshape(n, -1)
    eps = 10 * float(jnp.finfo(f.dtype).eps)
    scale = jnp.mean(jnp.sum(flat**2, axis=1))

    def mix(s):
        gram = matmul(s, s.T)
        ridge = eps * jnp.trace(gram) * jnp.eye(count, dtype=f.dtype)
        return jnp.linalg.solve(gram + ridge, matmul(s, flat.T)).T

    def shrink(s, threshold, keep_first):
        u, values, vt = jnp.linalg.svd(s.reshape(count, d, d2), full_matrices=False)
        values = jnp.maximum(values - threshold, 0.0)
        first = jnp.arange(values.shape[1]) == 0
        values = jnp.where(keep_first & ~first, 0.0, values)
        return einsum("mik,mk,mkj->mij", u, values, vt).reshape(count, -1)

    def step(s, inputs):
        index, key = inputs
        w = mix(s)
        curvature = jnp.maximum(jnp.linalg.eigvalsh(matmul(w.T, w))[-1], eps)
        s = s - matmul(w.T, matmul(w, s) - flat) / curvature
        progress = index / steps
        weight = penalty * scale * jnp.maximum(1 - 2 * progress, 0.0) ** 2
        s = shrink(s, weight / curvature, progress >= 0.5)
        norms = jnp.linalg.norm(s, axis=1, keepdims=True)
        residual = jnp.sum((flat - matmul(mix(s), s)) ** 2, axis=1)
        noise = jax.random.normal(key, s.shape, s.dtype)
        seed = flat[jnp.argmax(residual)] + 0.1 * jnp.sqrt(scale / s.shape[1]) * noise
        s = jnp.where(norms > 1e-6, s, seed)
        return s / jnp.linalg.norm(s, axis=1, keepdims=True), None

    start_key, loop_key = jax.random.split(key)
    start = jax.random.normal(start_key, (count, d * d2), f.dtype)
    start = start / jnp.linalg.norm(start, axis=1, keepdims=True)
    s, _ = jax.lax.scan(step, start, (jnp.arange(steps), jax.random.split(loop_key, steps)))
    u, _, vt = jnp.linalg.svd(s.reshape(count, d, d2), full_matrices=False)
    v, h = u[:, :, 0], vt[:, 0]
    return v, h, mix(einsum("mi,mj->mij", v, h).reshape(count, -1))
