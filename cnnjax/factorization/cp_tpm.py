"""CP decomposition by greedy deflation with the tensor power method (Astrid & Lee)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.factorization.cp_factors import CPInfo, Factors, cp_info, maximum_rank, random_factors
from cnnjax.factorization.matrix import check_rank, einsum, working
from cnnjax.typing import AnyArray


@functools.partial(jax.jit, static_argnames=("rank", "iterations", "restarts", "tolerance"))
def cp_tpm(
    key: Array,
    tensor: Float[AnyArray, "n1 n2 n3"],
    rank: int,
    *,
    iterations: int = 200,
    restarts: int = 5,
    tolerance: float = 1e-7,
) -> tuple[Factors, CPInfo]:
    """CP of a 3-way tensor by greedy deflation with the tensor power method.

    Each deflation takes the best of ``restarts`` rank-one terms and subtracts it, so the residual
    never grows: ``||X_new||^2 = ||X||^2 - lambda^2``.

    Args:
      key: random key.
      tensor: (kh*kw, i, o) for a convolution kernel.
      rank: number of deflations, at least 1 and at most the product of all modes but the largest.
      iterations: of the power method, at most, per deflation.
      restarts: random starts per deflation, run side by side.
      tolerance: stop when no vector changes more.

    Returns:
      (factors, with each weight spread evenly over the modes, `CPInfo`).

    Reference:
      Astrid & Lee, "CP-decomposition with tensor power method for convolutional neural networks
      compression", BigComp 2017, arXiv 1701.07148.
    """
    tensor = working(tensor)
    check_rank(rank, maximum_rank(tensor.shape), "cp_tpm")
    tiny = jnp.finfo(tensor.dtype).tiny

    def unit(x):
        return x / jnp.maximum(jnp.linalg.norm(x), tiny)

    def rank_one(key, residual):
        start = [unit(f[:, 0]) for f in random_factors(key, tensor.shape, 1, tensor.dtype)]

        def step(carry):
            (u, v, w), _, count = carry
            u2 = unit(einsum("abc,b,c->a", residual, v, w))
            v2 = unit(einsum("abc,a,c->b", residual, u2, w))
            w2 = unit(einsum("abc,a,b->c", residual, u2, v2))
            # without a common sign the same vectors would look different
            change = jnp.maximum(
                jnp.abs(u2 - u).max(), jnp.maximum(jnp.abs(v2 - v).max(), jnp.abs(w2 - w).max())
            )
            return (u2, v2, w2), change, count + 1

        (u, v, w), _, _ = jax.lax.while_loop(
            lambda carry: (carry[1] > tolerance) & (carry[2] < iterations),
            step,
            (tuple(start), jnp.full((), jnp.inf, tensor.dtype), jnp.zeros((), jnp.int32)),
        )
        return (u, v, w), einsum("abc,a,b,c->", residual, u, v, w)

    def deflate(residual, key):
        vectors, weights = jax.vmap(rank_one, in_axes=(0, None))(
            jax.random.split(key, restarts), residual
        )
        best = jnp.argmax(jnp.abs(weights))
        u, v, w = (x[best] for x in vectors)
        weight = weights[best]
        residual = residual - weight * einsum("a,b,c->abc", u, v, w)
        return residual, (u, v, w, weight)

    _, (u, v, w, weights) = jax.lax.scan(deflate, tensor, jax.random.split(key, rank))
    share = jnp.abs(weights) ** (1 / 3)
    factors = [u.T * share, v.T * share, w.T * share * jnp.sign(weights)]
    return factors, cp_info(tensor, factors, rank)
