"""Masks that change both ways while training: dynamic network surgery, RigL and SET.

Guo, Yao, Chen, "Dynamic network surgery for efficient DNNs", NIPS 2016, arXiv 1608.04493; Evci,
Gale, Menick, Castro, Elsen, "Rigging the lottery", ICML 2020, arXiv 1911.11134; Mocanu et al.,
"Scalable training of artificial neural networks with adaptive sparse connectivity", 2018, arXiv
1707.04780 (SET).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from cnnjax import tree
from cnnjax.errors import did_you_mean
from cnnjax.pruning import masks
from cnnjax.pruning.transforms import MaskedState, _to_zero, _zero, _zero_moments, get_mask

PyTree = Any


def surgery_mask(
    w: Float[Array, ...], mask: Bool[Array, ...], lower: Any, upper: Any
) -> Bool[Array, ...]:
    """``0 if |w| < a; unchanged if a <= |w| < b; 1 if |w| >= b``.

    Args:
      w: weights, those of removed connections included.
      mask: T.
      lower: a.
      upper: b, not below a; equal thresholds re-threshold.

    Raises:
      ValueError: thresholds in the wrong order (where they are not traced).
    """
    _check_order(lower, upper)
    size = jnp.abs(w)
    return jnp.where(size < lower, False, jnp.where(size >= upper, True, mask))


def _check_order(lower: Any, upper: Any) -> None:
    traced = isinstance(lower, jax.core.Tracer) or isinstance(upper, jax.core.Tracer)
    if not traced and np.any(np.asarray(lower) > np.asarray(upper)):
        raise ValueError(
            f"the pruning threshold a={lower} is above the splicing threshold b={upper}; "
            "need a <= b"
        )


def spliced(params: PyTree, mask: PyTree) -> PyTree:
    """The network's weights ``W * T``, with gradients that reach *all* of W.

    The gradient by W is exactly that by the effective weight, also where T is 0: a removed
    connection keeps moving and may come back. Use it in `Hooks(reparam=...)`, see `surgery_hooks`.
    """

    def one(w: Any, m: Any) -> Any:
        return w + jax.lax.stop_gradient(jnp.where(m, w, jnp.zeros_like(w)) - w)

    return jax.tree.map(one, params, mask)


class SurgeryState(NamedTuple):
    """State of dynamic network surgery.

    Attributes:
      lower: a of each pruned path, fixed at ``init``.
      upper: b.
      masked: updates done, T, and the optimizer's own state.
    """

    lower: dict[str, Float[Array, ""]]
    upper: dict[str, Float[Array, ""]]
    masked: MaskedState


def dynamic_network_surgery(
    optimizer: optax.GradientTransformation,
    rate: float | int | Mapping[str, float | int],
    *,
    gamma: float = 1e-4,
    power: float = 1.0,
    stop: int | None = None,
    width: tuple[float, float] = (0.9, 1.1),
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    bias: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Prunes and splices while training.

    Updates go to all weights, also removed ones: pass the gradient by the *effective* weights
    (`spliced`), take `get_mask` of the state for T, and ``update(..., key=key)`` for its coin. The
    thresholds are ``a = 0.9 max(mu + c sigma, 0)`` and ``b = 1.1 max(mu + c sigma, 0)`` with mean
    and standard deviation of the initial non-zero magnitudes of the layer (its bias included), as
    in the released code. Weight decay on removed weights makes pruning irreversible: don't.

    Args:
      optimizer: any optax transformation, complete.
      rate: c, the one knob for sparsity, or ``{glob of kernels: c}``.
      gamma: the mask is renewed with probability ``(1 + gamma t)^(-power)`` at update t.
      power: see ``gamma``.
      stop: no more changes of the mask from this update on; None: never.
      width: factors of a and b.
      include: globs of kernels to prune.
      exclude: globs of kernels to leave alone.
      bias: prune the biases beside the kernels too, by the same thresholds.

    Raises:
      ValueError: thresholds in the wrong order; globs without a match; at ``update``, without
        ``params`` or ``key``.
    """
    if not 0 <= width[0] <= width[1]:
        raise ValueError(f"width must be (a, b) with 0 <= a <= b, got {width}")
    if gamma < 0 or power < 0:
        raise ValueError(f"gamma and power must not be negative, got {gamma} and {power}")
    optimizer = optax.with_extra_args_support(optimizer)
    table = rate if isinstance(rate, Mapping) else {"**": rate}

    def init(params: PyTree) -> Any:
        flat = tree.flatten(params)
        paths = masks.candidates(params, include, exclude)
        tree.check_patterns(tuple(table), paths, what="rate pattern")
        lower, upper = {}, {}
        for path in paths:
            c = next((v for g, v in table.items() if tree.glob_match(g, path)), None)
            if c is None:
                continue
            beside = _beside(path, flat) if bias else None
            sizes = [jnp.abs(flat[p]).ravel() for p in (path, beside) if p is not None]
            sizes = jnp.concatenate(sizes).astype(jnp.float32)
            n = jnp.maximum(jnp.sum(sizes > 0), 1)
            mean = jnp.sum(sizes) / n
            spread = jnp.where(sizes > 0, jnp.square(sizes - mean), 0)
            base = jnp.maximum(mean + c * jnp.sqrt(jnp.sum(spread) / n), 0)
            for p in (path, beside):
                if p is not None:
                    lower[p], upper[p] = width[0] * base, width[1] * base
        own = MaskedState(jnp.zeros((), jnp.int32), masks.full_mask(params), optimizer.init(params))
        return SurgeryState(lower, upper, own)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, *, key: Any = None, **extra: Any
    ) -> tuple[PyTree, SurgeryState]:
        if params is None or key is None:
            raise ValueError("network surgery needs update(grads, state, params, key=key)")
        count, mask, inner = state.masked
        updates, inner = optimizer.update(updates, inner, params, key=key, **extra)
        ahead = tree.flatten(optax.apply_updates(params, updates))
        chance = (1.0 + gamma * count.astype(jnp.float32)) ** (-power)
        due = jax.random.uniform(jax.random.fold_in(key, 7)) < chance
        due = due if stop is None else due & (count < stop)

        def one(path: str, m: Any) -> Any:
            if path not in state.lower:
                return m
            new = surgery_mask(ahead[path], m, state.lower[path], state.upper[path])
            return jnp.where(due, new, m)

        mask = tree.map_with_path(one, mask)
        return updates, state._replace(masked=MaskedState(count + 1, mask, inner))

    return optax.GradientTransformationExtraArgs(init, update)


def surgery_hooks(loss: Any = None) -> Any:
    """Hooks for `cnnjax.training`: forward with ``W * T``, T kept in ``state.extra["mask"]``.

    Create the state with ``extra={"mask": masks.full_mask(params)}``.
    """
    from cnnjax import training

    def reparam(params: PyTree, context: Any) -> PyTree:
        return spliced(params, context.extra["mask"])

    def post(state: Any, context: Any, metrics: Any) -> Any:
        del context, metrics
        return state.replace(extra={**state.extra, "mask": get_mask(state.opt_state)})

    own: Any = {} if loss is None else {"loss": loss}
    return training.Hooks(reparam=reparam, post_update=post, **own)


def erdos_renyi(
    params: PyTree,
    density: float,
    *,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
) -> dict[str, float]:
    """Densities of layers in proportion to ``sum(shape) / prod(shape)``, capped at 1 (ERK).

    Args:
      params: any Flax tree.
      density: of all kernels together, in (0, 1].
      include: globs of kernels.
      exclude: globs of kernels.

    Returns:
      ``{path: density}``.

    Raises:
      ValueError: a density out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    flat = tree.flatten(params)
    shapes = {p: flat[p].shape for p in masks.candidates(params, include, exclude)}
    sizes = {p: math.prod(s) for p, s in shapes.items()}
    raw = {p: sum(s) / sizes[p] for p, s in shapes.items()}
    full: set[str] = set()
    while True:
        left = density * sum(sizes.values()) - sum(sizes[p] for p in full)
        share = sum(raw[p] * sizes[p] for p in raw if p not in full)
        scale = left / share if share else 0.0
        over = {p for p in raw if p not in full and scale * raw[p] > 1}
        if not over:
            return {p: 1.0 if p in full else scale * raw[p] for p in raw}
        full |= over


def random_mask(key: jax.Array, params: PyTree, densities: Mapping[str, float]) -> PyTree:
    """A random mask with ``round(density * n)`` (at least 1) weights in each named leaf.

    Raises:
      KeyError: a path that names no leaf.
      ValueError: a density outside (0, 1].
    """
    flat = tree.flatten(params)
    out = {}
    for i, (path, density) in enumerate(densities.items()):
        if path not in flat:
            raise KeyError(f"no leaf {path!r}.{did_you_mean(path, flat)}")
        if not 0 < density <= 1:
            raise ValueError(
                f"density of {path!r} must lie in (0, 1], got {density}: it is the fraction of "
                "weights to keep"
            )
        w = flat[path]
        keep = max(1, round(density * w.size))
        scores = jax.random.uniform(jax.random.fold_in(key, i), w.shape)
        (out[path],) = masks.prune_smallest([scores], jnp.asarray([w.size - keep]), (0,))
    return tree.map_with_path(lambda p, w: out.get(p, jnp.ones(w.shape, bool)), params)


class RegrowthState(NamedTuple):
    """State of sparse training with regrowth: a masked state."""

    masked: MaskedState


def regrowth(
    optimizer: optax.GradientTransformation,
    mask: PyTree,
    *,
    every: int,
    stop: int,
    fraction: float = 0.3,
    method: str = "rigl",
) -> optax.GradientTransformationExtraArgs:
    """Sparse from the start: drops the smallest weights and grows others, the number kept.

    Every so many updates (in place of none: the update is made first) a cosine-decayed fraction of
    each layer's weights is dropped by magnitude, and as many grow from zero: where the gradient is
    largest (``rigl``) or anywhere (``set``). A dropped weight may come straight back.

    Args:
      optimizer: any optax transformation, complete.
      mask: the first mask, e.g. `random_mask` with `erdos_renyi` densities. Leaves without a False
        stay dense.
      every: updates between changes.
      stop: no change from this update on.
      fraction: dropped at first, in (0, 1); decays to 0 at ``stop``.
      method: ``rigl`` or ``set`` (needs ``update(..., key=key)``).

    Raises:
      ValueError: numbers out of range, an unknown method; at ``init`` a mask that does not match;
        at ``update`` without ``params``.
    """
    if method not in ("rigl", "set"):
        raise ValueError(f"unknown method {method!r}.{did_you_mean(method, ('rigl', 'set'))}")
    if every < 1 or stop < every or not 0 < fraction < 1:
        raise ValueError(
            f"need every >= 1, stop >= every, 0 < fraction < 1; got {every}, {stop}, {fraction}"
        )
    optimizer = optax.with_extra_args_support(optimizer)
    masks_host = {p: np.asarray(m) for p, m in tree.flatten(mask).items()}
    paths = [p for p, m in masks_host.items() if not m.all()]
    alive_counts = jnp.asarray([masks_host[p].sum() for p in paths], jnp.int32)
    sizes = jnp.asarray([masks_host[p].size for p in paths], jnp.int32)
    pools = tuple(range(len(paths)))

    def init(params: PyTree) -> Any:
        masks.check_mask(params, mask)
        own = masks._like(params, jax.tree.map(lambda m: jnp.array(m, bool), mask))
        return RegrowthState(MaskedState(jnp.zeros((), jnp.int32), own, optimizer.init(params)))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, *, key: Any = None, **extra: Any
    ) -> tuple[PyTree, RegrowthState]:
        if params is None or (method == "set" and key is None):
            raise ValueError("regrowth needs update(grads, state, params); set also key=key")
        count, old, inner = state.masked
        dense = tree.flatten(updates)
        updates, inner = optimizer.update(_zero(updates, old), inner, params, key=key, **extra)
        updates = _to_zero(updates, params, old)

        def change(operand: Any) -> Any:
            old, inner = operand
            ahead = tree.flatten(optax.apply_updates(params, updates))
            now = tree.flatten(old)
            decay = 0.5 * (1 + jnp.cos(jnp.pi * count / stop))
            drop = jnp.floor(fraction * decay * alive_counts).astype(jnp.int32)
            # the dead first, then the smallest of the living
            size = [jnp.where(now[p], jnp.abs(ahead[p]), -1.0) for p in paths]
            stay = masks.prune_smallest(size, sizes - alive_counts + drop, pools)
            if method == "rigl":
                wish = [jnp.abs(dense[p]) for p in paths]
            else:
                keys = jax.random.split(jax.random.fold_in(key, 11), len(paths))
                wish = [jax.random.uniform(k, now[p].shape) for k, p in zip(keys, paths)]
            wish = [jnp.where(s, jnp.inf, w) for s, w in zip(stay, wish)]
            grown = masks.prune_smallest(wish, sizes - alive_counts, pools)
            new = dict(zip(paths, grown))
            fresh = {p: new[p] & stay[i] for i, p in enumerate(paths)}
            mask = tree.map_with_path(lambda p, m: new.get(p, m), old)
            survivors = tree.map_with_path(lambda p, m: fresh.get(p, m), old)
            # grown weights start from zero, without moments
            return mask, survivors, _zero_moments(inner, survivors)

        due = (count > 0) & (count % every == 0) & (count < stop)
        mask, survivors, inner = jax.lax.cond(
            due, change, lambda operand: (operand[0], operand[0], operand[1]), (old, inner)
        )
        updates = _to_zero(updates, params, survivors)
        return updates, RegrowthState(MaskedState(count + 1, mask, inner))

    return optax.GradientTransformationExtraArgs(init, update)


def _beside(path: str, flat: Mapping[str, Any]) -> str | None:
    name = path.rpartition("/")[0] + "/bias" if "/" in path else "bias"
    leaf = flat.get(name)
    return name if leaf is not None and leaf.shape == flat[path].shape[-1:] else None
