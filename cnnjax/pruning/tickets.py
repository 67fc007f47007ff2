"""Lottery tickets (rewinding) and sensitivity curves (what each layer can bear).

Frankle & Carbin, "The lottery ticket hypothesis", ICLR 2019, arXiv 1803.03635; rewinding to an
early step: Frankle, Dziugaite, Roy, Carbin, ICML 2020, arXiv 1912.05671. Sensitivity: Li et al.,
ICLR 2017, arXiv 1608.08710.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax import tree
from cnnjax.pruning import granularity as grain
from cnnjax.pruning import magnitude, masks

PyTree = Any


def lottery_ticket(
    early: PyTree,
    train: Callable[[PyTree, PyTree, int], PyTree],
    sparsities: Sequence[float],
    **options: Any,
) -> tuple[PyTree, PyTree]:
    """Iterative magnitude pruning with rewinding: train, cut, go back to the early weights; again.

    Args:
      early: parameters at initialization, or after a few steps (late rewinding).
      train: ``(params, mask, round) -> trained params``; start the optimizer and the schedule anew
        (or from the rewinding step).
      sparsities: non-decreasing targets, e.g. `schedules.steps`.
      **options: of `magnitude_mask`.

    Returns:
      ``(the ticket: early weights under the mask, mask)``; train it once more to see if it wins.

    Raises:
      ValueError: no target, or decreasing ones; see also `magnitude_mask`.
    """
    if not sparsities:
        raise ValueError("no sparsity to prune to: the list is empty")
    if any(b < a for a, b in itertools.pairwise(sparsities)):
        raise ValueError(f"sparsities must not decrease, got {list(sparsities)}")
    mask = options.pop("mask", None)
    ticket = early if mask is None else masks.apply_mask(early, mask)
    for number, sparsity in enumerate(sparsities):
        now = masks.full_mask(early) if mask is None else mask
        trained = train(ticket, now, number)
        trained = masks.apply_mask(trained, now)
        mask = magnitude.magnitude_mask(trained, sparsity, mask=mask, **options)
        ticket = rewind(early, mask)
    return ticket, mask


def rewind(early: PyTree, mask: PyTree) -> PyTree:
    """Early weights under a later mask.

    Raises:
      ValueError: if the mask does not match.
    """
    return masks.apply_mask(early, mask)


def sensitivity(
    params: PyTree,
    evaluate: Callable[[PyTree], Any],
    ratios: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    *,
    granularity: str = "filter",
    op: str = "sum",
    scores: PyTree | None = None,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    batch: int = 8,
) -> dict[str, Any]:
    """Prunes one layer at a time and measures, without retraining; one compiled evaluation.

    Args:
      params: trained, any Flax tree.
      evaluate: parameters -> number (accuracy or loss), jittable, always on the same data.
      ratios: fractions of groups to remove, ``ceil(ratio * n)``.
      granularity: what is removed as a whole; a filter takes its bias along.
      op: how weight scores become group scores.
      scores: of every weight, higher = keep; None: magnitudes.
      include: globs of kernels to try.
      exclude: globs of kernels.
      batch: candidates evaluated side by side.

    Returns:
      ``{path: array (ratios,)}``, and ``""`` with the value of the whole network.

    Raises:
      ValueError: ratios out of range or that empty a layer; globs without a match.
    """
    name = grain.canonical(granularity)
    flat = tree.flatten(params)
    paths = masks.candidates(params, include, exclude)
    sizes = [math.prod(grain.group_shape(flat[p].shape, name)) for p in paths]
    rows = [[0] * len(paths)]
    for i, (path, n) in enumerate(zip(paths, sizes)):
        for ratio in ratios:
            gone = masks.prune_count(ratio, n)
            if gone >= n:
                raise ValueError(f"a ratio of {ratio} removes all {n} groups ({name}) of {path}")
            rows.append([gone if j == i else 0 for j in range(len(paths))])
    weights = tree.flatten(scores) if scores is not None else {p: jnp.abs(flat[p]) for p in paths}
    pools = tuple(range(len(paths)))

    @jax.jit
    def run(params: PyTree, table: Any) -> Any:
        flat = tree.flatten(params)
        reduced = grain.reduce([weights[p] for p in paths], name, op)

        def one(counts: Any) -> Any:
            keep = masks.prune_smallest(reduced, counts, pools)
            keep = dict(zip(paths, grain.expand(keep, [flat[p] for p in paths])))
            if name == "filter":
                keep |= masks._bias_masks(flat, keep, {})
            return evaluate(
                tree.map_with_path(
                    lambda p, w: jnp.where(keep[p], w, jnp.zeros_like(w)) if p in keep else w,
                    params,
                )
            )

        return jax.lax.map(one, table, batch_size=batch)

    values = jax.device_get(run(params, jnp.asarray(rows, jnp.int32)))
    out: dict[str, Any] = {"": values[0]}
    for i, path in enumerate(paths):
        out[path] = values[1 + i * len(ratios) : 1 + (i + 1) * len(ratios)]
    return out
