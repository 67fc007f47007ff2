"""Optimizers and learning-rate schedules by name, from frozen configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from cnnjax.errors import did_you_mean
from cnnjax.tree import check_patterns, flatten, map_with_path, match_any

PyTree = Any
Schedule = Callable[[Any], Any]
Number = int | float

_SCHEDULES = ("constant", "cosine", "linear", "polynomial", "step")
_OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "lars")
_UNITS = ("steps", "epochs")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A learning rate over time: linear warm-up, then a named decay.

    Attributes:
      name: ``constant``, ``cosine``, ``linear``, ``polynomial`` or ``step``.
      base: learning rate after warm-up.
      unit: ``"steps"`` or ``"epochs"``: what ``warmup``, ``boundaries`` and ``every`` count.
      warmup: length of the linear rise from ``warmup_start * base`` to ``base``; it is part of
        the total length.
      warmup_start: first factor of the warm-up.
      final: last learning rate as a factor of ``base`` (cosine, linear, polynomial).
      power: of ``polynomial``.
      boundaries: of ``step``: the rate is multiplied by ``gamma`` at each, counted from 0.
      every: of ``step``: instead of boundaries, multiply by ``gamma`` every so often.
      gamma: factor of ``step``.
    """

    name: str = "cosine"
    base: Number = 0.1
    unit: str = "epochs"
    warmup: Number = 0.0
    warmup_start: Number = 0.0
    final: Number = 0.0
    power: Number = 1.0
    boundaries: Sequence[Number] = ()
    every: Number = 0.0
    gamma: Number = 0.1

    def __post_init__(self) -> None:
        if self.name not in _SCHEDULES:
            raise ValueError(
                f"unknown schedule {self.name!r}.{did_you_mean(self.name, _SCHEDULES)}"
            )
        if self.unit not in _UNITS:
            raise ValueError(f"unit must be one of {_UNITS}, got {self.unit!r}")
        if self.warmup < 0 or self.base < 0:
            raise ValueError(f"warmup and base must not be negative, got {self}")
        if self.name == "step" and bool(self.boundaries) == bool(self.every):
            raise ValueError("schedule 'step' needs either boundaries or every")
        if list(self.boundaries) != sorted(self.boundaries):
            raise ValueError(f"boundaries must rise, got {self.boundaries}")


def build_schedule(
    config: ScheduleConfig, *, total_steps: int, steps_per_epoch: int | None = None
) -> Schedule:
    """The schedule as a pure function of the step (float32 scalar out).

    Args:
      config: see `ScheduleConfig`.
      total_steps: length of the run; cosine, linear and polynomial end there.
      steps_per_epoch: needed if the unit is epochs and something is counted in it.

    Raises:
      ValueError: if ``steps_per_epoch`` is needed and missing, or warm-up outlasts the run.
    """
    counted = config.warmup or config.boundaries or config.every
    if config.unit == "epochs" and counted and not steps_per_epoch:
        raise ValueError("a schedule counted in epochs needs steps_per_epoch")
    scale = float(steps_per_epoch or 1) if config.unit == "epochs" else 1.0
    warmup = round(config.warmup * scale)
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if warmup > total_steps:
        raise ValueError(f"warm-up of {warmup} steps outlasts the run of {total_steps}")
    length = max(total_steps - warmup, 1)
    edges = tuple(round(b * scale) for b in config.boundaries)
    every = max(round(config.every * scale), 1)

    def decay(t: Any) -> Any:
        u = jnp.clip((t - warmup) / length, 0.0, 1.0)
        if config.name == "cosine":
            return config.final + (1.0 - config.final) * 0.5 * (1.0 + jnp.cos(jnp.pi * u))
        if config.name == "linear":
            return 1.0 - (1.0 - config.final) * u
        if config.name == "polynomial":
            return config.final + (1.0 - config.final) * (1.0 - u) ** config.power
        if config.name == "step":
            if edges:
                passed = jnp.sum(t >= jnp.asarray(edges, jnp.float32))
            else:
                passed = jnp.floor(t / every)
            return jnp.asarray(config.gamma, jnp.float32) ** passed
        return jnp.ones((), jnp.float32)

    def schedule(step: Any) -> Any:
        t = jnp.asarray(step, jnp.float32)
        factor = decay(t)
        if warmup:
            rise = config.warmup_start + (1.0 - config.warmup_start) * t / warmup
            factor = jnp.where(t < warmup, rise, factor)
        return config.base * factor

    return schedule


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by name.

    Attributes:
      name: ``sgd``, ``adam``, ``adamw``, ``rmsprop`` (TensorFlow form) or ``lars``.
      momentum: of sgd, rmsprop and lars; 0 turns it off.
      nesterov: Nesterov's form (sgd, lars).
      b1, b2, eps: of adam and adamw (``eps`` 1e-8); rmsprop's ``eps`` sits inside the root.
      decay: of rmsprop's mean square.
      weight_decay: ``sgd``, ``adam``, ``rmsprop``, ``lars``: added to the gradient before
        momentum (the L2 penalty ``weight_decay / 2 * |w|^2``); ``adamw``: decoupled.
      decay_include, decay_exclude: path globs of what decays. Default: all but biases and
        normalization scales.
      clip_norm: largest global norm of the gradient (before weight decay); None: no clipping.
      clip_value: largest absolute value of a gradient's entry; None: no clipping.
      frozen: path globs of parameters that do not move.
      multi_steps: apply an update every so many calls with the mean gradient
        (`optax.MultiSteps`); the schedule then counts updates.
    """

    name: str = "sgd"
    momentum: Number = 0.9
    nesterov: bool = False
    b1: Number = 0.9
    b2: Number = 0.999
    eps: Number | None = None
    decay: Number = 0.9
    weight_decay: Number = 0.0
    decay_include: Sequence[str] = ("**",)
    decay_exclude: Sequence[str] = ("**/bias", "**/scale")
    clip_norm: Number | None = None
    clip_value: Number | None = None
    frozen: Sequence[str] = ()
    multi_steps: int = 1

    def __post_init__(self) -> None:
        if self.name not in _OPTIMIZERS:
            near = did_you_mean(self.name, _OPTIMIZERS)
            raise ValueError(f"unknown optimizer {self.name!r}.{near}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.multi_steps < 1:
            raise ValueError(f"multi_steps must be at least 1, got {self.multi_steps}")


def path_mask(include: Any, exclude: Any = (), *, strict: bool = False) -> Callable[[PyTree], Any]:
    """A function ``tree -> tree of bools`` for `optax.masked` and weight-decay masks.

    Unlike `cnnjax.tree.select` a glob may match nothing (a network without biases is fine)
    unless ``strict``.
    """

    def mask(tree: PyTree) -> PyTree:
        if strict:
            check_patterns(include, list(flatten(tree)))
        return map_with_path(
            lambda path, _: match_any(include, path) and not match_any(exclude, path), tree
        )

    return mask


def build_optimizer(
    config: OptimizerConfig, learning_rate: Number | Schedule
) -> optax.GradientTransformation:
    """The optax transformation of a configuration.

    Args:
      config: see `OptimizerConfig`.
      learning_rate: number or schedule from `build_schedule`.

    Returns:
      Clipping, weight decay, scaling, momentum and learning rate, chained in this order; frozen
      parameters get zero updates.
    """
    c = config
    decay_mask = path_mask(c.decay_include, c.decay_exclude)
    parts: list[optax.GradientTransformation] = []
    if c.clip_value is not None:
        parts.append(optax.clip(c.clip_value))
    if c.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(c.clip_norm))
    if c.weight_decay and c.name not in ("adamw", "lars"):
        parts.append(optax.add_decayed_weights(c.weight_decay, mask=decay_mask))
    momentum = c.momentum or None
    if c.name == "sgd":
        parts.append(optax.sgd(learning_rate, momentum=momentum, nesterov=c.nesterov))
    elif c.name == "adam":
        parts.append(
            optax.adam(learning_rate, b1=c.b1, b2=c.b2, eps=1e-8 if c.eps is None else c.eps)
        )
    elif c.name == "adamw":
        parts.append(
            optax.adamw(
                learning_rate,
                b1=c.b1,
                b2=c.b2,
                eps=1e-8 if c.eps is None else c.eps,
                weight_decay=c.weight_decay,
                mask=decay_mask,
            )
        )
    elif c.name == "rmsprop":
        parts.append(
            _rmsprop_tf(learning_rate, c.decay, 1e-3 if c.eps is None else c.eps, momentum)
        )
    else:
        parts.append(
            optax.lars(
                learning_rate,
                weight_decay=c.weight_decay,
                weight_decay_mask=decay_mask,
                trust_ratio_mask=decay_mask,
                momentum=c.momentum,
                nesterov=c.nesterov,
            )
        )
    tx = optax.chain(*parts)
    if c.multi_steps > 1:
        tx = optax.MultiSteps(tx, every_k_schedule=c.multi_steps).gradient_transformation()
    if c.frozen:
        tx = optax.partition(
            {"train": tx, "frozen": optax.set_to_zero()},
            lambda tree: map_with_path(
                lambda path, _: "frozen" if match_any(c.frozen, path) else "train", tree
            ),
        )
    return tx


def _rmsprop_tf(
    learning_rate: Number | Schedule, decay: Number, eps: Number, momentum: Number | None
) -> optax.GradientTransformation:
    """RMSProp as TensorFlow writes it: ``ms`` starts at 1, ``eps`` is inside the root, and the
    learning rate is applied before momentum: ``mom = m * mom + lr * g / sqrt(ms + eps)``.
    """
    parts = [
        optax.scale_by_rms(decay=decay, eps=eps, initial_scale=1.0, eps_in_sqrt=True),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if momentum:
        parts.append(optax.trace(decay=momentum))
    return optax.chain(*parts)
