"""Keeps the original layer where its factors are not faster on the present device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import graph, surgery
from cnnjax.factorization.modules import factor_module
from cnnjax.factorization.network import factorize
from cnnjax.factorization.survey import LayerPlan, Plan, input_sizes

Timer = Callable[[nnx.Module, nnx.Module, Any], tuple[float, float]]


def time_pair(
    before: nnx.Module, after: nnx.Module, x: Any, *, rounds: int = 7, seconds: float = 2.0
) -> tuple[float, float]:
    """Median seconds of ``before(x)`` and ``after(x)``, called in turns.

    Args:
      before: a module in evaluation mode.
      after: another.
      x: input array, or a tuple of them.
      rounds: calls of each.
      seconds: stop after this long (at least 3 calls of each).
    """
    args = x if isinstance(x, tuple) else (x,)
    found = graph.latencies(
        {"before": before, "after": after}, *args, calls=rounds, warmup=1, seconds=seconds / 2
    )
    return found["before"].median, found["after"].median


@dataclasses.dataclass(frozen=True)
class Measured:
    """A plan that the clock has approved.

    Attributes:
      plan: with the layers kept whose factors are not faster; its entries hold the times.
      network: seconds of the whole (original, factorized) network.
      reverted: layers given back after the whole network was timed.
    """

    plan: Plan
    network: tuple[float, float]
    reverted: tuple[str, ...] = ()


def keep_faster(
    model: nnx.Module,
    decided: Plan,
    example: Any,
    *,
    batch: int | None = None,
    margin: float = 0.0,
    timer: Timer = time_pair,
    key: Any = None,
) -> Measured:
    """Times every planned layer and the whole network; gives back what is not faster.

    First each layer against its factors at its own input size (layers of one shape are timed
    once). Then the whole network: while the factorized one is slower than the original, the half
    of its layers that save least is given back; with none left the two are the same network.

    Args:
      model: any NNX network; timed in evaluation mode.
      decided: from `plan`.
      example: input of the network: arrays, or shapes that are filled with random numbers.
      batch: images per call; default: the example's.
      margin: share of the original's time that the factors must save.
      timer: ``(before, after, x) -> seconds of each``.
      key: of `factorize`.

    Raises:
      ValueError: for a margin outside [0, 1).
    """
    if not 0 <= margin < 1:
        raise ValueError(f"margin is {margin}; expected a share in [0, 1)")
    model = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
    inputs = _inputs(example, batch)
    sizes = input_sizes(model, example)
    known: dict[Any, tuple[float, float]] = {}
    layers = []
    for entry in decided.layers:
        if not entry.kept and entry.ranks:
            layer = surgery.module_at(model, entry.path)
            seconds = _layer_times(layer, entry, sizes, len(inputs[0]), timer, known)
            entry = dataclasses.replace(entry, seconds=seconds)
            if seconds[1] >= seconds[0] * (1 - margin):
                entry = _given_back(entry, "not faster on this device")
        layers.append(entry)
    reverted: list[str] = []
    while True:
        chosen = Plan(tuple(layers))
        live = [p for p in chosen.layers if not p.kept and p.ranks]
        if not live:
            # nothing is replaced: the same network takes the same time
            same = timer(model, model, inputs)[0]
            return Measured(chosen, (same, same), tuple(reverted))
        network = timer(model, factorize(model, chosen, key=key), inputs)
        if network[1] <= network[0] * (1 - margin):
            return Measured(chosen, network, tuple(reverted))
        worst = sorted(live, key=lambda p: p.seconds[0] - p.seconds[1])  # pyright: ignore
        gone = {p.path for p in worst[: (len(worst) + 1) // 2]}
        reverted += [p.path for p in live if p.path in gone]
        layers = [
            _given_back(p, "the whole network is not faster with it") if p.path in gone else p
            for p in layers
        ]


def _inputs(example: Any, batch: int | None) -> tuple[Any, ...]:
    examples = example if isinstance(example, tuple) else (example,)
    rng = np.random.default_rng(0)

    def one(x: Any) -> Any:
        shape = x.shape if batch is None else (batch, *x.shape[1:])
        return jnp.asarray(rng.standard_normal(shape), x.dtype)

    return tuple(one(x) for x in examples)


def _layer_times(
    layer: Any,
    entry: LayerPlan,
    sizes: dict[str, tuple[int, int]],
    batch: int,
    timer: Timer,
    known: dict[Any, tuple[float, float]],
) -> tuple[float, float]:
    shape = tuple(layer.kernel.shape)
    if isinstance(layer, nnx.Linear):
        geometry: Any = (batch, shape[0])
        form: Any = None
    else:
        geometry = (batch, *sizes[entry.path], layer.in_features)
        form = (layer.strides, layer.padding, layer.kernel_dilation, layer.feature_group_count)
    label = (type(layer), shape, geometry, str(form), entry.rule, entry.ranks)
    if label not in known:
        x = jnp.asarray(np.random.default_rng(0).standard_normal(geometry), jnp.float32)
        after = factor_module(layer, entry, jax.random.key(0))
        known[label] = timer(layer, after, x)
    return known[label]


def _given_back(entry: LayerPlan, why: str) -> LayerPlan:
    before, after = entry.seconds  # pyright: ignore[reportGeneralTypeIssues]
    times = f"({1e3 * before:.3g} ms -> {1e3 * after:.3g} ms)"
    return entry.kept_for(f"rank {entry.ranks}: {why} {times}")
