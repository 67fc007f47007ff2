"""CP decomposition by nonlinear least squares (Levenberg-Marquardt), as Lebedev et al. use it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.factorization.cp_factors import (
    CPInfo,
    Factors,
    balance,
    compose_cp,
    cp_info,
    gram_product,
    maximum_rank,
    mttkrp,
    random_factors,
)
from cnnjax.factorization.matrix import check_rank, matmul, working
from cnnjax.typing import AnyArray

DENSE_LIMIT = 3000  # unknowns up to which the normal matrix is formed and factored


def normal_product(factors: Sequence[Array], direction: Sequence[Array]) -> Factors:
    """``J^T J`` times a direction, block by block, without forming the Jacobian.

    With V the direction and Gamma the Hadamard products of Grams:
    ``out_n = V_n Gamma_n + sum_{m != n} F_n (Gamma_nm * (F_m^T V_m))^T``.
    """
    modes = range(len(factors))
    grams = [matmul(f.T, f) for f in factors]
    crossed = [matmul(f.T, v) for f, v in zip(factors, direction)]
    out = []
    for n in modes:
        block = matmul(direction[n], gram_product(grams, (n,)))
        for m in modes:
            if m != n:
                weight = gram_product(grams, (n, m)) * crossed[m]
                block = block + matmul(factors[n], weight.T)
        out.append(block)
    return out


def negative_gradient(tensor: Array, factors: Sequence[Array]) -> Factors:
    """``-d (||T - That||^2 / 2) / d F_n = MTTKRP_n - F_n Gamma_n``."""
    grams = [matmul(f.T, f) for f in factors]
    return [
        mttkrp(tensor, factors, n) - matmul(f, gram_product(grams, (n,)))
        for n, f in enumerate(factors)
    ]


@functools.partial(jax.jit, static_argnames=("rank", "steps", "tolerance", "solver", "cg_steps"))
def cp_nls(
    key: Array,
    tensor: Float[AnyArray, ...],
    rank: int,
    *,
    steps: int = 200,
    tolerance: float = 1e-12,
    solver: str = "auto",
    cg_steps: int = 50,
    start: Sequence[Float[AnyArray, "_ _"]] | None = None,
) -> tuple[Factors, CPInfo]:
    """CP by damped Gauss-Newton steps over all factors at once.

    Solves ``(J^T J + mu I) d = -grad``; a step that lowers the cost is taken and mu falls by 3,
    else mu grows by 4. Column norms are balanced after every accepted step. Where alternating
    least squares crawls through swamps, the joint steps do not.

    Args:
      key: random key of the start.
      tensor: N-way array.
      rank: R.
      steps: tried, at most.
      tolerance: stop when the gradient's norm falls below this share of ``||T||^2``, or the
        relative error below it.
      solver: ``"dense"`` (Cholesky of the normal matrix), ``"cg"`` (conjugate gradients with the
        same blocks), ``"auto"`` (dense up to 3,000 unknowns).
      cg_steps: conjugate-gradient iterations per step.
      start: factors to start from instead of random ones.

    Returns:
      (factors with balanced column norms, `CPInfo`).

    Reference:
      Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned
      CP-decomposition", ICLR 2015, arXiv 1412.6553.
    """
    tensor = working(tensor)
    check_rank(rank, maximum_rank(tensor.shape), "cp_nls")
    if solver not in ("auto", "dense", "cg"):
        raise ValueError(f"solver is {solver!r}; expected 'auto', 'dense' or 'cg'")
    unknowns = rank * sum(tensor.shape)
    dense = solver == "dense" or (solver == "auto" and unknowns <= DENSE_LIMIT)
    if start is None:
        factors = random_factors(key, tensor.shape, rank, tensor.dtype)
    else:
        factors = [working(f) for f in start]
    scale = jnp.sum(tensor**2)
    safe = jnp.where(scale > 0, scale, 1.0)

    def cost(factors):
        return 0.5 * jnp.sum((tensor - compose_cp(factors)) ** 2)

    def flat(blocks):
        return jnp.concatenate([b.reshape(-1) for b in blocks])

    def unflat(vector):
        out, position = [], 0
        for n in tensor.shape:
            out.append(vector[position : position + n * rank].reshape(n, rank))
            position += n * rank
        return out

    def direction(factors, gradient, mu):
        def product(vector):
            return flat(normal_product(factors, unflat(vector)))

        if dense:
            identity = jnp.eye(unknowns, dtype=tensor.dtype)
            # symmetric up to rounding; Cholesky reads one triangle only
            matrix = jax.vmap(product)(identity)
            factor = jax.scipy.linalg.cho_factor(matrix + mu * identity)
            return jax.scipy.linalg.cho_solve(factor, gradient)
        return jax.scipy.sparse.linalg.cg(
            lambda v: product(v) + mu * v, gradient, maxiter=cg_steps, tol=1e-6
        )[0]

    def step(carry):
        factors, value, gradient, mu, count = carry
        move = direction(factors, gradient, mu)
        proposal = [f + d for f, d in zip(factors, unflat(move))]
        new = cost(proposal)
        better = new < value  # False for NaN: a failed Cholesky only raises mu
        proposal = balance(proposal)
        factors = [jnp.where(better, p, f) for p, f in zip(proposal, factors)]
        gradient = flat(negative_gradient(tensor, factors))
        value = jnp.where(better, new, value)
        # below the scale of rounding the damping does nothing; above, nothing moves
        mu = jnp.clip(jnp.where(better, mu / 3, mu * 4), 1e-14 * safe, 1e14 * safe)
        return factors, value, gradient, mu, count + 1

    def unfinished(carry):
        _, value, gradient, mu, count = carry
        return (
            (count < steps)
            & (jnp.linalg.norm(gradient) > tolerance * safe)
            & (2 * value > tolerance**2 * safe)
            & (mu < 1e13 * safe)
        )

    factors = balance(factors)
    gradient = flat(negative_gradient(tensor, factors))
    carry = (factors, cost(factors), gradient, 1e-2 * safe, jnp.zeros((), jnp.int32))
    factors, _, _, _, count = jax.lax.while_loop(unfinished, step, carry)
    return factors, cp_info(tensor, factors, count)
