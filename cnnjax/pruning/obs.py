"""Optimal brain surgeon: delete a weight, move all others to make up for it.

Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 5,
1992; Hassibi, Stork, Wolff, NIPS 6, 1993. Layer by layer on the second moment of a layer's inputs:
Dong, Chen, Pan, "Learning to prune deep neural networks via layer-wise optimal brain surgeon", NIPS
2017, arXiv 1705.07565; deletion paths of each unit with pooled costs: Frantar & Alistarh, "Optimal
brain compression", NeurIPS 2022, arXiv 2208.11580.

With ``H`` the Hessian and ``A`` its inverse, deleting ``w_q`` costs ``w_q^2 / (2 A_qq)`` and moves
the others by ``-(w_q / A_qq) A e_q``. Everything runs in the dtype of its input: float32 inverses
drift, so use float64 (`jax.enable_x64`) where it must be exact.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cnnjax.pruning.masks import check_sparsity

_HIGHEST = jax.lax.Precision.HIGHEST


def inverse_hessian(
    x: Float[Array, "p n"], alpha: float, weights: Float[Array, " p"] | None = None
) -> Float[Array, "n n"]:
    """Inverse of ``alpha I + (1/P) sum_k s_k x_k x_k^T`` by one rank-one update per pattern.

    Args:
      x: derivatives of the output by the weights, one row a pattern (for several outputs a row for
        each of them).
      alpha: between 1e-8 and 1e-4 of the data's scale; keeps a rank-deficient H invertible.
      weights: s, second derivatives of the loss by the output (1 for half the squared error).

    Raises:
      ValueError: alpha that is not positive; ``x`` that is no matrix with a row.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if jnp.ndim(x) != 2 or x.shape[0] < 1:
        raise ValueError(
            f"derivatives of shape {jnp.shape(x)}; expected (patterns, weights), one pattern at "
            "least"
        )
    p, n = x.shape
    s = jnp.ones(p, x.dtype) if weights is None else weights

    def add(a: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        v, scale = row
        av = jnp.matmul(a, v, precision=_HIGHEST)
        return a - scale * jnp.outer(av, av) / (p + scale * jnp.dot(v, av)), None

    return jax.lax.scan(add, jnp.eye(n, dtype=x.dtype) / alpha, (x, s))[0]


class Deletion(NamedTuple):
    """State of a sequence of deletions.

    Attributes:
      w: weights; deleted ones are exactly 0.
      inverse: of the Hessian of what is left; rows and columns of deleted weights are 0.
      alive: False for deleted weights.
      order: indices in order of deletion, -1 for those to come.
      costs: increase of the loss by each deletion.
    """

    w: Float[Array, " n"]
    inverse: Float[Array, "n n"]
    alive: Bool[Array, " n"]
    order: Int[Array, " k"]
    costs: Float[Array, " k"]


def _check_inverse(w: Any, inverse: Any) -> None:
    n = w.shape[0]
    if tuple(inverse.shape) != (n, n):
        raise ValueError(
            f"an inverse Hessian of shape {tuple(inverse.shape)} for {n} weights; expected {(n, n)}"
        )


def obs(w: Float[Array, " n"], inverse: Float[Array, "n1 n2"], count: int) -> Deletion:
    """Deletes ``count`` weights one after another, each time the cheapest, updating all others.

    Args:
      w: weights at (or near) a minimum.
      inverse: inverse Hessian, from `inverse_hessian` or any other.
      count: how many go, less than n.

    Returns:
      See `Deletion`; ``costs`` sum to the predicted increase of the loss.

    Raises:
      ValueError: an inverse of the wrong shape, or a count that empties the vector.
    """
    _check_inverse(w, inverse)
    if not 0 <= count < w.shape[0]:
        raise ValueError(f"count must lie in [0, {w.shape[0]}), got {count}")
    return _obs(w, inverse, count)


@functools.partial(jax.jit, static_argnums=2)
def _obs(w: Array, inverse: Array, count: int) -> Deletion:
    def step(carry: Any, _: Any) -> Any:
        w, a, alive = carry
        diagonal = jnp.diagonal(a)
        saliency = jnp.where(alive, jnp.square(w) / (2 * jnp.where(alive, diagonal, 1)), jnp.inf)
        q = jnp.argmin(saliency)
        column = a[:, q] / a[q, q]
        here = jnp.arange(w.size) == q
        w = jnp.where(here, 0, w - w[q] * column)
        a = a - jnp.outer(column, a[q])
        gone = here | ~alive
        a = jnp.where(gone[:, None] | gone[None], 0, a)
        w = jnp.where(gone, 0, w)
        return (w, a, ~gone), (q, saliency[q])

    start = (w, inverse, jnp.ones(w.shape, bool))
    (w, a, alive), (order, costs) = jax.lax.scan(step, start, None, count)
    return Deletion(w, a, alive, order, costs)


def obs_set(
    w: Float[Array, " n"], inverse: Float[Array, "n1 n2"], removed: Bool[Any, " n"]
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Deletes a set S at once: ``dw = -A E^T (E A E^T)^-1 w_S``.

    Args:
      w: weights.
      inverse: inverse Hessian.
      removed: True for S.

    Returns:
      ``(weights, cost)``, cost ``0.5 w_S^T (A_SS)^-1 w_S``.

    Raises:
      ValueError: an inverse or a set of the wrong shape.
    """
    _check_inverse(w, inverse)
    s = jnp.asarray(removed)
    if s.shape != w.shape:
        raise ValueError(f"a set of shape {s.shape} for {w.size} weights; expected {w.shape}")
    both = s[:, None] & s[None]
    # A_SS in the middle of an identity, so that shapes stay static
    block = jnp.where(both, inverse, jnp.eye(w.size, dtype=w.dtype))
    ws = jnp.where(s, w, 0)
    y = jnp.linalg.solve(block, ws)
    new = w - jnp.matmul(inverse, jnp.where(s, y, 0), precision=_HIGHEST)
    return jnp.where(s, 0, new), 0.5 * jnp.dot(ws, y, precision=_HIGHEST)


class LayerResult(NamedTuple):
    """What `layer_obs` returns.

    Attributes:
      w: corrected weights, (n, o); removed ones are exactly 0.
      mask: True where kept.
      cost: increase of ``0.5 E ||x w - x w0||^2`` summed over the units.
    """

    w: Float[Array, "n o"]
    mask: Bool[Array, "n o"]
    cost: Float[Array, ""]


def layer_obs(
    w: Float[Array, "n o"],
    hessian: Float[Array, "n1 n2"],
    sparsity: float,
    *,
    damping: float = 1e-4,
    block: int = 32,
    units_at_once: int | None = None,
    path_limit: float = 0.999,
) -> LayerResult:
    """Prunes a dense (or lowered convolution) layer so that its outputs change least.

    The Hessian ``E[x x^T]`` is shared by all units. Each unit is followed down its own path of
    deletions; the costs of all paths are pooled, so that ``ceil(sparsity * n * o)`` go where
    they cost least. The surviving weights are then the exact least-squares optimum of each unit
    (solved anew, not by the updates, which drift in float32).

    The path is blocked: `block` rank-one updates wait and are applied to the inverse as one matrix
    product.

    Args:
      w: kernel (n, o); for a convolution the (h, w, c)-rows.
      hessian: second moment of the inputs, `cnnjax.pruning.reconstruction.Moments` gives it.
      sparsity: fraction to remove, in [0, 1).
      damping: added to the diagonal, as a fraction of its mean.
      block: deletions between two updates of the inverse.
      units_at_once: units in one batch (memory n^2 each); None: one by one on a CPU, 16 elsewhere.
      path_limit: the largest fraction of one unit's inputs that may go (its path's length).

    Raises:
      ValueError: a Hessian of the wrong shape (says which is expected), or with NaN, or not
        positive definite (outside jit); a sparsity out of range or beyond ``path_limit``.
    """
    n, o = w.shape
    if tuple(hessian.shape) != (n, n):
        raise ValueError(
            f"a Hessian of shape {tuple(hessian.shape)} for a kernel of {n} inputs; expected "
            f"{(n, n)}, the second moment of the layer's inputs"
        )
    gone = math.ceil(Fraction(repr(check_sparsity(sparsity))) * n * o)
    length = min(n, math.ceil(path_limit * n))
    if gone > length * o:
        raise ValueError(f"sparsity {sparsity} needs longer paths than path_limit={path_limit}")
    if units_at_once is None:
        units_at_once = 1 if jax.default_backend() == "cpu" else 16
    length = -(-length // block) * block
    found = _layer_obs(w, hessian, gone, damping, block, length, units_at_once)
    if not isinstance(found.cost, jax.core.Tracer) and not jnp.isfinite(found.cost):
        raise ValueError(
            f"the result is not finite: the kernel or the Hessian has NaN, or the Hessian plus "
            f"damping={damping:g} of its mean diagonal is not positive definite. A second moment "
            "of the layer's inputs is; raise damping where rounding spoils it"
        )
    return found


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _layer_obs(
    w: Array, h: Array, gone: int, damping: float, block: int, length: int, at_once: int
) -> LayerResult:
    n, o = w.shape
    mean = jnp.mean(jnp.diagonal(h))
    ridge = damping * jnp.where(mean > 0, mean, 1)
    h = h + ridge * jnp.eye(n, dtype=h.dtype)
    factor = jax.scipy.linalg.cho_factor(h, lower=True)
    inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(n, dtype=h.dtype))
    inverse = 0.5 * (inverse + inverse.T)

    def path(unit: Array) -> tuple[Array, Array]:
        return _path(unit, inverse, block, length)

    def batched(fn: Any, xs: Any) -> Any:
        return jax.lax.map(fn, xs, batch_size=None if at_once == 1 else at_once)

    orders, costs = batched(path, w.T)
    # a path's costs in order: a later, cheaper deletion can't come before an earlier one
    keys = jax.lax.cummax(costs, axis=1)
    _, which = jax.lax.top_k(-keys.ravel(), gone)
    taken = jnp.zeros(o, jnp.int32).at[which // length].add(1)
    early = jnp.arange(length)[None] < taken[:, None]
    rows = jnp.broadcast_to(jnp.arange(o)[:, None], orders.shape)
    # deletions that aren't taken write outside, and are dropped
    keep = jnp.ones((o, n), bool).at[rows, jnp.where(early, orders, n)].set(False, mode="drop")
    target = jnp.matmul(h, w, precision=_HIGHEST).T

    def solve(args: tuple[Array, Array]) -> Array:
        alive, right = args
        both = alive[:, None] & alive[None]
        system = jnp.where(both, h, jnp.eye(n, dtype=h.dtype))
        f = jax.scipy.linalg.cho_factor(system, lower=True)
        return jnp.where(alive, jax.scipy.linalg.cho_solve(f, jnp.where(alive, right, 0)), 0)

    new = batched(solve, (keep, target)).T
    change = new - w
    cost = 0.5 * jnp.sum(change * jnp.matmul(h, change, precision=_HIGHEST))
    return LayerResult(new, keep.T, cost)


def _path(w: Array, a: Array, block: int, length: int) -> tuple[Array, Array]:
    """Deletion order of one unit and the cost of each step; deletions beyond n cost infinity."""
    n = w.size

    def outer(carry: Any, _: Any) -> Any:
        w, a, diagonal, alive = carry

        def inner(i: Any, state: Any) -> Any:
            w, diagonal, alive, u, order, costs = state
            safe = jnp.maximum(diagonal, jnp.finfo(w.dtype).tiny)
            saliency = jnp.where(alive, 0.5 * jnp.square(w) / safe, jnp.inf)
            q = jnp.argmin(saliency)
            # the row of the inverse as it is now: waiting updates subtracted
            column = a[q] - jnp.matmul(u[:, q], u, precision=_HIGHEST)
            pivot = jnp.maximum(column[q], jnp.finfo(w.dtype).tiny)
            w = w - (w[q] / pivot) * column
            scaled = jnp.where(alive, column / jnp.sqrt(pivot), 0)
            alive = alive & (jnp.arange(n) != q)
            return (
                jnp.where(alive, w, 0),
                diagonal - jnp.square(scaled),
                alive,
                u.at[i].set(scaled),
                order.at[i].set(q.astype(jnp.int32)),
                costs.at[i].set(saliency[q]),
            )

        start = (
            w,
            diagonal,
            alive,
            jnp.zeros((block, n), w.dtype),
            jnp.zeros(block, jnp.int32),
            jnp.zeros(block, w.dtype),
        )
        w, diagonal, alive, u, order, costs = jax.lax.fori_loop(0, block, inner, start)
        a = a - jnp.matmul(u.T, u, precision=_HIGHEST)
        # the exact diagonal of the updated inverse, not the running one
        return (w, a, jnp.diagonal(a), alive), (order, costs)

    start = (w, a, jnp.diagonal(a), jnp.ones(n, bool))
    _, (order, costs) = jax.lax.scan(outer, start, None, length // block)
    return order.ravel(), costs.ravel()


def second_moment(x: Float[Any, "p n"]) -> Float[np.ndarray, "n n"]:
    """``E[x x^T]`` on the host in float64; streamed data goes by `reconstruction.Moments`."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[0] < 1:
        raise ValueError(f"samples of shape {x.shape}; expected (samples, inputs), one at least")
    return x.T @ x / x.shape[0]
