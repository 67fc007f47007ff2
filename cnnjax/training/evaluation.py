"""Exact evaluation over a data set, and exact BatchNorm statistics for given parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax.training.losses import label_rank, softmax_cross_entropy
from cnnjax.training.state import (
    Network,
    TrainState,
    averaged,
    cast_floats,
    derive_rngs,
    model_stats,
)
from cnnjax.training.step import Context, Hooks, StepConfig
from cnnjax.tree import flatten, map_with_path

PyTree = Any
_IN_FLIGHT = 4  # batches dispatched and not yet evaluated
EvalStep = Callable[[TrainState, PyTree], dict[str, Any]]


def make_eval_step(
    network: Network,
    *,
    config: StepConfig | None = None,
    hooks: Hooks | None = None,
    predict: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    ema: bool = False,
    mesh: Any = None,
) -> EvalStep:
    """Builds the jitted evaluation of one batch.

    Args:
      network: static side.
      config: its ``compute_dtype`` is used.
      hooks: its ``reparam`` and ``prepare`` are used, with ``train`` false and no random key.
      predict: ``(model, batch) -> logits (n, c)``; default ``model(batch["image"])``.
      ema: evaluate the moving averages.
      mesh: data-parallel mesh; the sums are then replicated on it.

    Returns:
      ``eval_step(state, batch) -> sums`` over the batch: ``count``, ``loss`` (nats), ``top1``,
      ``top5``. ``batch["weight"]`` ``(n,)`` leaves padding out with zeros.
    """
    config, hooks = config or StepConfig(), hooks or Hooks()

    def sums(params: PyTree, stats: PyTree, extra: PyTree, step: Any, batch: PyTree) -> Any:
        if hooks.prepare is not None:
            batch = hooks.prepare(batch, None, False)
        if hooks.reparam is not None:
            context = Context(step=step, key=None, params=params, extra=extra, train=False)
            params = hooks.reparam(params, context)
        model = network.model(params, stats, train=False, dtype=config.compute_dtype)
        if config.compute_dtype is not None:
            batch = {**batch, "image": cast_floats(batch["image"], config.compute_dtype)}
        if predict is None:
            logits = model(batch["image"])
        else:
            logits = predict(model, batch)
        labels = batch["label"]
        weight = batch.get("weight")
        if weight is None:
            weight = jnp.ones(logits.shape[:1], jnp.float32)
        weight = weight.astype(jnp.float32)
        rank = label_rank(logits, labels)
        loss = softmax_cross_entropy(logits, labels)
        return {
            "count": jnp.sum(weight),
            # a padded row may hold anything, even what makes its loss infinite
            "loss": jnp.sum(jnp.where(weight > 0, loss, 0.0) * weight),
            "top1": jnp.sum((rank < 1) * weight),
            "top5": jnp.sum((rank < 5) * weight),
        }

    shardings = {}
    if mesh is not None:
        shardings["out_shardings"] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    jitted = jax.jit(sums, **shardings)

    def eval_step(state: TrainState, batch: PyTree) -> dict[str, Any]:
        params, stats = averaged(state) if ema else (state.params, state.stats)
        return jitted(params, stats, state.extra, state.step, batch)

    return eval_step


def evaluate(
    eval_step: EvalStep,
    state: TrainState,
    batches: Iterable[Mapping[str, Any]],
    *,
    put: Callable[[Any], Any] | None = None,
) -> dict[str, float]:
    """Evaluates every batch and returns exact means.

    Sums of a batch are added on the host in double precision; batches are dispatched without
    waiting for each other.

    Args:
      eval_step: from `make_eval_step`.
      state: the training state.
      batches: host batches; a shorter last batch compiles once more, so pad it (``weight``).
        If they have a ``reset`` method (`cnnjax.data.Loader`), it is called first.
      put: places a host batch on the devices, e.g. `shard_batch` with a mesh.

    Returns:
      ``{"loss", "top1", "top5", "count"}``; top-1 and top-5 in [0, 1].

    Raises:
      ValueError: if there is no example at all.
    """
    if hasattr(batches, "reset"):
        batches.reset()  # type: ignore[attr-defined]
    pending: list[Any] = []
    for batch in batches:
        pending.append(eval_step(state, put(batch) if put else batch))
        if len(pending) > _IN_FLIGHT:  # a fast host must not fill the device with batches
            jax.block_until_ready(pending[-1 - _IN_FLIGHT])
    totals: dict[str, float] = {}
    for part in jax.device_get(pending):
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    count = totals.pop("count", 0.0)
    if count <= 0:
        raise ValueError("nothing to evaluate: no batches, or every weight is zero")
    return {**{name: value / count for name, value in totals.items()}, "count": count}


def _statistics_network(network: Network, params: PyTree, stats: PyTree) -> Any:
    """Graph definition whose BatchNorms write the plain statistics of the batch."""
    model = network.model(params, stats, train=False)
    model = nnx.view(model, use_running_average=False, raise_if_not_found=False)
    for path, module in nnx.iter_graph(model):
        if not isinstance(module, nnx.Module):
            continue
        own = [v for v in vars(module).values() if isinstance(v, nnx.BatchStat)]
        if not own:
            continue
        where = "/".join(str(p) for p in path)
        if not isinstance(getattr(module, "momentum", None), (int, float)):
            raise ValueError(
                f"{type(module).__name__} at {where!r} has running statistics but no numeric "
                "`momentum`; cannot recalibrate it"
            )
        module.momentum = 0.0  # new = 0 * old + 1 * batch: exact
        if hasattr(module, "use_running_average"):
            module.use_running_average = False
    graphdef, _, _, _ = nnx.split(model, nnx.Param, nnx.RngState, ...)
    return graphdef


def recalibrate_batchnorm(
    network: Network,
    params: PyTree,
    stats: PyTree,
    batches: Iterable[Any],
    *,
    prepare: Callable[..., Any] | None = None,
) -> PyTree:
    """BatchNorm statistics of the given parameters, averaged exactly over batches.

    Every batch runs forward once with BatchNorm on batch statistics and dropout off. Means are
    averaged over examples; variances by the law of total variance, so that the first layer gets
    the mean and variance of the whole data. Needed after pruning, weight averaging, or any edit of
    parameters ("PreciseBN": Wu and Johnson 2021, 2105.07576, section 3).

    Args:
      network: static side.
      params: nested dict of parameters.
      stats: nested dict of statistics; replaced where they belong to BatchNorm.
      batches: images ``(n, h, w, c)`` or batches with ``"image"``; no padding among them.
      prepare: as in `Hooks`; called with ``(batch, None, False)``, so batches must be dicts.

    Returns:
      New statistics of the same structure; leaves that no BatchNorm owns are as given.

    Raises:
      ValueError: no batch, or a statistic whose module has no ``momentum``.
    """
    graphdef = _statistics_network(network, params, stats)

    network_rngs = derive_rngs(network.rngs, jax.random.key(0))

    @jax.jit
    def batch_stats(params: PyTree, stats: PyTree, batch: Any) -> PyTree:
        if prepare is not None:
            batch = prepare(batch, None, False)
        image = batch["image"] if isinstance(batch, Mapping) else batch
        model = nnx.merge(graphdef, params, network_rngs, stats, copy=True)
        model(image)
        return model_stats(model)

    owned = _batch_stat_paths(network, params, stats)
    if not owned:
        return stats
    total = 0
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        new_stats = flatten(jax.device_get(batch_stats(params, stats, batch)))
        flat = {k: np.asarray(v, np.float64) for k, v in new_stats.items() if k in owned}
        n = int(np.shape(batch["image"] if isinstance(batch, Mapping) else batch)[0])
        total += n
        for path, value in flat.items():
            mean = flat.get(_sibling(path, "mean")) if path.endswith("var") else None
            value = value if mean is None else value + mean**2
            sums[path] = sums.get(path, 0.0) + n * value
    if not total:
        raise ValueError("BatchNorm recalibration needs at least one batch")
    means = {path: value / total for path, value in sums.items()}

    def updated(path: str, old: Any) -> Any:
        if path not in means:
            return old
        value = means[path]
        if path.endswith("var") and _sibling(path, "mean") in means:
            value = np.maximum(value - means[_sibling(path, "mean")] ** 2, 0.0)
        return jnp.asarray(value, old.dtype)

    return map_with_path(updated, stats)


def _sibling(path: str, name: str) -> str:
    return "/".join([*path.split("/")[:-1], name])


def _batch_stat_paths(network: Network, params: PyTree, stats: PyTree) -> set[str]:
    model = network.model(params, stats)
    return set(flatten(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))))
