"""Proximal operators: ``prox_{t g}(v) = argmin_u 0.5 ||u - v||^2 + t g(u)`` in closed form.

Bach, Jenatton, Mairal, Obozinski, "Optimization with sparsity-inducing penalties", Foundations and
Trends in Machine Learning 4(1), 2012, arXiv 1108.0775; nested groups: Jenatton, Mairal, Obozinski,
Bach, "Proximal methods for hierarchical sparse coding", JMLR 12, 2011.

Every function is pure and jittable; ``t`` (step times strength) may be traced. Where a step of its
own for every coordinate makes sense (adaptive optimizers), ``t`` may have ``v``'s shape; the
operator is then that of the metric ``0.5 sum_j (u_j - v_j)^2 / eta_j``, solved exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.pruning import masks

Axes = Sequence[int] | None


def l1(v: Float[Array, ...], t: Any) -> Float[Array, ...]:
    """Soft thresholding: ``sign(v) max(|v| - t, 0)``; ``t`` a number or one per coordinate."""
    t = jnp.asarray(t, v.dtype)
    # the difference first: its zero is +0.0 whatever the sign of v
    return jnp.maximum(v - t, 0) - jnp.maximum(-v - t, 0)


def squared_l2(v: Float[Array, ...], t: Any) -> Float[Array, ...]:
    """Shrinkage ``v / (1 + t)``, of ``t/2 ||u||^2``; ``t`` a number or one per coordinate."""
    return v / (1 + jnp.asarray(t, v.dtype))


def l0(v: Float[Array, ...], t: Any) -> Float[Array, ...]:
    """Hard thresholding of the l0 penalty: keeps ``v_j`` where ``|v_j| > sqrt(2 t)``."""
    return jnp.where(jnp.square(v) > 2 * jnp.asarray(t, v.dtype), v, jnp.zeros_like(v))


def l0_ball(v: Float[Array, ...], k: Any) -> Float[Array, ...]:
    """The nearest array with at most ``k`` non-zeros: the ``k`` largest magnitudes stay.

    Args:
      v: any shape.
      k: how many stay, traced or not; values beyond the size keep all. Of equal magnitudes the
        lower index stays.
    """
    gone = v.size - jnp.clip(jnp.asarray(k, jnp.int32), 0, v.size)
    (keep,) = masks.prune_smallest([jnp.abs(v)], gone[None], (0,))
    return jnp.where(keep, v, jnp.zeros_like(v))


def norms(v: Float[Array, ...], axes: Axes = None) -> Float[Array, ...]:
    """l2 norms over ``axes`` (kept with size 1) whose gradient at a zero group is 0, not NaN."""
    square = jnp.sum(jnp.square(v), axis=_axes(v, axes), keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def group_l2(v: Float[Array, ...], t: Any, axes: Axes = None) -> Float[Array, ...]:
    """Group soft thresholding ``max(0, 1 - t / ||v||) v`` of every group.

    Args:
      v: any shape.
      t: a number, an array that broadcasts against the groups' norms (size 1 on ``axes``), or one
        of ``v``'s shape: the threshold of every coordinate in its own metric (module docstring).
      axes: over which a group extends; None: the whole array is one group.

    Returns:
      An array like ``v``; a group of zeros stays zero.
    """
    t = jnp.asarray(t, v.dtype)
    axes = _axes(v, axes)
    varies = t.ndim == v.ndim and any(t.shape[a] != 1 for a in axes)
    if varies:
        return _group_l2_metric(v, jnp.broadcast_to(t, v.shape), axes)
    norm = norms(v, axes)
    safe = jnp.where(norm > 0, norm, 1)
    return v * jnp.maximum(0, 1 - t / safe) * (norm > 0)


def _group_l2_metric(v: Array, t: Array, axes: tuple[int, ...]) -> Array:
    """``argmin sum (u - v)^2 / (2 t) + ||u||``: ``u = v s / (s + t)`` with ``s = ||u||`` the root
    of ``sum (v / (s + t))^2 = 1``, a convex decreasing function."""

    def total(x: Array) -> Array:
        return jnp.sum(x, axis=axes, keepdims=True)

    ratio = jnp.where(t > 0, v / jnp.where(t > 0, t, 1), jnp.where(v == 0, 0, jnp.inf))
    alive = total(jnp.square(ratio)) > 1

    def gap(s: Array) -> Array:
        return jnp.where(s + t > 0, s + t, 1)

    def newton(_: Any, s: Array) -> Array:
        # on sum(...)^(-1/2) = 1: nearly linear in s, monotone from the left, few steps
        f = total(jnp.square(v / gap(s)))
        slope = total(jnp.square(v) / gap(s) ** 3)
        move = (jnp.sqrt(f) - 1) * f / jnp.where(slope > 0, slope, 1)
        return jnp.maximum(s + move, 0)

    # below the root, and above 0 where a coordinate has no threshold of its own
    first = jnp.max(jnp.abs(v) - t, axis=axes, keepdims=True)
    first = jnp.maximum(first, norms(v, axes) - jnp.max(t, axis=axes, keepdims=True))
    s = jax.lax.fori_loop(0, 30, newton, jnp.maximum(first, 0))
    return jnp.where(alive, v * (s / gap(s)), jnp.zeros_like(v))


def sparse_group(v: Float[Array, ...], t1: Any, t2: Any, axes: Axes = None) -> Float[Array, ...]:
    """Of ``t1 ||u||_1 + t2 sum_g ||u_g||``: soft thresholding first, then the groups."""
    return group_l2(l1(v, t1), t2, axes)


def nested_groups(
    v: Float[Array, ...], ts: Sequence[Any], levels: Sequence[Axes]
) -> Float[Array, ...]:
    """Of ``sum_i ts[i] sum_(g in level i) ||u_g||`` for groups nested in one another.

    Exact when applied from the smallest groups to the largest (Jenatton et al. 2011).

    Args:
      v: any shape.
      ts: one threshold per level.
      levels: axes of each level, each containing the previous one's; ``()`` are single entries
        and ``None`` is the whole array.

    Raises:
      ValueError: lengths that differ, or levels that are not nested.
    """
    if len(ts) != len(levels):
        raise ValueError(f"{len(ts)} thresholds for {len(levels)} levels of groups")
    sets = [set(_axes(v, axes)) for axes in levels]
    for inner, outer in zip(sets, sets[1:]):
        if not inner <= outer:
            raise ValueError(
                f"not nested: groups over axes {sorted(outer)} don't contain those over "
                f"{sorted(inner)}; list the levels from the smallest groups to the largest"
            )
    for t, axes in zip(ts, sets):
        v = group_l2(v, t, tuple(sorted(axes))) if axes else l1(v, t)
    return v


def nuclear(v: Float[Array, "m n"], t: Any) -> Float[Array, "m n"]:
    """Soft-thresholds the singular values of a matrix (Cai, Candes & Shen 2010)."""
    u, s, vt = jnp.linalg.svd(v, full_matrices=False)
    return jnp.matmul(u * jnp.maximum(s - t, 0), vt, precision=jax.lax.Precision.HIGHEST)


def _axes(v: Array, axes: Axes) -> tuple[int, ...]:
    if axes is None:
        return tuple(range(v.ndim))
    return tuple(a % v.ndim for a in axes)
