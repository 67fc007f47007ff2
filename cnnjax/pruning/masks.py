"""Masks: bool trees with the shape of the parameters; True keeps a weight.

Selection is exact and deterministic: of ``n`` candidates ``ceil(sparsity * n)`` are removed, the
ones with the lowest scores; of equal scores the lower index (in leaf order) is kept. The cut is
found by bisection over the bits of the scores, see `cnnjax.pruning.ranking`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cnnjax import tree
from cnnjax.pruning import granularity as grain
from cnnjax.pruning.ranking import prune_smallest as prune_smallest

PyTree = Any
Sparsity = float | int | Mapping[str, float]
SCOPES = ("global", "layer")


def check_sparsity(sparsity: float, what: str = "sparsity") -> float:
    """Returns ``sparsity`` as a float.

    Raises:
      ValueError: unless ``0 <= sparsity < 1``.
    """
    if not 0.0 <= float(sparsity) < 1.0:
        raise ValueError(
            f"{what} must lie in [0, 1), got {sparsity}: it is the fraction of weights to remove"
        )
    return float(sparsity)


def prune_count(sparsity: float, n: int) -> int:
    """``ceil(sparsity * n)`` of the number as written: 0.07 of 100 is 7, whatever the float."""
    return math.ceil(Fraction(repr(check_sparsity(sparsity))) * n)


def candidates(
    params: PyTree,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    *,
    min_ndim: int = 2,
) -> list[str]:
    """Paths of the leaves that may be pruned: kernels by structure, then by glob.

    Args:
      params: any Flax tree.
      include: globs of paths to prune.
      exclude: globs of paths to leave alone.
      min_ndim: leaves of lower rank are exempt; 2 exempts biases and normalization parameters.

    Raises:
      ValueError: a glob that matches nothing, or nothing left to prune.
    """
    flat = tree.flatten(params)
    tree.check_patterns(include, flat, what="include pattern")
    tree.check_patterns(exclude, flat, what="exclude pattern")
    chosen = [
        path
        for path, leaf in flat.items()
        if np.ndim(leaf) >= min_ndim
        and tree.match_any(include, path)
        and not tree.match_any(exclude, path)
    ]
    if not chosen:
        raise ValueError(
            f"nothing to prune: no leaf of rank >= {min_ndim} matches include={include!r} and not "
            f"exclude={exclude!r}; leaves are {', '.join(list(flat)[:6])}"
        )
    return chosen


def full_mask(params: PyTree) -> PyTree:
    """The mask that keeps everything."""
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)


def check_mask(params: PyTree, mask: PyTree) -> None:
    """Raises unless ``mask`` has the paths and shapes of ``params``.

    Raises:
      ValueError: lists missing and unknown paths and shape mismatches.
    """
    tree.check_same_structure(params, mask, what="mask")


def apply_mask(params: PyTree, mask: PyTree) -> PyTree:
    """Exact zeros (+0.0) where the mask is False, whatever was there (NaN too).

    Raises:
      ValueError: if the mask does not match the parameters.
    """
    check_mask(params, mask)
    return jax.tree.map(
        lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), params, _like(params, mask)
    )


def intersect(first: PyTree, *others: PyTree) -> PyTree:
    """The mask that keeps what every mask keeps (coarse and fine masks combine this way)."""
    for other in others:
        tree.check_same_structure(first, other, what="mask", of="first mask")
        first = jax.tree.map(jnp.logical_and, first, _like(first, other))
    return first


def mask_of(params: PyTree) -> PyTree:
    """The mask of what is not zero."""
    return jax.tree.map(lambda leaf: leaf != 0, params)


def density(mask: PyTree) -> dict[str, float]:
    """Kept fraction of every leaf, and of the whole under ``""``."""
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(mask).items()}
    out = {path: float(leaf.mean()) for path, leaf in flat.items()}
    out[""] = sum(int(x.sum()) for x in flat.values()) / sum(x.size for x in flat.values())
    return out


def mask_from_scores(
    scores: PyTree,
    sparsity: Sparsity,
    *,
    granularity: str = "weight",
    scope: str | None = None,
    op: str = "mean",
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    mask: PyTree | None = None,
    min_ndim: int = 2,
    bias: bool = True,
    allow_empty: bool = False,
) -> PyTree:
    """The mask that removes the lowest-scored fraction.

    Args:
      scores: tree of arrays, one score per weight (any Flax tree); higher = keep.
      sparsity: fraction of *groups* to remove, in [0, 1); or ``{glob: fraction}`` for one fraction
        per layer (the first glob that matches a path counts; layers that none matches stay dense).
      granularity: ``weight``, ``column``, ``kernel``, ``channel``, ``filter`` or ``layer``.
      scope: ``global`` pools the groups of all layers, ``layer`` cuts each layer by itself
        (default: ``global`` for a number, ``layer`` for a mapping).
      op: how weight scores become group scores, see `granularity.reduce`.
      include: globs of paths to prune.
      exclude: globs of paths to leave alone.
      mask: an earlier mask; what it removed stays removed and counts towards ``sparsity``.
      min_ndim: leaves of lower rank are exempt.
      bias: with ``filter`` granularity, remove a filter's bias with it (the rank-1 leaf of matching
        length named ``bias`` beside the kernel).
      allow_empty: accept a layer without any weight left.

    Returns:
      A bool tree like ``scores``.

    Raises:
      ValueError: bad sparsity, scope, granularity or glob; a NaN score; a mask that does not match;
        a layer that would be emptied.
    """
    name = grain.canonical(granularity)
    paths = candidates(scores, include, exclude, min_ndim=min_ndim)
    flat = tree.flatten(scores)
    if mask is not None:
        check_mask(scores, mask)
    old = tree.flatten(mask) if mask is not None else {}
    fractions, pools = _pools(paths, sparsity, scope)
    paths = list(fractions)
    shapes = [grain.group_shape(np.shape(flat[p]), name) for p in paths]
    totals = [0] * (max(pools) + 1)
    for pool, shape in zip(pools, shapes):
        totals[pool] += math.prod(shape)
    by_pool = dict(zip(pools, fractions.values()))
    counts = [prune_count(by_pool[i], n) for i, n in enumerate(totals)]

    keep, alive, nan = _select(
        [flat[p] for p in paths],
        [old[p] for p in paths] if old else None,
        jnp.asarray(counts, jnp.int32),
        tuple(pools),
        name,
        op,
    )
    bad = [p for p, is_nan in zip(paths, np.asarray(nan)) if is_nan]
    if bad:
        raise ValueError(f"NaN among the scores of {', '.join(bad[:6])}")
    empty = [p for p, n in zip(paths, np.asarray(alive)) if n == 0]
    if empty and not allow_empty:
        raise ValueError(
            f"sparsity {sparsity} would empty {', '.join(empty[:6])}: nothing would pass; lower "
            "it, use scope='layer', or exclude these layers"
        )
    chosen = dict(zip(paths, keep))
    if name == "filter" and bias:
        chosen |= _bias_masks(flat, chosen, old)

    def one(path: str, leaf: Any) -> Array:
        if path in chosen:
            return chosen[path]
        return old[path] if path in old else jnp.ones(np.shape(leaf), bool)

    return tree.map_with_path(one, scores)


def check_alive(mask: PyTree, *, min_ndim: int = 2) -> None:
    """Raises if a kernel is wholly masked.

    Leaves whose values are not at hand (traced, or spread over several processes) are not checked.

    Raises:
      ValueError: names the emptied layers.
    """
    empty = [
        path
        for path, m in tree.flatten(mask).items()
        if np.ndim(m) >= min_ndim
        and not isinstance(m, jax.core.Tracer)
        and getattr(m, "is_fully_addressable", True)
        and not np.asarray(m).any()
    ]
    if empty:
        raise ValueError(
            f"the mask empties {', '.join(empty[:6])}: nothing would pass "
            "through; keep a weight of each, or leave these layers out"
        )


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _select(
    scores: list[Any],
    old: list[Any] | None,
    counts: Array,
    pools: tuple[int, ...],
    granularity: str,
    op: str,
) -> tuple[list[Array], Array, Array]:
    reduced = grain.reduce(scores, granularity, op)
    nan = jnp.stack([jnp.any(jnp.isnan(r)) for r in reduced])
    if old is not None:
        # what an earlier mask removed wholly goes first
        gone = grain.reduce([m.astype(jnp.float32) for m in old], granularity, "max")
        reduced = [jnp.where(g > 0, r.astype(jnp.float32), -jnp.inf) for r, g in zip(reduced, gone)]
    keep = prune_smallest(reduced, counts, pools)
    keep = grain.expand(keep, scores)
    if old is not None:
        keep = [k & m for k, m in zip(keep, old)]
    alive = jnp.stack([jnp.sum(k, dtype=jnp.int32) for k in keep])
    return keep, alive, nan


def _pools(
    paths: list[str], sparsity: Sparsity, scope: str | None
) -> tuple[dict[str, float], list[int]]:
    """The fraction of each pruned path and the pool of each path."""
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    if not isinstance(sparsity, Mapping):
        fraction = check_sparsity(sparsity)
        pools = list(range(len(paths))) if scope == "layer" else [0] * len(paths)
        return dict.fromkeys(paths, fraction), pools
    if scope == "global":
        raise ValueError("a sparsity per layer needs scope='layer', got scope='global'")
    for pattern, value in sparsity.items():
        check_sparsity(value, f"sparsity of {pattern!r}")
    tree.check_patterns(list(sparsity), paths, what="sparsity pattern")
    fractions = {}
    for path in paths:
        for pattern, value in sparsity.items():
            if tree.glob_match(pattern, path):
                fractions[path] = value
                break
    return fractions, list(range(len(fractions)))


def _bias_masks(
    flat: Mapping[str, Any], chosen: Mapping[str, Array], old: Mapping[str, Any]
) -> dict[str, Array]:
    out = {}
    for path, keep in chosen.items():
        beside = path.rpartition("/")[0] + "/bias" if "/" in path else "bias"
        leaf = flat.get(beside)
        if leaf is not None and np.shape(leaf) == (keep.shape[-1],) and beside not in chosen:
            alive = keep.any(axis=tuple(range(keep.ndim - 1)))
            out[beside] = alive & old[beside] if beside in old else alive
    return out


def _like(params: PyTree, mask: PyTree) -> PyTree:
    """The mask's leaves in the parameters' container types (a plain dict may mask a State)."""
    if jax.tree.structure(params) == jax.tree.structure(mask):
        return mask
    flat = tree.flatten(mask)
    return tree.map_with_path(lambda path, _: flat[path], params)
