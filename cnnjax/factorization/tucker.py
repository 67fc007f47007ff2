"""Tucker decompositions: HOSVD, HOOI, and Tucker-2 of a convolution kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.factorization.matrix import check_rank, einsum, matmul, working
from cnnjax.typing import AnyArray


class Tucker2Factors(NamedTuple):
    """``K[a,b,i,o] ~ sum C[a,b,p,q] A[i,p] B[o,q]`` with orthonormal A and B."""

    first: Array  # A (i, r3)
    core: Array  # C (kh, kw, r3, r4)
    last: Array  # B (o, r4)


def unfold(tensor: Float[AnyArray, ...], mode: int) -> Float[Array, "n m"]:
    """Mode-n unfolding: rows of mode ``mode``, columns of the others in C order."""
    moved = jnp.moveaxis(jnp.asarray(tensor), mode, 0)
    return moved.reshape(moved.shape[0], -1)


def _leading(matrix: Array, rank: int) -> Array:
    """The ``rank`` leading left singular vectors, from the Gram matrix of the shorter side.

    An orthonormal basis whatever the conditioning, which is all that a Tucker factor needs; past
    the matrix's own rank any completion does.
    """
    n, m = matrix.shape
    if n <= m:
        _, vectors = jnp.linalg.eigh(matmul(matrix, matrix.T))
        return vectors[:, ::-1][:, :rank]
    _, vectors = jnp.linalg.eigh(matmul(matrix.T, matrix))
    return _orthonormal(matmul(matrix, vectors[:, ::-1][:, :rank]), rank)


def _orthonormal(columns: Array, rank: int) -> Array:
    """``rank`` orthonormal columns whose first ones span what ``columns`` do."""
    more = jnp.eye(len(columns), rank - columns.shape[1], dtype=columns.dtype)
    return jnp.linalg.qr(jnp.concatenate([columns, more], axis=1))[0]


def _nearer(matrix: Array, basis: Array) -> Array:
    """One step of orthogonal iteration towards the leading left singular vectors.

    A product and a QR decomposition in place of an eigenvalue problem; the norm of what the basis
    keeps of the matrix never falls.
    """
    return jnp.linalg.qr(matmul(matrix, matmul(basis.T, matrix).T))[0]


def _project(tensor: Array, factor: Array, mode: int) -> Array:
    """Multiplies ``factor^T`` into one mode."""
    return jnp.moveaxis(
        jnp.tensordot(tensor, factor, axes=([mode], [0]), precision="highest"), -1, mode
    )


@functools.partial(jax.jit, static_argnames=("ranks", "sweeps", "tolerance"))
def tucker_hooi(
    tensor: Float[AnyArray, ...],
    ranks: tuple[int, ...],
    sweeps: int = 50,
    tolerance: float = 1e-8,
) -> tuple[Float[Array, ...], list[Array]]:
    """Tucker decomposition by higher-order orthogonal iteration from the HOSVD.

    Args:
      tensor: N-way array.
      ranks: one per mode; 1 to the mode's size.
      sweeps: at most; 0 gives the truncated HOSVD.
      tolerance: stop when the relative core norm changes less.

    Returns:
      (core of shape ``ranks``, factors (n_k, r_k) with orthonormal columns). The squared error is
      ``||tensor||^2 - ||core||^2``.

    Reference:
      De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21(4), 2000.
    """
    tensor = working(tensor)
    if len(ranks) != tensor.ndim:
        raise ValueError(f"{len(ranks)} ranks for a tensor of {tensor.ndim} modes")
    for mode, rank in enumerate(ranks):
        check_rank(rank, tensor.shape[mode], f"tucker_hooi mode {mode}")
    factors = [_leading(unfold(tensor, m), r) for m, r in enumerate(ranks)]

    def core_of(factors):
        core = tensor
        for mode, factor in enumerate(factors):
            core = _project(core, factor, mode)
        return core

    def sweep(carry):
        factors, norm, _, count = carry
        factors = list(factors)
        for mode, rank in enumerate(ranks):
            partial = tensor
            for other, factor in enumerate(factors):
                if other != mode:
                    partial = _project(partial, factor, other)
            factors[mode] = _leading(unfold(partial, mode), rank)
        new = jnp.linalg.norm(core_of(factors))
        return factors, new, jnp.abs(new - norm) / jnp.maximum(new, 1e-30), count + 1

    start = (factors, jnp.linalg.norm(core_of(factors)), jnp.inf, 0)
    start = jax.tree.map(jnp.asarray, start)
    start = (start[0], start[1], start[2].astype(tensor.dtype), start[3])
    factors, *_ = jax.lax.while_loop(
        lambda carry: (carry[2] > tolerance) & (carry[3] < sweeps), sweep, start
    )
    return core_of(factors), factors


@jax.jit
def compose_tucker(
    core: Float[AnyArray, ...], factors: Sequence[Float[AnyArray, "_ _"]]
) -> Float[Array, ...]:
    """The full tensor of a Tucker decomposition."""
    out = jnp.asarray(core)
    for mode, factor in enumerate(factors):
        out = _project(out, jnp.asarray(factor).T, mode)
    return out


@functools.partial(jax.jit, static_argnames=("in_rank", "out_rank", "sweeps"))
def tucker2(
    kernel: Float[AnyArray, "kh kw i o"], in_rank: int, out_rank: int, sweeps: int = 10
) -> Tucker2Factors:
    """Tucker-2: compresses the input and output modes, leaves the spatial ones alone.

    Args:
      kernel: (kh, kw, i, o).
      in_rank: r3, 1 to i.
      out_rank: r4, 1 to o.
      sweeps: of HOOI from the truncated HOSVD. Every second solves both eigenvalue problems; the
        others go one step of orthogonal iteration towards the solutions, which also mends the
        rounding of the squared matrices. A 1x1 kernel is a matrix, for which the HOSVD is the
        optimum: no sweeps.

    Returns:
      Orthonormal A (i, r3) and B (o, r4), core (kh, kw, r3, r4).

    Reference:
      Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile
      applications", ICLR 2016, arXiv 1511.06530.
    """
    kernel = working(kernel)
    _, _, i, o = kernel.shape
    check_rank(in_rank, i, "tucker2 input")
    check_rank(out_rank, o, "tucker2 output")
    if kernel.shape[:2] == (1, 1):
        a, b = _of_matrix(kernel[0, 0], in_rank, out_rank)
        return Tucker2Factors(a, matmul(matmul(a.T, kernel), b), b)
    a = _leading(unfold(kernel, 2), in_rank)
    b = _leading(unfold(kernel, 3), out_rank)

    rows, columns = unfold(kernel, 2), unfold(kernel, 3)  # (i, kh*kw*o), (o, kh*kw*i)

    def sweep(factors, towards):
        a, b = factors
        a = towards(matmul(rows.reshape(-1, o), b).reshape(i, -1), a)
        b = towards(matmul(columns.reshape(-1, i), a).reshape(o, -1), b)
        return a, b

    def exact(factors):
        return sweep(factors, lambda matrix, basis: _leading(matrix, basis.shape[1]))

    def pair(_, factors):
        return sweep(exact(factors), _nearer)

    if in_rank < i and out_rank < o:
        if sweeps % 2:
            a, b = exact((a, b))
        a, b = jax.lax.fori_loop(0, sweeps // 2, pair, (a, b))
    # one mode at full rank: the other's HOSVD factor is optimal already
    core = einsum("abio,ip,oq->abpq", kernel, a, b)
    return Tucker2Factors(a, core, b)


def _of_matrix(matrix: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """Leading left and right singular vectors, completed past the shorter side."""
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    shorter = min(matrix.shape)
    left = u[:, :rows] if rows <= shorter else _orthonormal(u, rows)
    right = vt[:columns].T if columns <= shorter else _orthonormal(vt.T, columns)
    return left, right


@jax.jit
def compose_tucker2(factors: Tucker2Factors) -> Float[Array, "kh kw i o"]:
    """The kernel of Tucker-2 factors."""
    return einsum("abpq,ip,oq->abio", factors.core, factors.first, factors.last)
