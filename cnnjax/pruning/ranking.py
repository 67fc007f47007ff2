"""The lowest of many scores, exactly so many of them, in one program.

The cut is found by bisection over the bits of the scores: reductions only, so it runs unchanged on
sharded arrays, inside ``jit``, and with a number of removals that is itself traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def prune_smallest(
    scores: Sequence[Array], counts: Int[Array, " pools"], pools: tuple[int, ...]
) -> list[Bool[Array, ...]]:
    """Removes exactly ``counts[p]`` of the lowest scores of each pool of arrays; jittable.

    Args:
      scores: arrays of any shape.
      counts: how many to remove from each pool (traced or not), at most its size.
      pools: the pool of each array: arrays of one pool compete with one another.

    Returns:
      For each array, True where a score is kept. Of equal scores the lower index is kept.
    """
    keys = [_sortable(s) for s in scores]
    bits = max(k.dtype.itemsize for k in keys) * 8
    kind = jnp.uint64 if bits == 64 else jnp.uint32
    keys = [k.astype(kind) for k in keys]
    index = np.asarray(pools)

    def total(per_array: Sequence[Array]) -> Array:
        return jax.ops.segment_sum(jnp.stack(per_array), index, counts.shape[0])

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        mid = low + (high - low) // 2
        below = total([jnp.sum(k <= mid[p], dtype=jnp.int32) for k, p in zip(keys, pools)])
        enough = below >= counts
        return jnp.where(enough, low, mid + 1), jnp.where(enough, mid, high)

    low = jnp.zeros(counts.shape, kind)
    high = jnp.full(counts.shape, np.iinfo(kind).max, kind)
    # the cut is the counts-th smallest key: the largest that may go
    _, cut = jax.lax.fori_loop(0, bits, halve, (low, high))
    less = total([jnp.sum(k < cut[p], dtype=jnp.int32) for k, p in zip(keys, pools)])
    ties = [jnp.sum(k == cut[p], dtype=jnp.int32) for k, p in zip(keys, pools)]
    kept_ties = total(ties) - (counts - less)

    def without_ties() -> list[Array]:
        return [k > cut[p] for k, p in zip(keys, pools)]

    def with_ties() -> list[Array]:
        # one running count over all arrays: a scan per array would compile for ages
        flags = [(k == cut[p]).ravel() for k, p in zip(keys, pools)]
        running = jnp.cumsum(jnp.concatenate(flags), dtype=jnp.int32)
        seen = [jnp.int32(0)] * counts.shape[0]
        start, before, out = 0, jnp.int32(0), []
        for k, p, tie, n in zip(keys, pools, flags, ties):
            rank = running[start : start + tie.size] - before + seen[p]
            out.append((k > cut[p]) | (tie & (rank <= kept_ties[p])).reshape(k.shape))
            start, before, seen[p] = start + tie.size, before + n, seen[p] + n
        return out

    return jax.lax.cond(jnp.any(kept_ties > 0), with_ties, without_ties)


def _sortable(x: Array) -> Array:
    """Unsigned integers that sort as the numbers do (-0.0 equals 0.0)."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 4:
        x = x.astype(jnp.float32)
    bits = x.dtype.itemsize * 8
    kind = jnp.uint64 if bits == 64 else jnp.uint32
    raw = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.zeros_like(x), x), kind)
    sign = kind(1) << kind(bits - 1)
    return jnp.where(raw & sign, ~raw, raw | sign)
