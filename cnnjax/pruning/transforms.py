"""Masked and gradual pruning as optax transformations around any optimizer.

Both wrap an optimizer rather than chain with it, because the zeros must survive whatever it does
(momentum, weight decay, Adam's bias correction): the last word on the update is the mask's, and a
removed weight gets the update ``-w``, so that ``w + (-w)`` is exactly +0.0. The mask lives in the
optimizer's state and is saved with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from cnnjax import tree
from cnnjax.pruning import granularity as grain
from cnnjax.pruning import masks, schedules

PyTree = Any


class MaskedState(NamedTuple):
    """State of a masked optimizer: updates done, the mask, and the optimizer's own state."""

    count: Int[Array, ""]
    mask: PyTree
    inner: PyTree


def masked(
    optimizer: optax.GradientTransformation,
    mask: PyTree | None = None,
    *,
    allow_empty: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains only what the mask keeps; the rest is bit-exact zero after the first update.

    Gradients of removed weights are zeroed before the optimizer sees them, so its moments stay zero
    there too.

    Args:
      optimizer: any optax transformation, complete (learning rate included).
      mask: bool tree like the parameters; ``None`` takes the parameters' non-zeros at ``init``
        (leaves of rank 0 and 1 are kept whole).
      allow_empty: accept a layer without any weight left, e.g. one that a shortcut bridges.

    Raises:
      ValueError: a mask that removes a whole layer (names it; a traced mask, or the non-zeros that
        ``None`` stands for, can't be checked); at ``init``, if the mask does not match the
        parameters; at ``update``, without ``params``.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    if mask is not None and not allow_empty:
        masks.check_alive(mask)

    def init(params: PyTree) -> Any:
        if mask is None:
            own = jax.tree.map(lambda w: (w != 0) | (w.ndim < 2), params)
        else:
            masks.check_mask(params, mask)
            own = masks._like(params, jax.tree.map(lambda m: jnp.array(m, bool), mask))
        return MaskedState(jnp.zeros((), jnp.int32), own, optimizer.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, MaskedState]:
        if params is None:
            raise ValueError("a masked optimizer needs update(grads, state, params)")
        grads = _zero(updates, state.mask)
        updates, inner = optimizer.update(grads, state.inner, params, **extra)
        updates = _to_zero(updates, params, state.mask)
        return updates, MaskedState(state.count + 1, state.mask, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def gradual(
    optimizer: optax.GradientTransformation,
    *,
    final: float,
    begin: int,
    end: int,
    every: int,
    initial: float = 0.0,
    granularity: str = "weight",
    scope: str = "global",
    op: str = "mean",
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
) -> optax.GradientTransformationExtraArgs:
    """Gradual magnitude pruning with the cubic schedule (Zhu & Gupta, arXiv 1710.01878).

    The mask is renewed after updates ``begin, begin + every, ..., end`` and only ever shrinks; the
    optimizer's moments of newly removed weights are zeroed with them. Counts are exact:
    ``ceil(s_t * n)`` groups are gone after the cut at ``t``.

    Args:
      optimizer: any optax transformation, complete.
      final: sparsity from ``end`` on, in [0, 1).
      begin: the first cut is made by this update (0: the first).
      end: the last cut.
      every: updates between cuts; must divide ``end - begin``.
      initial: the sparsity that the schedule starts from.
      granularity: what is removed as a whole, see `granularity`.
      scope: ``global`` or ``layer``. A global cut may empty a layer: `masks.check_alive` tells.
      op: how weight scores become group scores.
      include: globs of paths to prune.
      exclude: globs of paths to leave alone.

    Raises:
      ValueError: values out of range; at ``init``, a glob that matches nothing.
    """
    name = grain.canonical(granularity)
    if begin < 0 or every < 1 or end <= begin or (end - begin) % every:
        raise ValueError(
            "need 0 <= begin < end, every >= 1 and every dividing end - begin; got "
            f"begin={begin}, end={end}, every={every}"
        )
    masks.check_sparsity(final, "final sparsity")
    masks.check_sparsity(initial, "initial sparsity")
    targets = [
        schedules.cubic(t, begin=begin, end=end, final=final, initial=initial)
        for t in range(begin, end, every)
    ]
    targets.append(final)
    optimizer = optax.with_extra_args_support(optimizer)

    def plan(params: PyTree) -> tuple[list[str], tuple[int, ...], Array]:
        """Paths to prune, their pools, and the number to remove per cut and pool."""
        paths = masks.candidates(params, include, exclude)
        _, pools = masks._pools(paths, 0.0, scope)
        flat = tree.flatten(params)
        totals = [0] * (max(pools) + 1)
        for path, pool in zip(paths, pools):
            totals[pool] += int(np.prod(grain.group_shape(flat[path].shape, name)))
        table = [[masks.prune_count(s, n) for n in totals] for s in targets]
        return paths, tuple(pools), jnp.asarray(table, jnp.int32)

    def init(params: PyTree) -> Any:
        plan(params)
        return MaskedState(
            jnp.zeros((), jnp.int32), masks.full_mask(params), optimizer.init(params)
        )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, MaskedState]:
        if params is None:
            raise ValueError("a gradually pruned optimizer needs update(grads, state, params)")
        paths, pools, table = plan(params)
        updates, inner = optimizer.update(_zero(updates, state.mask), state.inner, params, **extra)
        t = state.count

        def cut(operand: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            old, inner = operand
            ahead = tree.flatten(optax.apply_updates(params, updates))
            flat = tree.flatten(old)
            scores = grain.reduce([jnp.abs(ahead[p]) for p in paths], name, op)
            gone = grain.reduce([flat[p].astype(jnp.float32) for p in paths], name, "max")
            scores = [jnp.where(g > 0, s, -jnp.inf) for g, s in zip(gone, scores)]
            keep = masks.prune_smallest(scores, table[(t - begin) // every], pools)
            keep = grain.expand(keep, [ahead[p] for p in paths])
            new = {p: k & flat[p] for p, k in zip(paths, keep)}
            mask = tree.map_with_path(lambda path, m: new.get(path, m), old)
            return mask, _zero_moments(inner, mask)

        due = (t >= begin) & (t <= end) & ((t - begin) % every == 0)
        mask, inner = jax.lax.cond(due, cut, lambda operand: operand, (state.mask, inner))
        return _to_zero(updates, params, mask), MaskedState(t + 1, mask, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def get_mask(opt_state: PyTree) -> PyTree:
    """The mask inside an optimizer state, wherever the masked optimizer is nested.

    Raises:
      ValueError: if there is none or more than one.
    """
    return _find(opt_state).mask


def set_mask(opt_state: PyTree, mask: PyTree) -> PyTree:
    """The optimizer state with another mask, and zero moments where it removes.

    Raises:
      ValueError: if there is no masked state, or the mask does not match it.
    """
    state = _find(opt_state)
    masks.check_mask(state.mask, mask)
    mask = masks._like(state.mask, jax.tree.map(lambda m: jnp.array(m, bool), mask))
    new = state._replace(mask=mask, inner=_zero_moments(state.inner, mask))
    return jax.tree.map(
        lambda node: new if isinstance(node, MaskedState) else node,
        opt_state,
        is_leaf=lambda node: isinstance(node, MaskedState),
    )


def _find(opt_state: PyTree) -> MaskedState:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, MaskedState))
    found = [node for node in nodes if isinstance(node, MaskedState)]
    if len(found) != 1:
        raise ValueError(
            f"expected one masked optimizer in the state, found {len(found)}; wrap the optimizer "
            "with pruning.masked or pruning.gradual"
        )
    return found[0]


def _zero(values: PyTree, mask: PyTree) -> PyTree:
    return jax.tree.map(lambda v, m: jnp.where(m, v, jnp.zeros_like(v)), values, mask)


def _to_zero(updates: PyTree, params: PyTree, mask: PyTree) -> PyTree:
    return jax.tree.map(lambda u, w, m: jnp.where(m, u, -w.astype(u.dtype)), updates, params, mask)


def _zero_moments(state: PyTree, mask: PyTree) -> PyTree:
    """Zeros a masked weight's entry in every leaf of the state that belongs to the weight.

    A leaf belongs to a parameter when its path ends with the parameter's path and it has its shape:
    moments, traces, accumulated gradients and averages, also under `optax.masked` or
    `optax.multi_transform`, whose trees have holes.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(mask)
    by_path = {tuple(map(str, path)): m for path, m in flat}

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = tuple(map(str, path))
        for start in range(len(keys) + 1):
            m = by_path.get(keys[start:])
            if m is not None and np.shape(leaf) == m.shape:
                return jnp.where(m, leaf, jnp.zeros_like(leaf))
        return leaf

    return jax.tree_util.tree_map_with_path(one, state)
