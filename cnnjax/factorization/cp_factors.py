"""CP (canonical polyadic) factors: their algebra, and how well they fit.

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

from cnnjax.factorization.matrix import einsum
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


def best_of(
    fits: Sequence[tuple[Factors, CPInfo]] | tuple[Factors, CPInfo],
) -> tuple[Factors, CPInfo]:
    """The fit of least error out of a batch made by ``jax.vmap`` over keys."""
    factors, info = fits
    index = jnp.nanargmin(info.relative_error)  # pyright: ignore[reportAttributeAccessIssue]
    return jax.tree.map(lambda leaf: leaf[index], (factors, info))
