"""CP (canonical polyadic) decomposition by alternating least squares."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Sequence
from typing import Any

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
    random_factors,
)
from cnnjax.factorization.matrix import check_rank, einsum, matmul, svd_dense, working
from cnnjax.typing import AnyArray


def _fold(part: Array, factors: Sequence[Array], skip: int) -> Float[Array, "r n"]:
    """Multiplies the factors (r, n_k) into (r, n_0, n_1, ...) and sums over all but ``skip``."""
    letters = string.ascii_lowercase[: len(factors)]
    others = [m for m in range(len(factors)) if m != skip]
    if len(factors) == 2 and part[0].size <= 49:  # a few taps: no call of a product
        other = factors[1 - skip]
        return (part * jnp.expand_dims(other, 1 + skip)).sum(2 - skip)
    expression = f"z{letters}," + ",".join(f"z{letters[m]}" for m in others)
    expression += f"->z{letters[skip]}"
    return einsum(expression, part, *(factors[m] for m in others), optimize="optimal")


def _fold_leading(part: Array, leading: Sequence[Array]) -> Float[Array, "r n"]:
    """Multiplies the leading factors into (r, n_0, ..., n_k, n) and sums over all but (r, n)."""
    if not leading:
        return part
    rank = part.shape[0]
    weights = jnp.ones((rank, 1), part.dtype)
    for factor in leading:
        weights = (weights[:, :, None] * factor[:, None]).reshape(rank, -1)
    part = part.reshape(rank, weights.shape[1], -1)
    if weights.shape[1] > 49:
        return einsum("rsn,rs->rn", part, weights)
    # a few taps: one fused pass over the part
    taps = range(weights.shape[1])
    return functools.reduce(jnp.add, [part[:, s] * weights[:, s, None] for s in taps])


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
    ``F (Gamma + mu D) = MTTKRP + mu F_old D``, D the diagonal of Gamma; the damping leaves the
    fixed points where they are and makes the error non-increasing, swamps and rank-deficient Grams
    included. A matrix (at most two modes with more than one entry) gets its truncated SVD, whatever
    the start.

    Args:
      key: random key of the start.
      tensor: N-way array, N >= 2.
      rank: R, at least 1 and at most the product of all modes but the largest.
      sweeps: at most.
      tolerance: stop when the relative error changes less in a sweep.
      ridge: mu. Where it is too little for a Cholesky factor, ten times as much and at least five
        times the type's epsilon, from the start again.
      start: factors to start from instead of random ones.

    Returns:
      (factors with balanced column norms, `CPInfo`).

    Raises:
      ValueError: a rank out of range, a negative ridge.

    Reference:
      Kolda & Bader, "Tensor decompositions and applications", SIAM Review 51(3), 2009.
    """
    begun = None if start is None else [working(f) for f in start]
    # not a batch of one: LAPACK's triangular solves compile faster than batched ones
    return _als(lambda fn: fn, key, working(tensor), rank, sweeps, tolerance, ridge, begun)


@functools.partial(jax.jit, static_argnames=("rank", "sweeps", "tolerance", "ridge"))
def cp_als_together(
    keys: Array,
    tensors: Float[AnyArray, "b ..."],
    rank: int,
    *,
    sweeps: int = 100,
    tolerance: float = 1e-10,
    ridge: float = 1e-9,
    starts: Sequence[Float[AnyArray, "b _ _"]] | None = None,
) -> tuple[Factors, CPInfo]:
    """`cp_als` of several tensors of one shape side by side, until the last has converged.

    On small tensors most of the time goes into starting operations, which are shared here.

    Args:
      keys: (b,) random keys.
      tensors: (b, ...).
      rank: as for `cp_als`, like what follows.
      sweeps: at most.
      tolerance: of the slowest.
      ridge: see there.
      starts: factors (b, n_k, R).

    Returns:
      As `cp_als`, every leaf with a leading axis b.
    """
    tensors = working(tensors)
    begun = None if starts is None else [working(f) for f in starts]
    return _als(jax.vmap, keys, tensors, rank, sweeps, tolerance, ridge, begun)


def _als(
    each: Callable[..., Any],
    keys: Array,
    tensors: Array,
    rank: int,
    sweeps: int,
    tolerance: float,
    ridge: float,
    starts: Factors | None,
) -> tuple[Factors, CPInfo]:
    """`cp_als`; ``each`` makes a function of one tensor one of all that there are."""
    batch = jax.eval_shape(each(jnp.sum), tensors).ndim
    shape, dtype = tensors.shape[batch:], tensors.dtype
    check_rank(rank, maximum_rank(shape), "cp_als")
    if not ridge >= 0:
        raise ValueError(f"cp_als: ridge is {ridge}; expected a number that is not negative")
    if sum(n > 1 for n in shape) < 3:
        return each(functools.partial(_of_matrix, rank=rank))(tensors)
    factors = starts
    if factors is None:
        factors = each(lambda k: random_factors(k, shape, rank, dtype))(keys)
    squared = each(lambda t: jnp.sum(t**2))(tensors)
    eps = float(jnp.finfo(dtype).eps)
    floor = jnp.full((), ridge, dtype)
    cancelled = eps**0.5
    last = len(shape) - 1
    # two large products a sweep serve all modes: the tensor times the last factor for every mode
    # but the last, and times the last but one for the last. Unfoldings are laid out once, with the
    # summed mode in front: components in rows make every product read its arrays in order
    by_last = each(lambda t: jnp.moveaxis(t, -1, 0).reshape(shape[last], -1))(tensors)
    by_other = each(lambda t: jnp.moveaxis(t, -2, 0).reshape(shape[last - 1], -1))(tensors)

    def exact(tensor: Array, rows: Factors) -> Array:
        return jnp.sum((tensor - compose_cp([f.T for f in rows])) ** 2)

    def checked(residual: Array, rows: Factors, least: float) -> Array:
        # a small difference of large numbers is all rounding: then from the residual itself
        return jax.lax.cond(
            jnp.any(residual < least * squared),
            lambda: each(exact)(tensors, rows),
            lambda: residual,
        )

    def relative(residual: Array) -> Array:
        return jnp.sqrt(jnp.maximum(residual, 0.0) / jnp.maximum(squared, 1e-30))

    def step(carry: tuple[Any, ...], floor: Array) -> tuple[Any, ...]:
        rows, grams, error, _, count = carry
        sweep = functools.partial(_sweep, shape=shape, floor=floor)
        rows, grams, explained = each(sweep)(by_last, by_other, rows, grams)
        # the error from the last update's pieces: no rebuilding of the tensor
        residual = squared - explained
        if tolerance >= 0:  # else nobody looks at it between sweeps
            residual = checked(residual, rows, cancelled)
        new = relative(residual)
        return rows, grams, new, jnp.max(jnp.abs(error - new)), count + 1

    rows = [f.mT for f in factors]
    grams = [matmul(f, f.mT) for f in rows]
    infinite = jnp.full((), jnp.inf, dtype)
    begin = (rows, grams, jnp.full(squared.shape, jnp.inf, dtype), infinite, jnp.int32(0))

    def fit(floor: Array) -> tuple[Any, ...]:
        return jax.lax.while_loop(
            # no number is larger than anything: a sweep that failed is the last
            lambda carry: (carry[3] > tolerance) & (carry[4] < sweeps),
            functools.partial(step, floor=floor),
            begin,
        )

    # a Gram matrix that is singular to its own rounding has no Cholesky factor: damping that the
    # type resolves then
    (rows, grams, error, _, count), _ = jax.lax.while_loop(
        lambda tried: ~jnp.all(jnp.isfinite(tried[0][2])) & (tried[1] <= max(0.01, ridge)),
        lambda tried: (fit(tried[1]), jnp.maximum(10 * tried[1], 5 * eps)),
        (begin, floor),
    )
    # reported to four digits: the difference has them where the error is above a tenth
    error = relative(checked(error**2 * squared, rows, 0.01))
    norms = functools.reduce(jnp.multiply, [jnp.linalg.norm(f, axis=-1) for f in rows])
    scale = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
    count = jnp.broadcast_to(count, squared.shape)
    factors = each(balance)([f.mT for f in rows])
    return factors, CPInfo(error, count, norms.max(-1) / scale)


def _of_matrix(tensor: Array, rank: int) -> tuple[Factors, CPInfo]:
    """The truncated SVD, where at most two modes have more than one entry."""
    shape = tensor.shape
    rows, columns = sorted(sorted(range(len(shape)), key=lambda m: shape[m])[-2:])
    left, right = svd_dense(tensor.reshape(shape[rows], shape[columns]), rank)
    factors = [jnp.ones((n, rank), tensor.dtype) for n in shape]
    factors[rows], factors[columns] = left, right.T
    return balance(factors), cp_info(tensor, factors, 0)


def _sweep(
    by_last: Array,
    by_other: Array,
    rows: Sequence[Array],
    grams: Sequence[Array],
    *,
    shape: tuple[int, ...],
    floor: Array,
) -> tuple[Factors, list[Array], Array]:
    """One update of every mode (factors as (r, n_k)); also ``2 <T, That> - ||That||^2``."""
    rows, grams = list(rows), list(grams)
    last, rank = len(shape) - 1, rows[0].shape[0]
    identity = jnp.eye(rank, dtype=by_last.dtype)
    product = part = jnp.zeros_like(rows[last])
    small = None
    for mode in range(last + 1):
        if mode == last:
            # the last mode stands where the last but one was summed over
            part = matmul(rows[last - 1], by_other)
            part = part.reshape(rank, *shape[: last - 1], shape[last])
            product = _fold_leading(part, rows[: last - 1])
        elif mode == last - 1:
            if mode == 0:
                part = matmul(rows[last], by_last)
            product = _fold_leading(part, rows[: last - 1])
        else:
            if small is None:
                part = matmul(rows[last], by_last).reshape(rank, *shape[:last])
                # what the leading modes share: the last but one is not updated before them
                small = einsum("r...c,rc->r...", part, rows[last - 1])
            product = _fold(small, rows[: last - 1], mode) if last > 2 else small
        gamma = gram_product(grams, (mode,))
        # damped by the diagonal: it means the same however the components' scale is shared out
        damped = gamma * (1 + floor * identity) + jnp.finfo(gamma.dtype).tiny * identity
        solve = jax.scipy.linalg.cho_factor(damped, lower=True)
        right = product + floor * jnp.diagonal(gamma)[:, None] * rows[mode]
        if shape[mode] > rank:
            # many right-hand sides: triangular solves are slow, a product is not
            inverse = jax.scipy.linalg.cho_solve(solve, identity)
            rows[mode] = matmul(inverse, right)
            if rank >= 32:  # a large inverse has lost digits, which one refinement brings back
                rows[mode] += matmul(inverse, right - matmul(damped, rows[mode]))
        else:
            rows[mode] = jax.scipy.linalg.cho_solve(solve, right)
        grams[mode] = matmul(rows[mode], rows[mode].T)
    explained = 2 * jnp.sum(product * rows[last]) - functools.reduce(jnp.multiply, grams).sum()
    return rows, grams, explained
