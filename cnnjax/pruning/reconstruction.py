"""Channel selection by what the *next* layer computes, and least squares to make up for the loss.

He, Zhang, Sun, "Channel pruning for accelerating very deep neural networks", ICCV 2017, arXiv
1707.06168 (lasso); Luo, Wu, Lin, "ThiNet", ICCV 2017, arXiv 1707.06342.

Everything that either method needs of the data is in second moments: of the input patches ``X`` of
the next layer and of its original outputs ``Y`` (without bias). They accumulate on the device batch
by batch, with compensated sums, so the data is never held. With ``Z_i`` what channel i contributes
to the output, ``Q_ij = <Z_i, Z_j> / N`` and ``q_i = <Z_i, Y> / N`` follow from the moments and the
kernel; the lasso is over Q and q, and ThiNet's greedy search over Q (all locations and filters
count, not a sample of them).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST
Pairs = Sequence[tuple[int, int]]


def patches(
    x: Float[Array, "n h w c"],
    window: Sequence[int],
    *,
    strides: Sequence[int] = (1, 1),
    padding: str | Pairs = "SAME",
    dilation: Sequence[int] = (1, 1),
) -> Float[Array, "rows columns"]:
    """The lowered input of a convolution: rows are positions, columns (h, w, c) in kernel order.

    Args:
      x: activations.
      window: (kh, kw).
      strides: of the convolution.
      padding: of the convolution.
      dilation: of the kernel.
    """
    kh, kw = window
    spread = [(k - 1) * d + 1 for k, d in zip(window, dilation)]
    if isinstance(padding, str):
        pads: Any = jax.lax.padtype_to_pads(x.shape[1:3], spread, strides, padding)
    else:
        pads = padding
    x = jnp.pad(x, ((0, 0), *map(tuple, pads), (0, 0)))
    (sh, sw), (dh, dw) = strides, dilation
    ho, wo = (x.shape[1] - spread[0]) // sh + 1, (x.shape[2] - spread[1]) // sw + 1
    parts = [
        x[:, i * dh : i * dh + (ho - 1) * sh + 1 : sh, j * dw : j * dw + (wo - 1) * sw + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(parts, axis=-1).reshape(-1, kh * kw * x.shape[-1])


class Moments(NamedTuple):
    """Sums over rows, each as a pair (sum, what rounding lost of it).

    Attributes:
      gram: ``X^T X``.
      cross: ``X^T Y``.
      target: ``sum Y^2``.
      count: rows.
    """

    gram: tuple[Float[Array, "d d"], Float[Array, "d d"]]
    cross: tuple[Float[Array, "d o"], Float[Array, "d o"]]
    target: tuple[Float[Array, ""], Float[Array, ""]]
    count: Int[Array, ""]

    @classmethod
    def zeros(cls, columns: int, outputs: int, dtype: Any = jnp.float32) -> Moments:
        """Nothing added yet."""

        def pair(*shape: int) -> tuple[Array, Array]:
            return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

        return cls(pair(columns, columns), pair(columns, outputs), pair(), jnp.zeros((), jnp.int32))

    def add(self, x: Float[Array, "rows d"], y: Float[Array, "rows o"]) -> Moments:
        """With more rows of inputs and outputs; pure, jittable."""

        def more(pair: tuple[Array, Array], new: Array) -> tuple[Array, Array]:
            total, lost = pair
            # Knuth's two-sum: exact whatever is larger
            out = total + new
            back = out - total
            return out, lost + ((total - (out - back)) + (new - back))

        dtype = self.gram[0].dtype
        x, y = x.astype(dtype), y.astype(dtype)
        return Moments(
            more(self.gram, jnp.matmul(x.T, x, precision=_HIGHEST)),
            more(self.cross, jnp.matmul(x.T, y, precision=_HIGHEST)),
            more(self.target, jnp.sum(jnp.square(y))),
            self.count + x.shape[0],
        )

    def means(self) -> tuple[Float[Array, "d d"], Float[Array, "d o"], Float[Array, ""]]:
        """``(E[x x^T], E[x y^T], E[|y|^2])``."""
        n = jnp.maximum(self.count, 1).astype(self.gram[0].dtype)
        gram, cross, target = ((a + b) / n for a, b in (self.gram, self.cross, self.target))
        return gram, cross, target


def interaction(
    moments: Moments, kernel: Float[Array, "d o"], ids: Int[Any, " d"], channels: int
) -> tuple[Float[Array, "m m"], Float[Array, " m"]]:
    """``Q_ij = <Z_i, Z_j> / N`` and ``q_i = <Z_i, Y> / N`` of the channels.

    Args:
      moments: of the layer's inputs and original outputs.
      kernel: lowered, one row for each column of the patches.
      ids: the channel of each row, -1 for rows that always stay: their contribution is taken from
        the target.
      channels: how many.

    Returns:
      ``(Q, q)``.
    """
    gram, cross, _ = moments.means()
    ids = jnp.where(jnp.asarray(ids) < 0, channels, jnp.asarray(ids))
    product = gram * jnp.matmul(kernel, kernel.T, precision=_HIGHEST)
    total = jax.ops.segment_sum(product, ids, channels + 1)
    total = jax.ops.segment_sum(total.T, ids, channels + 1)
    q = jax.ops.segment_sum(jnp.sum(kernel * cross, axis=1), ids, channels + 1)
    return total[:channels, :channels], q[:channels] - total[:channels, channels]


@functools.partial(jax.jit, static_argnames=("sweeps",))
def lasso(
    gram: Float[Array, "m m"],
    q: Float[Array, " m"],
    strength: Any,
    *,
    start: Float[Array, " m"] | None = None,
    sweeps: int = 200,
) -> Float[Array, " m"]:
    """``min 0.5 b^T Q b - q^T b + strength |b|_1`` by cyclic coordinate descent.

    Args:
      gram: Q.
      q: q.
      strength: lambda.
      start: warm start.
      sweeps: at most so many passes over the coordinates; stops when nothing moves any more.
    """
    m = q.shape[0]
    diagonal = jnp.diagonal(gram)
    start = jnp.zeros_like(q) if start is None else start
    scale = jnp.max(jnp.abs(q)) / jnp.maximum(jnp.max(diagonal), jnp.finfo(q.dtype).tiny)

    def coordinate(i: Any, state: Any) -> Any:
        b, residual = state  # residual = q - Q b
        rho = residual[i] + diagonal[i] * b[i]
        soft = jnp.sign(rho) * jnp.maximum(jnp.abs(rho) - strength, 0)
        new = jnp.where(diagonal[i] > 0, soft / jnp.where(diagonal[i] > 0, diagonal[i], 1), 0)
        return b.at[i].set(new), residual - gram[:, i] * (new - b[i])

    def sweep(state: Any) -> Any:
        k, b, _ = state
        # the residual anew in each sweep, so that rounding doesn't pile up
        residual = q - jnp.matmul(gram, b, precision=_HIGHEST)
        new, _ = jax.lax.fori_loop(0, m, coordinate, (b, residual))
        return k + 1, new, jnp.max(jnp.abs(new - b))

    def go(state: Any) -> Any:
        k, _, moved = state
        return (k < sweeps) & (moved > 4 * jnp.finfo(q.dtype).eps * scale)

    first = (jnp.int32(0), start, jnp.asarray(jnp.inf, q.dtype))
    return jax.lax.while_loop(go, sweep, first)[1]


def lasso_select(
    gram: Float[Array, "m m"], q: Float[Array, " m"], keep: int, *, halvings: int = 30
) -> Float[Array, " m"]:
    """The lasso at the smallest strength that leaves at most ``keep`` channels.

    Channels are first scaled to contributions of unit size (the paper: ``||W_i|| = 1``). The
    strength is bisected; where it jumps over ``keep`` fewer channels are left.

    Args:
      gram: Q.
      q: q.
      keep: c', at least 1 and at most the number of channels.
      halvings: steps of the bisection.

    Returns:
      beta of the unscaled channels, 0 for those that go.

    Raises:
      ValueError: ``keep`` out of range.
    """
    if not 1 <= keep <= q.shape[0]:
        raise ValueError(f"keep must lie in [1, {q.shape[0]}], got {keep}")
    return _lasso_select(gram, q, keep, halvings)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _lasso_select(gram: Array, q: Array, keep: int, halvings: int) -> Array:
    size = jnp.sqrt(jnp.diagonal(gram))
    inverse = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    gram, q = gram * inverse[:, None] * inverse[None], q * inverse

    def fits(b: Array) -> Array:
        return jnp.sum(b != 0) <= keep

    dense = lasso(gram, q, 0.0)

    def halve(_: Any, state: Any) -> Any:
        low, high, warm, best = state
        mid = 0.5 * (low + high)
        b = lasso(gram, q, mid, start=warm)
        ok = fits(b)
        return jnp.where(ok, low, mid), jnp.where(ok, mid, high), b, jnp.where(ok, b, best)

    top = jnp.max(jnp.abs(q))
    state = (jnp.zeros_like(top), top, dense, jnp.zeros_like(q))
    best = jax.lax.fori_loop(0, halvings, halve, state)[3]
    return jnp.where(fits(dense), dense, best) * inverse


@jax.jit
def thinet_order(gram: Float[Array, "m m"]) -> Int[Array, " m"]:
    """ThiNet's greedy order of removal: each time the channel that adds least to the error.

    The error of removing T is ``E (sum_(c in T) x_c)^2 = 1_T^T Q 1_T``.

    Args:
      gram: Q.

    Returns:
      Channels in order of removal.
    """
    diagonal = jnp.diagonal(gram)

    def remove(state: Any, _: Any) -> Any:
        together, alive = state  # Q 1_T
        error = jnp.where(alive, 2 * together + diagonal, jnp.inf)
        c = jnp.argmin(error)
        return (together + gram[:, c], alive.at[c].set(False)), c.astype(jnp.int32)

    start = (jnp.zeros_like(diagonal), jnp.ones(diagonal.shape, bool))
    return jax.lax.scan(remove, start, None, diagonal.shape[0])[1]


def channel_scale(
    gram: Float[Array, "m m"], keep: Bool[Any, " m"], *, ridge: float = 1e-6
) -> Float[Array, " m"]:
    """ThiNet's factors of the kept channels: least squares of the full sum on their contributions.

    Args:
      gram: Q.
      keep: True where kept.
      ridge: relative to the scaled diagonal.

    Returns:
      Factors, 0 where removed; fold them into the kernel.
    """
    keep = jnp.asarray(keep)
    return _solve(gram, jnp.sum(gram, axis=1)[:, None], keep, ridge)[:, 0]


def least_squares(
    moments: Moments, keep: Bool[Any, " d"] | None = None, *, ridge: float = 1e-6
) -> Float[Array, "d o"]:
    """The kernel that reproduces the original outputs best from the kept columns.

    The normal equations are scaled to a unit diagonal, a small ridge is added (duplicated or dead
    columns then share, or get nothing; where the factorization still fails, ten times as much), and
    the Cholesky solution is refined once.

    Args:
      moments: of inputs and target outputs.
      keep: True for columns that may be used; None: all.
      ridge: relative to the scaled diagonal.

    Returns:
      (d, o), zero rows where not kept.

    Raises:
      ValueError: fewer rows than unknowns (says how many are missing).
    """
    gram, cross, _ = moments.means()
    keep = jnp.ones(gram.shape[0], bool) if keep is None else jnp.asarray(keep)
    unknowns, rows = int(jnp.sum(keep)), int(moments.count)
    if rows < unknowns:
        raise ValueError(
            f"too few samples for the least squares: {unknowns} unknowns of each output need at "
            f"least as many positions, got {rows}; add {unknowns - rows} or more"
        )
    return _solve(gram, cross, keep, ridge)


@functools.partial(jax.jit, static_argnums=3)
def _solve(gram: Array, cross: Array, keep: Array, ridge: float) -> Array:
    diagonal = jnp.diagonal(gram)
    use = keep & (diagonal > 0)
    scale = jnp.where(use, 1 / jnp.sqrt(jnp.where(use, diagonal, 1)), 0)
    scaled = gram * scale[:, None] * scale[None]
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    right = cross * scale[:, None]

    def factorized(ridge: Any) -> Array:
        # removed columns: the identity, so that shapes stay static
        system = scaled + jnp.where(use, ridge, 1.0) * eye
        return jax.scipy.linalg.cho_factor(system, lower=True)[0]

    # rank-deficient columns: rounding can make the matrix indefinite by more than a small ridge
    _, factor = jax.lax.while_loop(
        lambda state: ~jnp.all(jnp.isfinite(state[1])) & (state[0] < 0.1),
        lambda state: (10 * state[0], factorized(10 * state[0])),
        (jnp.asarray(ridge, gram.dtype), factorized(ridge)),
    )
    w = jax.scipy.linalg.cho_solve((factor, True), right)
    left = right - jnp.matmul(scaled, w, precision=_HIGHEST)
    # iterated ridge: the second step takes most of the ridge's bias away
    w = w + jax.scipy.linalg.cho_solve((factor, True), jnp.where(use[:, None], left, 0))
    return w * scale[:, None]


def error(moments: Moments, kernel: Float[Array, "d o"]) -> Float[Array, ""]:
    """``E ||y - x W||^2`` of a lowered kernel, from the moments."""
    gram, cross, target = moments.means()
    fit = jnp.sum(kernel * jnp.matmul(gram, kernel, precision=_HIGHEST))
    return target - 2 * jnp.sum(kernel * cross) + fit
