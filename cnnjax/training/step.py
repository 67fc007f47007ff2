"""One pure training step, jitted over plain dicts with donated state.

What a method may plug in is a `Hooks`: the loss, a penalty on the parameters, a map from what is
trained to the network's parameters (masks, gates, quantizers), a preparation of the batch on the
device, and an edit of the state after the update. Numbers that shape the compiled program are a
`StepConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cnnjax import ops
from cnnjax.training.losses import classification_loss
from cnnjax.training.state import Network, TrainState, cast_floats, model_stats

PyTree = Any

_NOT_CAST = ("label", "soft_label", "weight")  # of a batch
# which forward values the backward pass keeps; everything else is computed again
_REMAT = ("none", "convs", "full")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a hook may look at besides its main arguments.

    Attributes:
      step: number of finished steps, int32 scalar.
      key: random key of this step and microbatch; None in evaluation without one.
      params: what is trained, before ``reparam``, in its own dtype.
      extra: the state's free slot.
      constants: what `make_train_step` was given, e.g. a teacher's arrays.
      train: mode (static).
    """

    step: Any
    key: Any
    params: PyTree
    extra: PyTree
    constants: PyTree = None
    train: bool = dataclasses.field(default=True, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a method plugs into the step. All are pure and run inside jit.

    Attributes:
      loss: ``(model, batch, context) -> (scalar, metrics)``; metrics is a dict of scalars.
      penalty: ``(params, context) -> scalar`` added to the loss; params as trained, float32.
      reparam: ``(params, context) -> params of the network``; also used in evaluation.
      prepare: ``(batch, key, train) -> batch``, e.g. normalization or mixup on the device.
      post_update: ``(state, context, metrics) -> state`` after the optimizer, e.g. a projection.
    """

    loss: Callable[..., Any] = dataclasses.field(default_factory=classification_loss)
    penalty: Callable[..., Any] | None = None
    reparam: Callable[..., Any] | None = None
    prepare: Callable[..., Any] | None = None
    post_update: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Numbers that shape the compiled step.

    Attributes:
      accumulate: microbatches per step, run one after another; gradients are averaged.
      steps_per_call: steps in one call of the jitted function (`jax.lax.scan`); batches come
        stacked on a leading axis. Pays where dispatch costs more than the step (tiny dense
        networks: benchmarks/train_step.py); never for convolutions on a CPU, whose fast form XLA
        does not use inside a loop.
      compute_dtype: e.g. ``"bfloat16"``: parameters and images are cast for the forward and
        backward pass; parameters, statistics and optimizer stay float32. None: no cast.
      remat: ``"none"``; ``"convs"`` keeps the outputs of convolutions and matrix products and
        computes normalization and activation again in the backward pass; ``"full"`` keeps none.
      ema_decay: decay of the moving averages; None: the state keeps none.
      ema_warmup: use ``min(decay, (1 + t) / (10 + t))`` at step ``t``, as TensorFlow does.
      grad_norm: report the global norm of the gradient as a metric.
    """

    accumulate: int = 1
    steps_per_call: int = 1
    compute_dtype: str | None = None
    remat: str = "none"
    ema_decay: int | float | None = None
    ema_warmup: bool = True
    grad_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("accumulate", "steps_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.remat not in _REMAT:
            raise ValueError(f"remat must be one of {_REMAT}, got {self.remat!r}")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.compute_dtype is not None and not jnp.issubdtype(
            jnp.dtype(self.compute_dtype), jnp.floating
        ):
            raise ValueError(f"compute_dtype must be a float type, got {self.compute_dtype!r}")


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A jitted step: ``state, metrics = step(state, batch)``; the given state is donated.

    Metrics are device scalars (of shape ``(steps_per_call,)`` if that is above 1): ``loss``
    (penalty included), ``learning_rate`` where the schedule is known, and what the hooks report.
    """

    fn: Callable[..., tuple[TrainState, dict[str, Any]]]
    config: StepConfig
    learning_rate: Callable[[Any], Any] | None = None
    constants: PyTree = None

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Any]]:
        return self.fn(state, batch, self.constants)


def _remat(fn: Callable[..., Any], mode: str) -> Callable[..., Any]:
    if mode == "none":
        return fn
    if mode == "full":
        return jax.checkpoint(fn, policy=jax.checkpoint_policies.nothing_saveable)

    def keep(prim: Any, *_: Any, **__: Any) -> bool:
        return prim.name in ("conv_general_dilated", "dot_general", *ops.FORWARD_PRIMITIVES)

    return jax.checkpoint(fn, policy=keep)


def _microbatches(batch: PyTree, n: int) -> PyTree:
    """``(b, ...) -> (n, b / n, ...)``; strided, so that a sharded batch axis stays in place."""

    def split(a: Any) -> Any:
        if a.shape[0] % n:
            raise ValueError(f"a batch of {a.shape[0]} does not divide into {n} microbatches")
        return jnp.swapaxes(a.reshape(a.shape[0] // n, n, *a.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def make_loss(network: Network, config: StepConfig, hooks: Hooks) -> Callable[..., Any]:
    """``(params, stats, batch, context) -> (scalar, (new stats, metrics))``, to differentiate."""

    def loss_fn(params: PyTree, stats: PyTree, batch: PyTree, context: Context) -> Any:
        context = dataclasses.replace(context, params=params)  # the traced ones
        loss_key, model_key, prepare_key, reparam_key = jax.random.split(context.key, 4)
        if hooks.prepare is not None:
            batch = hooks.prepare(batch, prepare_key, True)
        own = params
        if hooks.reparam is not None:
            own = hooks.reparam(params, dataclasses.replace(context, key=reparam_key))
        if config.compute_dtype is not None:
            batch = {
                k: v if k in _NOT_CAST else cast_floats(v, config.compute_dtype)
                for k, v in batch.items()
            }
        model = network.model(own, stats, key=model_key, train=True, dtype=config.compute_dtype)
        loss, metrics = hooks.loss(model, batch, dataclasses.replace(context, key=loss_key))
        loss = loss.astype(jnp.float32)
        if hooks.penalty is not None:
            penalty = hooks.penalty(params, context)
            metrics = {**metrics, "penalty": penalty}
            loss = loss + penalty
        new_stats = jax.tree.map(lambda new, old: new.astype(old.dtype), model_stats(model), stats)
        return loss, (new_stats, metrics)

    return _remat(loss_fn, config.remat)


def _gradients(
    loss_fn: Callable[..., Any], state: TrainState, batch: PyTree, context: Context, n: int
) -> tuple[Any, PyTree, dict[str, Any], PyTree]:
    """Loss, new statistics, metrics and gradient of the whole batch in ``n`` microbatches."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if n == 1:
        (loss, (stats, metrics)), grads = grad_fn(state.params, state.stats, batch, context)
        return loss, stats, metrics, grads
    micro = _microbatches(batch, n)
    if "weight" in micro:  # the mean over the batch weighs a microbatch by its examples
        share = jnp.sum(micro["weight"].reshape(n, -1).astype(jnp.float32), axis=1)
        share = share / jnp.maximum(jnp.sum(share), 1e-12)
    else:
        share = jnp.full((n,), 1.0 / n, jnp.float32)

    def body(carry: Any, xs: Any) -> Any:
        stats, total = carry
        part, weight, i = xs
        ctx = dataclasses.replace(context, key=jax.random.fold_in(context.key, i))
        (loss, (stats, metrics)), grads = grad_fn(state.params, stats, part, ctx)
        total = jax.tree.map(lambda t, x: t + weight.astype(t.dtype) * x, total, (loss, grads))
        return (stats, total), jax.tree.map(lambda m: m * weight, metrics)

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
    # XLA on a CPU has no fast convolutions inside a loop (measured: 8 times slower)
    (stats, (loss, grads)), metrics = jax.lax.scan(
        body,
        (state.stats, zeros),
        (micro, share, jnp.arange(n)),
        unroll=jax.default_backend() == "cpu",
    )
    return loss, stats, jax.tree.map(lambda m: jnp.sum(m, axis=0), metrics), grads


def _update_ema(config: StepConfig, state: TrainState, params: PyTree, stats: PyTree) -> PyTree:
    if state.ema is None or config.ema_decay is None:
        if (state.ema is None) != (config.ema_decay is None):
            raise ValueError(
                "moving averages need both create_state(ema=True) and StepConfig(ema_decay=...)"
            )
        return None
    decay = jnp.asarray(config.ema_decay, jnp.float32)
    if config.ema_warmup:
        t = state.step.astype(jnp.float32)
        decay = jnp.minimum(decay, (1.0 + t) / (10.0 + t))

    def blend(old: Any, new: Any) -> Any:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        return (old + (1.0 - decay) * (new - old)).astype(old.dtype)

    return jax.tree.map(blend, state.ema, {"params": params, "stats": stats})


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    config: StepConfig | None = None,
    hooks: Hooks | None = None,
    learning_rate: Callable[[Any], Any] | None = None,
    constants: PyTree = None,
    mesh: Any = None,
    donate: bool = True,
) -> TrainStep:
    """Builds the jitted training step.

    The optimizer's ``update`` gets the extra arguments ``value`` (loss), ``key`` and ``extra``
    (the state's slot) if it takes any.

    Args:
      network: static side, from `create_state`.
      optimizer: the transformation that made the state's ``opt_state``.
      config: see `StepConfig`.
      hooks: see `Hooks`; default: cross-entropy.
      learning_rate: the schedule, to report it as a metric and in errors.
      constants: arrays that hooks read (``context.constants``) and nothing changes, such as a
        teacher's; neither compiled in nor saved in checkpoints. With a mesh: `replicate` them.
      mesh: data-parallel mesh; the new state is then kept replicated on it.
      donate: reuse the given state's memory; it cannot be used afterwards.

    Returns:
      ``step(state, batch) -> (state, metrics)``.
    """
    config, hooks = config or StepConfig(), hooks or Hooks()
    tx = optax.with_extra_args_support(optimizer)
    loss_fn = make_loss(network, config, hooks)

    def one_step(
        state: TrainState, batch: PyTree, constants: PyTree
    ) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(state.key, state.step)
        context = Context(state.step, key, state.params, state.extra, constants)
        loss, stats, metrics, grads = _gradients(loss_fn, state, batch, context, config.accumulate)
        metrics = {"loss": loss, **metrics}
        if config.grad_norm:
            metrics["grad_norm"] = optax.global_norm(grads)
        if learning_rate is not None:
            metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
        update_key = jax.random.fold_in(key, 1 << 20)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, value=loss, key=update_key, extra=state.extra
        )
        params = optax.apply_updates(state.params, updates)
        state = state.replace(
            step=state.step + 1,
            params=params,
            stats=stats,
            opt_state=opt_state,
            ema=_update_ema(config, state, params, stats),
        )
        if hooks.post_update is not None:
            context = dataclasses.replace(context, key=jax.random.fold_in(key, (1 << 20) + 1))
            state = hooks.post_update(state, context, metrics)
        return state, metrics

    def many_steps(
        state: TrainState, batches: PyTree, constants: PyTree
    ) -> tuple[TrainState, dict[str, Any]]:
        return jax.lax.scan(lambda s, batch: one_step(s, batch, constants), state, batches)

    fn = one_step if config.steps_per_call == 1 else many_steps
    shardings = {}
    if mesh is not None:
        shardings["out_shardings"] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jitted = jax.jit(fn, donate_argnums=(0,) if donate else (), **shardings)
    return TrainStep(jitted, config, learning_rate, constants)
