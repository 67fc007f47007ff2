"""CP (canonical polyadic) decomposition by alternating least squares, with a guard for degeneracy.

Factors are a list of (n_k, R) arrays, ``T ~ sum_r f1_r o f2_r o ... o fN_r``.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.factorization.matrix import check_rank, einsum, matmul, working
from cnnjax.typing import AnyArray

Factors = list[Array]


class CPInfo(NamedTuple):
    """How a CP fit ended.

    Attributes:
      relative_error: ``||T - That|| / ||T||``, computed from the residual itself.
      iterations: sweeps (ALS), steps (LM) or deflations (power method).
      degeneracy: largest component norm / ``||T||``; far above 1 means diverging components that
        cancel (no best rank-R approximation may exist).
    """

    relative_error: Array
    iterations: Array
    degeneracy: Array


def maximum_rank(shape: Sequence[int]) -> int:
    """A rank that every tensor of this shape reaches: the product of all modes but the largest."""
    total = 1
    for n in sorted(shape)[:-1]:
        total *= n
    return total


def compose_cp(factors: Sequence[Float[AnyArray, "_ _"]]) -> Float[Array, ...]:
    """The full tensor of CP factors."""
    letters = string.ascii_lowercase[: len(factors)]
    return einsum(
        ",".join(f"{c}z" for c in letters) + "->" + letters,
        *factors,
        optimize="optimal",
    )


def mttkrp(tensor: Array, factors: Sequence[Array], mode: int) -> Float[Array, "n r"]:
    """Matricized tensor times Khatri-Rao product, in the contraction order of least cost."""
    letters = string.ascii_lowercase[: tensor.ndim]
    others = [m for m in range(tensor.ndim) if m != mode]
    expression = letters + "," + ",".join(f"{letters[m]}z" for m in others) + f"->{letters[mode]}z"
    return einsum(expression, tensor, *(factors[m] for m in others), optimize="optimal")


def _fold(part: Array, factors: Sequence[Array], skip: int) -> Float[Array, "n r"]:
    """Multiplies the factors into (n_0, ..., n_k, r) and sums over all modes but ``skip``."""
    letters = string.ascii_lowercase[: len(factors)]
    others = [m for m in range(len(factors)) if m != skip]
    expression = f"{letters}z," + ",".join(f"{letters[m]}z" for m in others)
    expression += f"->{letters[skip]}z"
    return einsum(expression, part, *(factors[m] for m in others), optimize="optimal")


def gram_product(grams: Sequence[Array], skip: Sequence[int]) -> Array:
    """Hadamard product of the factors' Gram matrices, without the modes in ``skip``."""
    out = jnp.ones_like(grams[0])
    for mode, gram in enumerate(grams):
        if mode not in skip:
            out = out * gram
    return out


def component_norms(factors: Sequence[Array]) -> Float[Array, "r"]:
    """Norm of each rank-one component."""
    out = jnp.ones(factors[0].shape[1], factors[0].dtype)
    for factor in factors:
        out = out * jnp.linalg.norm(factor, axis=0)
    return out


def balance(factors: Sequence[Array]) -> Factors:
    """The same components with equal column norms in every mode."""
    norms = [jnp.linalg.norm(f, axis=0) for f in factors]
    total = functools.reduce(jnp.multiply, norms)
    share = total ** (1 / len(factors))
    return [f * (share / jnp.where(n > 0, n, 1.0)) for f, n in zip(factors, norms)]


def random_factors(key: Array, shape: Sequence[int], rank: int, dtype=jnp.float32) -> Factors:
    """Gaussian factors, a start for the solvers."""
    keys = jax.random.split(key, len(shape))
    return [jax.random.normal(k, (n, rank), dtype) for k, n in zip(keys, shape)]


def cp_info(tensor: Array, factors: Sequence[Array], iterations: Array | int) -> CPInfo:
    """Measures a fit from its residual."""
    norm = jnp.linalg.norm(tensor)
    safe = jnp.where(norm > 0, norm, 1.0)
    error = jnp.linalg.norm(tensor - compose_cp(factors)) / safe
    return CPInfo(error, jnp.asarray(iterations), component_norms(factors).max() / safe)


@functools.partial(jax.jit, static_argnames=("rank", "sweeps", "tolerance", "ridge"))
def cp_als(
    key: Array,
    tensor: Float[AnyArray, ...],
    rank: int,
    *,
    sweeps: int = 100,
    tolerance: float = 1e-10,
    ridge: float = 1e-9,
    start: Sequence[Float[AnyArray, "_ _"]] | None = None,
) -> tuple[Factors, CPInfo]:
    """CP by alternating least squares.

    Each factor solves its proximally damped normal equations
    ``F (Gamma + mu I) = MTTKRP + mu F_old``; the damping leaves the fixed points where they are
    and makes the error non-increasing, swamps and rank-deficient Grams included.

    Args:
      key: random key of the start.
      tensor: N-way array, N >= 2.
      rank: R, at least 1 and at most the product of all modes but the largest.
      sweeps: at most.
      tolerance: stop when the relative error changes less in a sweep.
      ridge: mu, relative to the mean diagonal of Gamma.
      start: factors to start from instead of random ones.

    Returns:
      (factors with balanced column norms, `CPInfo`).

    Reference:
      Kolda & Bader, "Tensor decompositions and applications", SIAM Review 51(3), 2009.
    """
    tensor = working(tensor)
    check_rank(rank, maximum_rank(tensor.shape), "cp_als")
    if start is None:
        factors = random_factors(key, tensor.shape, rank, tensor.dtype)
    else:
        factors = [working(f) for f in start]
    squared = jnp.sum(tensor**2)
    last = tensor.ndim - 1
    identity = jnp.eye(rank, dtype=tensor.dtype)
    # float32 can't factor a Gram matrix that is singular to its own rounding
    eps = float(jnp.finfo(tensor.dtype).eps)
    floor = max(ridge, 10 * eps)
    cancelled = eps**0.5
    # two large products a sweep serve all modes: the tensor times the last factor for every mode
    # but the last, and times the last but one for the last; their unfoldings are laid out once
    by_last = tensor.reshape(-1, tensor.shape[last])
    swapped = jnp.swapaxes(tensor, last - 1, last)
    by_other = swapped.reshape(-1, tensor.shape[last - 1])

    def sweep(carry):
        factors, error, _, count = carry
        factors = list(factors)
        product = jnp.zeros_like(factors[last])
        grams = [matmul(f.T, f) for f in factors]
        part = matmul(by_last, factors[last]).reshape(*tensor.shape[:last], rank)
        for mode in range(tensor.ndim):
            gamma = gram_product(grams, (mode,))
            mu = floor * jnp.trace(gamma) / rank + jnp.finfo(tensor.dtype).tiny
            if mode == last:
                part = matmul(by_other, factors[last - 1])
                part = part.reshape(*swapped.shape[:last], rank)
                # the last mode stands where the last but one was summed over
                product = _fold(part, [*factors[: last - 1], factors[last]], last - 1)
            else:
                product = _fold(part, factors[:last], mode)
            solve = jax.scipy.linalg.cho_factor(gamma + mu * identity)
            factors[mode] = jax.scipy.linalg.cho_solve(solve, (product + mu * factors[mode]).T).T
            if mode != last:
                norms = jnp.linalg.norm(factors[mode], axis=0)
                factors[mode] = factors[mode] / jnp.where(norms > 0, norms, 1.0)
                scale = jnp.where(norms > 0, norms, 1.0)
                factors[last] = factors[last] * scale
                part = part * scale
                grams[last] = matmul(factors[last].T, factors[last])
            grams[mode] = matmul(factors[mode].T, factors[mode])
        # the error from the last update's pieces: no rebuilding of the tensor ...
        gamma = functools.reduce(jnp.multiply, grams)
        residual = squared - 2 * jnp.sum(product * factors[last]) + gamma.sum()
        # ... unless it is so small that the difference above is all rounding
        residual = jax.lax.cond(
            residual < cancelled * squared,
            lambda: jnp.sum((tensor - compose_cp(factors)) ** 2),
            lambda: residual,
        )
        new = jnp.sqrt(jnp.maximum(residual, 0.0) / jnp.maximum(squared, 1e-30))
        return factors, new, jnp.abs(error - new), count + 1

    infinite = jnp.full((), jnp.inf, tensor.dtype)
    factors, _, _, count = jax.lax.while_loop(
        lambda carry: (carry[2] > tolerance) & (carry[3] < sweeps),
        sweep,
        (factors, infinite, infinite, jnp.zeros((), jnp.int32)),
    )
    factors = balance(factors)
    return factors, cp_info(tensor, factors, count)


def best_of(
    fits: Sequence[tuple[Factors, CPInfo]] | tuple[Factors, CPInfo],
) -> tuple[Factors, CPInfo]:
    """The fit of least error out of a batch made by ``jax.vmap`` over keys."""
    factors, info = fits
    index = jnp.nanargmin(info.relative_error)  # pyright: ignore[reportAttributeAccessIssue]
    return jax.tree.map(lambda leaf: leaf[index], (factors, info))


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
      rank: number of deflations, at least 1.
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
    check_rank(rank, 10**9, "cp_tpm")
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
