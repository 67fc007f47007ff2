"""Sparsity penalties to add to a loss: lp, group lasso, and the biases of Hanson and Pratt.

All are scalars of a parameter tree, for `cnnjax.training.Hooks(penalty=...)`::

    hooks = training.Hooks(penalty=lambda params, context: penalties.sparsity(params, 1e-4))

Sub-gradients shrink weights but hardly ever make exact zeros: use `forward_backward_splitting` for
those, or cut small groups afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from cnnjax import tree
from cnnjax.errors import did_you_mean
from cnnjax.pruning import granularity as grain
from cnnjax.pruning import masks, prox

PyTree = Any
BIASES = ("hyperbolic", "exponential", "decay")


def sparsity(
    params: PyTree,
    strength: Any,
    p: int = 1,
    *,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    min_ndim: int = 2,
) -> Any:
    """``strength * ||w||_p`` over the kernels, the survey's sparse objective.

    Args:
      params: any Flax tree.
      strength: lambda.
      p: 1 (sum of magnitudes), 0 (number of non-zeros, no gradient) or 2 (half the squares).
      include: globs of paths.
      exclude: globs of paths.
      min_ndim: leaves of lower rank are exempt: biases and normalization parameters.

    Returns:
      A scalar.

    Raises:
      ValueError: another ``p``; a glob that matches nothing.
    """
    if p not in (0, 1, 2):
        raise ValueError(f"p must be 0, 1 or 2, got {p}")
    flat = tree.flatten(params)
    total = jnp.zeros(())
    for path in masks.candidates(params, include, exclude, min_ndim=min_ndim):
        w = flat[path]
        if p == 0:
            total = total + jnp.sum(w != 0).astype(w.dtype)
        else:
            total = total + (jnp.sum(jnp.abs(w)) if p == 1 else 0.5 * jnp.sum(jnp.square(w)))
    return strength * total


def group_lasso(
    params: PyTree,
    strengths: Mapping[str, float],
    *,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    truncate: float | None = None,
    by_size: bool = False,
) -> Any:
    """``sum_granularity lambda_g sum_groups ||w_g||``: structured sparsity learning.

    Wen, Wu, Wang, Chen, Li, "Learning structured sparsity in deep neural networks", NIPS 2016,
    arXiv 1608.03665. ``{"filter": a, "channel": b}`` cuts widths, ``column`` learns receptive
    fields (all weights ``W[h, w, c, :]``: also the penalty of group-wise brain damage, Lebedev &
    Lempitsky, CVPR 2016, arXiv 1506.02515), ``layer`` drops layers that a shortcut bridges. The
    groups may overlap; the exact operator of one granularity is `Prox("group_l2", ...)`.

    Args:
      params: any Flax tree.
      strengths: ``{granularity: lambda}``.
      include: globs of the kernels; ``layer`` usually only makes sense on some.
      exclude: globs of paths.
      truncate: presses only on groups whose norm is below this: ``min(||w_g||, truncate)``.
      by_size: weigh each group by the square root of its size (the paper does not).

    Returns:
      A scalar; its gradient at a group of zeros is 0.

    Raises:
      ValueError: unknown granularity, negative strength, no strength, or a glob without a match.
    """
    if not strengths:
        raise ValueError("group_lasso needs at least one granularity, e.g. {'filter': 1e-4}")
    flat = tree.flatten(params)
    total = jnp.zeros(())
    paths = masks.candidates(params, include, exclude)
    for name, strength in strengths.items():
        if isinstance(strength, (int, float)) and strength < 0:
            raise ValueError(f"the strength of {name!r} must not be negative, got {strength}")
        for path in paths:
            w = flat[path]
            shape = grain.group_shape(w.shape, name)
            axes = tuple(a for a in range(w.ndim) if shape[a] == 1 and w.shape[a] != 1)
            sizes = prox.norms(w, axes) if axes else jnp.abs(w)
            if truncate is not None:
                sizes = jnp.minimum(sizes, truncate)
            scale = (w.size / sizes.size) ** 0.5 if by_size else 1.0
            total = total + strength * scale * jnp.sum(sizes)
    return total


def unit_totals(
    params: PyTree,
    *,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    consumers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """``w_i = sum_j |w_ij|`` of every output unit of every kernel.

    Args:
      params: any Flax tree.
      include: globs of kernels whose outputs are hidden units.
      exclude: globs of paths, e.g. the last layer.
      consumers: ``{kernel path: path of the next kernel}``: adds the outgoing weights of a unit
        (the next kernel's input channel, which must have as many).

    Returns:
      ``{kernel path: (o,)}``.

    Raises:
      ValueError: a glob without a match, or a consumer of another width.
      KeyError: a consumer that does not exist.
    """
    flat = tree.flatten(params)
    out = {}
    for path in masks.candidates(params, include, exclude):
        w = flat[path]
        out[path] = jnp.sum(jnp.abs(w), axis=tuple(range(w.ndim - 1)))
    for path, reader in (consumers or {}).items():
        for name, known in ((path, out), (reader, flat)):
            if name not in known:
                raise KeyError(f"no kernel {name!r}.{did_you_mean(name, known)}")
        w = flat[reader]
        if w.shape[-2] != out[path].shape[0]:
            raise ValueError(
                f"{reader} reads {w.shape[-2]} channels, {path} makes {out[path].shape[0]}"
            )
        others = tuple(a for a in range(w.ndim) if a != w.ndim - 2)
        out[path] = out[path] + jnp.sum(jnp.abs(w), axis=others)
    return out


def unit_bias(
    params: PyTree,
    kind: str,
    strength: float | int,
    *,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    consumers: Mapping[str, str] | None = None,
) -> Any:
    """Weight-decay biases that press on small units and hardly on large ones.

    Hanson & Pratt, "Comparing biases for minimal network construction with back-propagation", NIPS
    1, 1988. ``hyperbolic``: ``sum_i w_i / (1 + lambda w_i)``; ``exponential``:
    ``sum_i 1 - exp(-lambda w_i)``; ``decay``: ``lambda sum w^2`` for reference. "Bias" is the
    paper's word for a penalty; bias weights are exempt.

    Args:
      params: any Flax tree.
      kind: one of `BIASES`.
      strength: lambda, not negative.
      include: globs of kernels whose outputs are hidden units.
      exclude: globs of paths, e.g. the last layer.
      consumers: see `unit_totals`; by default a unit's total is that of its incoming weights.

    Returns:
      A scalar, to be weighed against the error by the caller.

    Raises:
      ValueError: unknown kind or negative strength; see also `unit_totals`.
    """
    if kind not in BIASES:
        raise ValueError(f"unknown bias {kind!r}.{did_you_mean(kind, BIASES)}")
    if strength < 0:
        raise ValueError(f"the strength must not be negative, got {strength}")
    if kind == "decay":
        return 2 * sparsity(params, strength, 2, include=include, exclude=exclude)
    total = jnp.zeros(())
    units = unit_totals(params, include=include, exclude=exclude, consumers=consumers)
    for w in units.values():
        if kind == "hyperbolic":
            total = total + jnp.sum(w / (1 + strength * w))
        else:
            total = total + jnp.sum(-jnp.expm1(-strength * w))
    return total
