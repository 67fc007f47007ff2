"""Scores from activations: how often a map is silent, and the rank of its values.

Hu, Peng, Tai, Tang, "Network trimming", arXiv 1607.03250 (APoZ); Lin et al., "HRank: filter pruning
using high-rank feature map", CVPR 2020, arXiv 2002.10179.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax import tree
from cnnjax.errors import did_you_mean
from cnnjax.pruning.importance.registry import register

PyTree = Any
KINDS = ("apoz", "hrank", "mean_activation")


def apoz_sums(activations: Float[Array, "n ... c"]) -> dict[str, Array]:
    """Of every map: zeros counted, and whether a negative value was seen (then it's no ReLU)."""
    axes = tuple(range(activations.ndim - 1))
    return {
        "apoz": jnp.sum(activations == 0, axis=axes, dtype=jnp.float32),
        "negative": jnp.any(activations < 0),
    }


def map_ranks(activations: Float[Array, "n ... c"], rtol: float = 1e-5) -> Float[Array, "n c"]:
    """Numerical rank of every map of every example: (n, h, w, c); a dense unit has rank 0 or 1."""
    if activations.ndim == 2:
        return (activations != 0).astype(jnp.float32)
    maps = jnp.moveaxis(activations, -1, 1)
    s = jnp.linalg.svd(maps.astype(jnp.float32), compute_uv=False)
    return jnp.sum(s > rtol * jnp.maximum(s[..., :1], jnp.finfo(s.dtype).tiny), -1).astype(s.dtype)


@register("apoz")
def apoz(
    params: PyTree,
    collect: Callable[[PyTree, Any], Mapping[str, Any]],
    batches: Iterable[Any],
) -> PyTree:
    """``1 - APoZ``: how often a map is *not* zero after its ReLU.

    Args:
      params: any Flax tree, handed to ``collect``.
      collect: ``(params, batch) -> {kernel path: activations (n, ..., c)}`` after the ReLU, e.g. by
        `cnnjax.graph.capture` and `jax.nn.relu`; jitted here.
      batches: what ``collect`` takes; streamed.

    Returns:
      ``{kernel path: (c,)}`` nested.

    Raises:
      ValueError: no batch.

    Warns:
      UserWarning: activations with negative values, or without a single zero (sigmoid, softplus):
        the score means nothing without a ReLU.
    """
    return activation_scores(params, collect, batches, ("apoz",))["apoz"]


@register("hrank")
def hrank(
    params: PyTree,
    collect: Callable[[PyTree, Any], Mapping[str, Any]],
    batches: Iterable[Any],
) -> PyTree:
    """Mean rank of each map; see `apoz` for the arguments."""
    return activation_scores(params, collect, batches, ("hrank",))["hrank"]


def activation_scores(
    params: PyTree,
    collect: Callable[[PyTree, Any], Mapping[str, Any]],
    batches: Iterable[Any],
    kinds: Iterable[str] = KINDS,
) -> dict[str, PyTree]:
    """Any set of the activation scores in one jitted pass; see `apoz` for the arguments.

    Args:
      params: any Flax tree, handed to ``collect``.
      collect: see `apoz`.
      batches: streamed.
      kinds: of ``apoz`` (1 - APoZ), ``hrank`` and ``mean_activation`` (mean magnitude).

    Returns:
      ``{kind: {kernel path: (c,)} nested}``.

    Raises:
      ValueError: unknown kind, or no batch.
    """
    kinds = tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown activation score {kind!r}.{did_you_mean(kind, KINDS)}")

    run = jax.jit(lambda params, batch: sums(params, batch, collect, kinds))
    total = None
    for batch in batches:
        new = run(params, batch)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    if total is None:
        raise ValueError("no example: the batches are empty")
    return finished(total, kinds)


def sums(params: PyTree, batch: Any, collect: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What one batch adds, for each path that ``collect`` names; jitted by the caller."""
    out = {}
    for path, a in collect(params, batch).items():
        mine: dict[str, Any] = {"positions": jnp.asarray(a.size / a.shape[-1], jnp.float32)}
        mine["examples"] = jnp.asarray(a.shape[0], jnp.float32)
        if "apoz" in kinds:
            found = apoz_sums(a)
            mine |= {"apoz": found["apoz"], "negative": found["negative"].astype(jnp.float32)}
        if "hrank" in kinds:
            mine["hrank"] = jnp.sum(map_ranks(a), axis=0)
        if "mean_activation" in kinds:
            mine["mean_activation"] = jnp.sum(jnp.abs(a), axis=tuple(range(a.ndim - 1)))
        out[path] = mine
    return out


def finished(total: Mapping[str, Any], kinds: tuple[str, ...]) -> dict[str, PyTree]:
    """Scores from the sums of all batches; warns where APoZ means nothing."""
    out: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for path, mine in total.items():
        if "apoz" in kinds:
            negative = float(mine["negative"]) > 0
            if negative or not float(jnp.max(mine["apoz"])):
                what = "have negative values" if negative else "are never zero"
                warnings.warn(
                    f"APoZ of {path}: the activations {what}, so they are not behind a ReLU and "
                    "the share of zeros says nothing; apply the ReLU in collect, or use another "
                    "score",
                    UserWarning,
                    stacklevel=3,
                )
            out["apoz"][path] = 1 - mine["apoz"] / mine["positions"]
        if "hrank" in kinds:
            out["hrank"][path] = mine["hrank"] / mine["examples"]
        if "mean_activation" in kinds:
            out["mean_activation"][path] = mine["mean_activation"] / mine["positions"]
    return {kind: tree.nest(scores) for kind, scores in out.items()}
