"""Separable spatial filters: Tai's closed form, and Jaderberg's scheme 1."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.factorization.cp import cp_als_together
from cnnjax.factorization.matrix import check_rank, einsum, svd_dense, working
from cnnjax.typing import AnyArray

Kernel = Float[AnyArray, "kh kw i o"]


def spatial_unfolding(kernel: Kernel) -> Float[Array, "ikh okw"]:
    """The matrix of rows (input, vertical tap) and columns (output, horizontal tap)."""
    kh, kw, i, o = kernel.shape
    return jnp.asarray(kernel).transpose(2, 0, 3, 1).reshape(i * kh, o * kw)


@functools.partial(jax.jit, static_argnames="rank")
def spatial_svd(
    kernel: Kernel, rank: int
) -> tuple[Float[Array, "kh 1 i r"], Float[Array, "1 kw r o"]]:
    """The best ``kh x 1`` then ``1 x kw`` pair with ``rank`` channels between (a closed form).

    Also the global optimum of Jaderberg's scheme 2 with filter reconstruction.

    Args:
      kernel: (kh, kw, i, o).
      rank: 1 to min(i*kh, o*kw); cheaper below ``kh kw i o / (kh i + kw o)``.

    Reference:
      Tai et al., "Convolutional neural networks with low-rank regularization", ICLR 2016,
      arXiv 1511.06067.
    """
    kh, kw, i, o = kernel.shape
    check_rank(rank, min(i * kh, o * kw), "spatial_svd")
    left, right = svd_dense(spatial_unfolding(working(kernel)), rank)
    vertical = left.reshape(i, kh, rank).transpose(1, 0, 2)[:, None]
    horizontal = right.reshape(rank, o, kw).transpose(2, 0, 1)[None]
    return vertical, horizontal


@jax.jit
def compose_spatial(
    vertical: Float[AnyArray, "kh 1 i r"], horizontal: Float[AnyArray, "1 kw r o"]
) -> Float[Array, "kh kw i o"]:
    """The kernel of the pair: the inverse map of `spatial_svd` at full rank."""
    return einsum("air,bro->abio", vertical[:, 0], horizontal[0])


@functools.partial(jax.jit, static_argnames=("rank", "restarts", "sweeps"))
def _scheme1(key, kernel, rank, restarts, sweeps):
    kh, kw, i, o = kernel.shape
    per_channel = kernel.transpose(2, 0, 1, 3)

    keys = jax.random.split(key, i * restarts)
    tensors = jnp.repeat(working(per_channel), restarts, axis=0)
    fits, info = cp_als_together(keys, tensors, rank, sweeps=sweeps)
    best = jnp.argmin(info.relative_error.reshape(i, restarts), axis=1)
    v, h, c = (fit.reshape(i, restarts, *fit.shape[1:])[jnp.arange(i), best] for fit in fits)
    return v.transpose(1, 0, 2), h.transpose(1, 0, 2), c.transpose(0, 2, 1)


def jaderberg_scheme1(
    key: Array, kernel: Kernel, rank: int, *, restarts: int = 4, sweeps: int = 200
) -> tuple[Float[Array, "kh i m"], Float[Array, "kw i m"], Float[Array, "i m o"]]:
    """``rank`` separable filters for each input channel, shared by all outputs.

    ``K[a,b,i,o] ~ sum_m v[a,i,m] h[b,i,m] c[i,m,o]``: per input channel the rank-m CP of
    (kh, kw, o), by alternating least squares, best of ``restarts``. With ``rank = kh * kw`` the
    taps themselves are a separable basis and the result is exact.

    Args:
      key: random key of the starts.
      kernel: (kh, kw, i, o).
      rank: m, 1 to kh*kw; cheaper below ``kh kw o / (kh + kw + o)``.
      restarts: random starts per channel.
      sweeps: of alternating least squares, at most.

    Reference:
      Jaderberg, Vedaldi, Zisserman, "Speeding up convolutional neural networks with low rank
      expansions", BMVC 2014, arXiv 1405.3866.
    """
    kh, kw, i, o = kernel.shape
    check_rank(rank, kh * kw, "jaderberg_scheme1")
    kernel = working(kernel)
    if rank == kh * kw:
        rows, columns = jnp.divmod(jnp.arange(rank), kw)
        v = jnp.broadcast_to(jax.nn.one_hot(rows, kh, axis=0)[:, None], (kh, i, rank))
        h = jnp.broadcast_to(jax.nn.one_hot(columns, kw, axis=0)[:, None], (kw, i, rank))
        c = kernel.reshape(rank, i, o).transpose(1, 0, 2)
        return v.astype(kernel.dtype), h.astype(kernel.dtype), c
    return _scheme1(key, kernel, rank, restarts, sweeps)


@jax.jit
def compose_scheme1(
    vertical: Float[AnyArray, "kh i m"],
    horizontal: Float[AnyArray, "kw i m"],
    mix: Float[AnyArray, "i m o"],
) -> Float[Array, "kh kw i o"]:
    """The kernel of scheme 1's factors."""
    return einsum("aim,bim,imo->abio", vertical, horizontal, mix)
