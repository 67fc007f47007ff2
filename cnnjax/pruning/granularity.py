"""Index sets of a kernel: single weights, strided positions, kernels, filters, whole layers.

After Anwar & Sung (arXiv 1512.08571, 1610.09639). Kernels are ``W[h, w, c, o]`` (any number of
spatial axes, input channel, output channel) or ``W[in, out]``. A *group* is a set of weights that
is kept or removed together; a granularity is the set of axes over which the groups extend, so group
arrays keep the kernel's rank with size 1 on those axes and broadcast back to it.

| granularity | group array of `(h, w, c, o)` | one group |
| --- | --- | --- |
| `weight` | `(h, w, c, o)` | one weight |
| `column` | `(h, w, c, 1)` | one column of the im2col matrix, shared by all filters |
| `kernel` | `(1, 1, c, o)` | one 2-D kernel `W[:, :, c, o]` |
| `channel` | `(1, 1, c, 1)` | all that reads one input map |
| `filter` | `(1, 1, 1, o)` | all that makes one output map (with its bias) |
| `layer` | `(1, 1, 1, 1)` | the tensor |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cnnjax import tree
from cnnjax.errors import did_you_mean

PyTree = Any

GRANULARITIES = ("weight", "column", "kernel", "channel", "filter", "layer")
_ALIASES = {"feature_map": "filter", "map": "filter", "intra_kernel": "weight"}
_REDUCERS = ("mean", "sum", "max", "l2")


def canonical(granularity: str) -> str:
    """The granularity's own name (``feature_map`` is ``filter``).

    Raises:
      ValueError: for an unknown name.
    """
    name = _ALIASES.get(granularity, granularity)
    if name not in GRANULARITIES:
        raise ValueError(
            f"unknown granularity {granularity!r}."
            + did_you_mean(granularity, (*GRANULARITIES, *_ALIASES))
        )
    return name


def group_shape(shape: Sequence[int], granularity: str) -> tuple[int, ...]:
    """Shape of the group array of a kernel: size 1 on every axis that a group extends over.

    Args:
      shape: ``(*spatial, c, o)``; a dense kernel ``(in, out)`` has no spatial axis, so there a
        ``kernel`` is one weight. Leaves of rank 1 or 0 have only ``weight`` and ``layer`` groups
        (``filter`` means each entry: one bias per map).
      granularity: one of `GRANULARITIES` or an alias.
    """
    name, shape = canonical(granularity), tuple(shape)
    rank = len(shape)
    if name == "layer":
        return (1,) * rank
    if rank < 2 or name == "weight":
        return shape
    keep = {
        "column": range(rank - 1),
        "kernel": (rank - 2, rank - 1),
        "channel": (rank - 2,),
        "filter": (rank - 1,),
    }[name]
    return tuple(n if axis in keep else 1 for axis, n in enumerate(shape))


def groups(params: PyTree, granularity: str) -> PyTree:
    """Group ids of every leaf, numbered from 0 within the leaf in row-major order of the groups.

    For ``filter``, a leaf of rank 1 gets one id per entry, so a bias shares the ids of the filters
    that it belongs to.

    Returns:
      A tree like ``params`` with int32 arrays of the leaves' shapes.
    """

    def ids(leaf: Any) -> Array:
        reduced = group_shape(leaf.shape, granularity)
        numbered = jnp.arange(math.prod(reduced), dtype=jnp.int32).reshape(reduced)
        return jnp.broadcast_to(numbered, leaf.shape)

    return jax.tree.map(ids, params)


def reduce(scores: PyTree, granularity: str, op: str = "mean") -> PyTree:
    """Group scores from weight scores.

    Args:
      scores: tree of arrays, one score per weight.
      granularity: one of `GRANULARITIES` or an alias.
      op: ``mean`` (comparable between groups of different sizes), ``sum``, ``max`` or ``l2`` (root
        of the sum of squares).

    Returns:
      A tree of group arrays (see `group_shape`).

    Raises:
      ValueError: unknown granularity or ``op``.
    """
    canonical(granularity)
    if op not in _REDUCERS:
        raise ValueError(f"unknown reduction {op!r}.{did_you_mean(op, _REDUCERS)}")

    def one(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        reduced = group_shape(leaf.shape, granularity)
        axes = tuple(a for a in range(leaf.ndim) if reduced[a] == 1 and leaf.shape[a] != 1)
        if not axes:
            return leaf
        if op == "l2":
            return jnp.sqrt(jnp.sum(jnp.square(leaf), axis=axes, keepdims=True))
        return getattr(jnp, op)(leaf, axis=axes, keepdims=True)

    return jax.tree.map(one, scores)


def expand(group_mask: PyTree, params: PyTree) -> PyTree:
    """Weight masks from group masks: each group's value on all of its weights.

    Args:
      group_mask: tree of group arrays, as `reduce` gives them.
      params: tree of arrays (or abstract leaves) with the target shapes.

    Raises:
      ValueError: if a group array does not broadcast to its leaf; names the path.
    """

    def one(path: str, leaf: Any, group: Any) -> Array:
        ok = len(group.shape) == len(leaf.shape) and all(
            g in (1, n) for g, n in zip(group.shape, leaf.shape)
        )
        if not ok:
            raise ValueError(
                f"group mask of {path}: shape {tuple(group.shape)} does not broadcast to "
                f"{tuple(leaf.shape)}; keep the rank and use size 1 on the group's axes"
            )
        return jnp.broadcast_to(group, leaf.shape)

    return tree.map_with_path(one, params, group_mask)


def strided_positions(
    kernel: Sequence[int], stride: int, offset: int = 0
) -> Bool[np.ndarray, "*k"]:
    """Intra-kernel strided sparsity: keeps ``offset, offset + stride, ...`` of the flat kernel.

    Args:
      kernel: spatial shape, e.g. ``(5, 5)``; flattened row-major.
      stride: distance between kept positions, at least 1.
      offset: the first kept position, in ``[0, stride)``.

    Raises:
      ValueError: stride or offset out of range.
    """
    _check_stride(np.asarray(stride), np.asarray(offset))
    flat = np.arange(math.prod(kernel))
    return ((flat >= offset) & ((flat - offset) % stride == 0)).reshape(tuple(kernel))


def strided_mask(
    shape: Sequence[int],
    stride: int | Int[Array | np.ndarray, ...],
    offset: int | Int[Array | np.ndarray, ...] = 0,
) -> Bool[Array, ...]:
    """Intra-kernel strided mask (IKSS) of a kernel ``(*spatial, c, o)``.

    With one (stride, offset) per input map, shared by all the filters that read it, whole columns
    of the im2col matrix vanish and the product stays dense: `kept_columns` lists the survivors.

    Args:
      shape: the kernel's shape.
      stride: a number, one per input map ``(c,)``, or one per kernel ``(c, o)``.
      offset: likewise; each in ``[0, stride)``.

    Raises:
      ValueError: no spatial axis, or stride and offset out of range or of another shape.
    """
    *spatial, c, o = shape
    if not spatial:
        raise ValueError(f"a kernel of shape {tuple(shape)} has no spatial axes to stride over")
    pair = []
    for name, value in (("stride", stride), ("offset", offset)):
        value = np.asarray(value)
        value = value[:, None] if value.ndim == 1 else value
        try:
            pair.append(np.broadcast_to(value, (c, o)))
        except ValueError:
            raise ValueError(
                f"{name} of shape {value.shape}: expected a number, ({c},) or ({c}, {o})"
            ) from None
    s, first = pair
    _check_stride(s, first)
    flat = np.arange(math.prod(spatial))[:, None, None]
    keep = (flat >= first) & ((flat - first) % s == 0)
    return jnp.asarray(keep.reshape(tuple(shape)))


def kept_columns(mask: Bool[Array | np.ndarray, "*k c o"]) -> Int[np.ndarray, " kept"]:
    """Rows of ``W.reshape(-1, o)`` (im2col columns) in which some filter keeps a weight."""
    alive = np.asarray(mask).reshape(-1, mask.shape[-1]).any(axis=1)
    return np.flatnonzero(alive)


def n_m_mask(scores: PyTree, n: int = 2, m: int = 4, *, axis: int | str = -2) -> PyTree:
    """Keeps the ``n`` best of every ``m`` consecutive weights along the reduction axis.

    Args:
      scores: tree of arrays of rank 2 or more, higher = keep.
      n: kept weights of a block, ``0 < n <= m``.
      m: block length; must divide the axis.
      axis: an axis (default: input channels) or ``"reduction"``: all axes but the last, flattened
        row-major (the im2col columns).

    Returns:
      A tree of bool masks. Of equal scores the lower index is kept.

    Raises:
      ValueError: bad ``n``/``m``, or an axis that ``m`` does not divide; names the paths.
    """
    if not 0 < n <= m:
        raise ValueError(f"N:M sparsity needs 0 < n <= m, got n={n}, m={m}")
    if isinstance(axis, str) and axis != "reduction":
        raise ValueError(f"axis must be an integer or 'reduction', got {axis!r}")

    def length(leaf: Any) -> int:
        return math.prod(leaf.shape[:-1]) if axis == "reduction" else leaf.shape[axis]

    bad = [f"{p} ({length(x)})" for p, x in tree.flatten(scores).items() if length(x) % m]
    if bad:
        raise ValueError(
            f"{m} does not divide the reduction axis of {', '.join(bad[:6])}; exclude these leaves"
        )
    return jax.tree.map(lambda leaf: _best_of_blocks(jnp.asarray(leaf), n, m, axis), scores)


def _best_of_blocks(scores: Float[Array, ...], n: int, m: int, axis: int | str) -> Bool[Array, ...]:
    if axis == "reduction":
        flat = scores.reshape(-1, scores.shape[-1])
        return _best_of_blocks(flat, n, m, 0).reshape(scores.shape)
    moved = jnp.moveaxis(scores, int(axis), -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, m)
    # rank within the block; a stable sort of the negated scores prefers the lower index
    order = jnp.argsort(-blocks, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return jnp.moveaxis((rank < n).reshape(moved.shape), -1, int(axis))


def _check_stride(stride: np.ndarray, offset: np.ndarray) -> None:
    if np.any(stride < 1):
        raise ValueError(f"stride must be at least 1, got {stride.min()}")
    if np.any(offset < 0) or np.any(offset >= stride):
        raise ValueError("offset must lie in [0, stride)")
