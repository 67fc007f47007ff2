"""One-dimensional k-means at network scale (Lloyd's iterations on sorted values).

In one dimension a cluster is an interval, so an iteration needs only the k-1 boundaries' positions
among the sorted values (binary search) and sums between positions (differences of prefix sums):
O(k log n) instead of O(k n). Very long vectors are first binned.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Init = str  # "linear", "density" or "random"
EXACT_LIMIT = 1 << 22  # values sorted exactly; beyond, binned
BINS = 1 << 17
_SPLITS = 8  # rounds of splitting


def _points(values: np.ndarray, bins: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Sorted points and their weights: the values themselves, or the means of fine bins."""
    if bins is None:
        if jax.default_backend() == "cpu":
            # NumPy's vectorised sort; XLA's on CPU is about 7 times slower
            ordered = np.sort(values)
        else:
            ordered = np.asarray(jnp.sort(values))
        return ordered, np.ones(len(ordered), np.int32)
    low, high = float(values.min()), float(values.max())
    scale = (bins - 1) / max(high - low, np.finfo(np.float32).tiny)
    count = np.zeros(bins, np.int64)
    total = np.zeros(bins)
    for at in range(0, len(values), 1 << 20):
        part = values[at : at + (1 << 20)].astype(np.float64)
        index = ((part - low) * scale).astype(np.int64)
        count += np.bincount(index, minlength=bins)
        total += np.bincount(index, weights=part, minlength=bins)
    used = count > 0
    return (total[used] / count[used]).astype(np.float32), count[used].astype(np.int32)


def initial(
    points: np.ndarray, weights: np.ndarray, k: int, init: Init, key: Any = None
) -> np.ndarray:
    """(k,) sorted starting centroids of sorted weighted points (see `fit`)."""
    if init == "linear":
        return np.linspace(points[0], points[-1], k, dtype=np.float32)
    cumulative = np.cumsum(weights, dtype=np.int64)
    if init == "density":
        wanted = (np.arange(k) + 0.5) / k * cumulative[-1]
    elif init == "random":
        if key is None:
            raise ValueError("init='random' needs an explicit key=jax.random.key(...)")
        wanted = np.asarray(jax.random.uniform(key, (k,)), np.float64) * cumulative[-1]
    else:
        raise ValueError(f"init must be 'linear', 'density' or 'random', got {init!r}")
    at = np.minimum(np.searchsorted(cumulative, wanted, side="right"), len(points) - 1)
    return np.sort(points[at]).astype(np.float32)


@functools.partial(jax.jit, static_argnames="iterations")
def lloyd(
    points: Float[Array, " m"],
    weights: Int[Array, " m"],
    centroids: Float[Array, " k"],
    *,
    iterations: int = 1000,
    tolerance: Float[Array, ""] | float = 0.0,
) -> tuple[Float[Array, " k"], Int[Array, ""]]:
    """Lloyd's iterations on sorted, weighted points.

    Args:
      points: ascending; padding goes at the end with weight 0.
      weights: how often each point occurs.
      centroids: ascending start.
      iterations: at most this many.
      tolerance: stop when no centroid moves by more than this.

    Returns:
      ascending centroids (an empty cluster keeps its own), and the iterations done.
    """
    count = jnp.concatenate([jnp.zeros(1, weights.dtype), jnp.cumsum(weights)])
    # Sums run from both ends towards zero: the few large weights far out never meet a large total,
    # so float32 suffices at 1e8 values.
    mass = points * weights
    zero = jnp.zeros(1, points.dtype)
    up = jnp.concatenate([zero, jnp.cumsum(jnp.minimum(mass, 0.0))])
    down = jnp.concatenate([jnp.cumsum(jnp.maximum(mass, 0.0)[::-1])[::-1], zero])

    def move(centroids):
        middle = (centroids[1:] + centroids[:-1]) / 2
        cut = jnp.searchsorted(points, middle, side="right", method="scan_unrolled")
        edge = jnp.concatenate([jnp.zeros(1, cut.dtype), cut, jnp.full(1, len(points), cut.dtype)])
        n = jnp.diff(count[edge])
        total = jnp.diff(up[edge]) - jnp.diff(down[edge])
        return jnp.where(n > 0, total / jnp.maximum(n, 1), centroids)

    def step(state):
        _, old, done = state
        return old, move(old), done + 1

    def going(state):
        before, now, done = state
        return (done < iterations) & (jnp.max(jnp.abs(now - before)) > tolerance)

    first = (centroids + jnp.inf, centroids, jnp.zeros((), jnp.int32))
    _, centroids, done = jax.lax.while_loop(going, step, first)
    # rounding may swap two centroids that coincide
    return jnp.sort(centroids), done


def fit(
    values: Any,
    k: int,
    *,
    init: Init = "linear",
    iterations: int = 1000,
    tolerance: float = 1e-6,
    bins: int | None = None,
    empty: str = "split",
    key: Any = None,
) -> np.ndarray:
    """Clusters values into at most ``k`` centroids that minimise the within-cluster squares.

    Args:
      values: any shape, finite; ravelled.
      k: number of clusters, at least 1.
      init: "linear" between minimum and maximum (the paper's choice: it represents large weights),
        "density" (equal counts) or "random" (values drawn with ``key``).
      iterations: Lloyd iterations at most.
      tolerance: stop when no centroid moves by more than this part of the values' range.
      empty: what becomes of clusters that end up empty: "split" lets them split the clusters of the
        largest inertia and iterates on (the objective only falls), "keep" leaves their centroids.
      bins: None sorts exactly up to 4M values and bins beyond; a number bins into that many.
      key: PRNG key of the random initialisation.

    Returns:
      ascending float32 centroids: ``k`` of them, or the distinct values when there are no more than
      ``k`` of those (the clustering is then lossless).

    Raises:
      ValueError: for ``k`` below 1, no values, or NaN and infinity among them.
    """
    flat = np.asarray(values, np.float32).reshape(-1)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if empty not in ("split", "keep"):
        raise ValueError(f"empty must be 'split' or 'keep', got {empty!r}")
    if not flat.size:
        raise ValueError("no values to cluster")
    if not np.isfinite(flat.min()) or not np.isfinite(flat.max()):
        raise ValueError("the values hold NaN or infinity; only finite weights can be clustered")
    if bins is None and len(flat) > EXACT_LIMIT:
        bins = BINS
    if bins is not None and (distinct := _few_distinct(flat, k)) is not None:
        return distinct
    points, weights = _points(flat, bins)
    if bins is None:
        new = np.flatnonzero(np.diff(points)) + 1
        if len(new) < k:
            return points[np.concatenate([[0], new])] + np.float32(0)
    start = initial(points, weights, k, init, key)
    pad = _room(len(points)) - len(points)
    points = np.pad(points, (0, pad), mode="edge")
    weights = np.pad(weights, (0, pad))
    limit = jnp.float32(tolerance) * np.float32(points[-1] - points[0])
    on_device = jnp.asarray(points), jnp.asarray(weights)
    for _ in range(_SPLITS if empty == "split" else 1):
        found, _ = lloyd(*on_device, jnp.asarray(start), iterations=iterations, tolerance=limit)
        found = np.asarray(found)
        start = _split(points, weights, found)
        if start is None:
            break
    return found


def _split(points: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> np.ndarray | None:
    """Centroids whose empty clusters split those of the largest inertia; None if none is empty."""
    middle = (centroids[1:] + centroids[:-1]) / 2
    edge = np.concatenate([[0], np.searchsorted(points, middle, side="right"), [len(points)]])
    total = np.concatenate([[0], np.cumsum(weights, dtype=np.int64)])
    count = np.diff(total[edge])
    gone = np.flatnonzero(count == 0)
    if not len(gone):
        return None
    x = points.astype(np.float64)
    first = np.diff(np.concatenate([[0], np.cumsum(x * weights)])[edge])
    second = np.diff(np.concatenate([[0], np.cumsum(x * x * weights)])[edge])
    mean = first / np.maximum(count, 1)
    spread = np.where(count > 1, np.maximum(second - first * mean, 0), 0)
    widest = np.argsort(-spread, kind="stable")[: len(gone)]
    gone = gone[spread[widest] > 0] if len(widest) == len(gone) else gone[: len(widest)]
    widest = widest[spread[widest] > 0]
    if not len(widest):
        return None
    out = centroids.astype(np.float64)
    out[gone[: len(widest)]] = mean[widest] + np.sqrt(spread[widest] / count[widest])
    return np.sort(out).astype(np.float32)


def _few_distinct(flat: np.ndarray, k: int) -> np.ndarray | None:
    """The distinct values if there are at most ``k``, decided early on a sample."""
    if len(np.unique(flat[: 4 * k + 1024])) > k:
        return None
    distinct = np.unique(flat)
    return distinct + np.float32(0) if len(distinct) <= k else None


def _room(n: int) -> int:
    """The next power of four, at least 4096: one compilation per such size, not per layer."""
    return max(1 << 12, 1 << 2 * (-(-(n - 1).bit_length() // 2)))


def _boundaries_below(middle: Any, values: Any) -> Any:
    method = "compare_all" if len(middle) < 64 else "scan_unrolled"
    return jnp.searchsorted(middle, values, side="left", method=method).astype(jnp.int32)


_compiled = jax.jit(_boundaries_below)


def assign(values: Any, centroids: Any) -> np.ndarray:
    """The index of the nearest centroid (ties to the lower one).

    Args:
      values: (n,) float32.
      centroids: (k,) ascending.

    Returns:
      (n,) int32.
    """
    values, centroids = np.asarray(values, np.float32), np.asarray(centroids, np.float32)
    middle = (centroids[1:] + centroids[:-1]) / 2
    if len(values) <= 1 << 12:
        return np.searchsorted(middle, values).astype(np.int32)
    out = np.empty(len(values), np.int32)
    chunk = min(_room(len(values)), 1 << 22)
    for at in range(0, len(values), chunk):
        part = values[at : at + chunk]
        full = part if len(part) == chunk else np.pad(part, (0, chunk - len(part)))
        out[at : at + chunk] = np.asarray(_compiled(middle, full))[: len(part)]
    return out


def inertia(values: Any, centroids: Any) -> float:
    """Sum of squared distances to the nearest centroid, in float64 on the host."""
    flat = np.asarray(values, np.float64).reshape(-1)
    centroids = np.sort(np.asarray(centroids, np.float64))
    middle = (centroids[1:] + centroids[:-1]) / 2
    total = 0.0
    for at in range(0, len(flat), 1 << 20):
        part = flat[at : at + (1 << 20)]
        total += float(np.square(part - centroids[np.searchsorted(middle, part)]).sum())
    return total
