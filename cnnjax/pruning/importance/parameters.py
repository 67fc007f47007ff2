"""Scores that need the parameters alone. Every score: higher = keep."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.pruning.importance.registry import register
from cnnjax.tree import flatten, nest

PyTree = Any


def _kernels(params: PyTree) -> dict[str, Any]:
    """Leaves of two or more axes: biases and normalization parameters don't count."""
    kernels = {p: leaf for p, leaf in flatten(params).items() if jnp.ndim(leaf) >= 2}
    if not kernels:
        raise ValueError("the parameters hold no kernel (no leaf with two or more axes)")
    return kernels


def _map(host: Any, traced: Any, leaves: dict[str, Any]) -> dict[str, Any]:
    # on the host unless traced: selection reads scores there, and every shape would compile
    return {
        p: traced(x) if isinstance(x, jax.core.Tracer) else host(np.asarray(x))
        for p, x in leaves.items()
    }


@register("l1")
def l1(params: PyTree) -> PyTree:
    """``|w|`` of every weight of every kernel: summed over a filter, its L1 norm.

    Li, Kadav, Durdanovic, Samet, Graf, "Pruning filters for efficient ConvNets", ICLR 2017, arXiv
    1608.08710.

    Args:
      params: a Flax tree of parameters.

    Returns:
      A nested dict of the kernels (leaves with two or more axes), each of its own shape.

    Raises:
      ValueError: if there is no kernel.
    """
    return nest(_map(np.abs, jnp.abs, _kernels(params)))


@register("l2")
def l2(params: PyTree) -> PyTree:
    """``w^2`` of every weight of every kernel: summed over a filter, its squared L2 norm.

    Left squared so that the sum over the kernels of a tied group is the group's squared norm.

    Args:
      params: a Flax tree of parameters.

    Raises:
      ValueError: if there is no kernel.
    """
    return nest(_map(np.square, jnp.square, _kernels(params)))


@register("random")
def random(params: PyTree, key: jax.Array) -> PyTree:
    """A uniform number for each output channel (last axis) of every kernel: the baseline.

    Args:
      params: a Flax tree of parameters.
      key: PRNG key.

    Raises:
      ValueError: if there is no kernel.
    """
    kernels = _kernels(params)
    widths = [k.shape[-1] for k in kernels.values()]
    draws = jax.random.uniform(key, (sum(widths),))
    ends = [sum(widths[:i]) for i in range(1, len(widths))]
    return nest(dict(zip(kernels, jnp.split(draws, ends))))


@register("bn_scale")
def bn_scale(params: PyTree, *, scale: str = "scale") -> PyTree:
    """``|gamma|`` of every normalization layer.

    Liu, Li, Shen, Huang, Yan, Zhang, "Learning efficient convolutional networks through network
    slimming", ICCV 2017, arXiv 1708.06519. Groups without a normalization get no score and stay
    whole.

    Args:
      params: a Flax tree of parameters.
      scale: name of the scale's leaf.

    Raises:
      ValueError: if no one-axis leaf has that name.
    """
    found = {
        p: leaf
        for p, leaf in flatten(params).items()
        if p.rpartition("/")[2] == scale and jnp.ndim(leaf) == 1
    }
    if not found:
        raise ValueError(f"the parameters hold no normalization scale named {scale!r}")
    return nest(_map(np.abs, jnp.abs, found))
