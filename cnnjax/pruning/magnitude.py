"""Magnitude pruning: remove the smallest weights, retrain the others.

Han, Pool, Tran, Dally, "Learning both weights and connections for efficient neural networks", NIPS
2015, arXiv 1506.02626.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import tree
from cnnjax.pruning import masks

PyTree = Any


def magnitude_scores(params: PyTree) -> PyTree:
    """``|w|`` of every parameter; higher = keep."""
    return jax.tree.map(jnp.abs, params)


def magnitude_mask(
    params: PyTree,
    sparsity: masks.Sparsity,
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
    """The mask that removes the fraction with the smallest magnitude.

    Exactly ``ceil(sparsity * n)`` of the ``n`` groups are removed; biases and normalization
    parameters are exempt. The arguments are those of `masks.mask_from_scores`.

    Raises:
      ValueError: see `masks.mask_from_scores`.

    Example:
      >>> mask = magnitude_mask(params, sparsity=0.9)  # of all kernels' weights
      >>> mask = magnitude_mask(params, {"conv*/kernel": 0.5, "fc*/kernel": 0.9})
      >>> mask = magnitude_mask(params, 0.5, granularity="filter", scope="layer")
    """
    return masks.mask_from_scores(
        magnitude_scores(params),
        sparsity,
        granularity=granularity,
        scope=scope,
        op=op,
        include=include,
        exclude=exclude,
        mask=mask,
        min_ndim=min_ndim,
        bias=bias,
        allow_empty=allow_empty,
    )


def threshold_mask(
    params: PyTree,
    quality: float | Mapping[str, float],
    *,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    mask: PyTree | None = None,
    allow_empty: bool = False,
) -> PyTree:
    """Han et al.'s rule: per layer, remove ``|w| < q * std(W)``.

    Args:
      params: any Flax tree.
      quality: the sensitivity ``q >= 0`` of every layer, or ``{glob: q}`` (the first glob that
        matches counts; layers that none matches stay dense).
      include: globs of paths to prune.
      exclude: globs of paths to leave alone.
      mask: an earlier mask; what it removed stays removed, and the deviation is that of the
        surviving weights.
      allow_empty: accept a layer without any weight left.

    Raises:
      ValueError: a negative ``q``, a glob that matches nothing, or a layer that would be emptied.
    """
    paths = masks.candidates(params, include, exclude)
    rules = quality if isinstance(quality, Mapping) else {"**": quality}
    for pattern, q in rules.items():
        if not q >= 0:
            raise ValueError(f"quality of {pattern!r} must be >= 0, got {q}")
    tree.check_patterns(list(rules), paths, what="quality pattern")
    if mask is not None:
        masks.check_mask(params, mask)
    old = tree.flatten(mask if mask is not None else masks.full_mask(params))

    def one(path: str, leaf: Any) -> Any:
        q = next((v for g, v in rules.items() if tree.glob_match(g, path)), None)
        if path not in paths or q is None:
            return old[path]
        keep = _above(leaf, old[path], jnp.float32(q))
        if not allow_empty and not np.asarray(keep).any():
            raise ValueError(f"quality {q} would empty {path}; lower it")
        return keep

    return tree.map_with_path(one, params)


@jax.jit
def _above(w: Any, alive: Any, q: Any) -> Any:
    w = w.astype(jnp.float32)
    n = jnp.maximum(jnp.sum(alive), 1)
    mean = jnp.sum(jnp.where(alive, w, 0)) / n
    variance = jnp.sum(jnp.where(alive, jnp.square(w - mean), 0)) / n
    return alive & (jnp.abs(w) >= q * jnp.sqrt(variance))


def prune_retrain(
    params: PyTree,
    sparsities: Sequence[float],
    retrain: Callable[[PyTree, PyTree, int], PyTree],
    **options: Any,
) -> tuple[PyTree, PyTree]:
    """Iterative pruning: for each sparsity, cut, then retrain the survivors from where they are.

    Args:
      params: trained parameters.
      sparsities: non-decreasing targets, e.g. `schedules.steps`.
      retrain: ``(params, mask, step) -> params``; what it returns is masked again, so that the
        zeros stay exact whatever it does.
      **options: those of `magnitude_mask`.

    Returns:
      The pruned parameters and their mask.

    Raises:
      ValueError: decreasing targets; see also `magnitude_mask`.
    """
    if any(b < a for a, b in itertools.pairwise(sparsities)):
        raise ValueError(f"sparsities must not decrease, got {list(sparsities)}")
    if not sparsities:
        raise ValueError("no sparsity to prune to: the list is empty")
    mask = options.pop("mask", None)
    for step, sparsity in enumerate(sparsities):
        mask = magnitude_mask(params, sparsity, mask=mask, **options)
        params = retrain(masks.apply_mask(params, mask), mask, step)
        params = masks.apply_mask(params, mask)
    return params, mask
