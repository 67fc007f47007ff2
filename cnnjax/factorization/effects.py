"""How much a network suffers from each layer's factorization, measured on data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.factorization.compose import compose_chain
from cnnjax.factorization.matrix import svd_dense
from cnnjax.factorization.network import plan
from cnnjax.factorization.rules import Basis, Rule
from cnnjax.factorization.sites import in_evaluation
from cnnjax.factorization.survey import LayerPlan, as_rules, spec_of


@dataclasses.dataclass(frozen=True)
class LayerEffect:
    """What one layer at one rank does to the network, all other layers as they are.

    Attributes:
      path: of the layer.
      ranks: of its factors.
      params: (before, after) of the layer.
      macs: (before, after) of the layer for one image; None without an example.
      output_error: ``sum |f - g|^2 / sum |g|^2`` of the outputs f against the original's g.
      loss: mean cross-entropy; None without labels.
      accuracy: top-1 in [0, 1]; None without labels.
    """

    path: str
    ranks: tuple[int, ...]
    params: tuple[int, int]
    macs: tuple[int, int] | None
    output_error: float
    loss: float | None
    accuracy: float | None


def layer_effects(
    model: nnx.Module,
    rules: Mapping[str, Rule | None] | Rule,
    ranks: Sequence[Any],
    batches: Iterable[Any],
    *,
    example: Any = None,
    key: Any = None,
) -> tuple[LayerEffect, ...]:
    """Factorizes one layer at a time at several ranks and measures the network's outputs.

    The factors are multiplied out for it, so that the network keeps its shapes and is compiled
    once for all layers and ranks.

    Args:
      model: any NNX network whose output is one array (n, classes); untouched.
      rules: as for `factorize`; their ranks are replaced.
      ranks: of any kind that a rule takes, e.g. ``(0.25, 0.5, Energy(0.9))``.
      batches: inputs, or mappings with ``"image"`` and perhaps ``"label"`` (n,).
      example: input from which MACs are known (and which ``MacsRatio`` needs).
      key: for rules with random starts; default ``key(0)``.

    Returns:
      One entry per layer and rank, layers as in `plan`, ranks in the order given. Layers that no
      rule can change (depthwise, say) have none.

    Raises:
      ValueError: as `plan`; no batches; no ranks.
    """
    if not ranks:
        raise ValueError("no ranks: give at least one, e.g. ranks=(0.25, 0.5)")
    rules = as_rules(rules)
    key = jax.random.key(0) if key is None else key
    data = [b if isinstance(b, Mapping) else {"image": b} for b in batches]
    if not data:
        raise ValueError("no batches: the sensitivity is measured on data")
    graphdef, state = nnx.split(in_evaluation(model))
    evaluate = jax.jit(lambda state, x: nnx.merge(graphdef, state, copy=True)(x))
    targets = [np.asarray(evaluate(state, jnp.asarray(b["image"]))) for b in data]
    plans = []
    for rank in ranks:
        ranked = {g: r and dataclasses.replace(r, rank=rank, always=True) for g, r in rules.items()}
        plans.append(plan(model, ranked, example).layers)
    out = []
    for index, entries in enumerate(zip(*plans)):
        for entry in entries:
            if not entry.ranks:
                continue
            kernel = _composed(model, entry, jax.random.fold_in(key, index))
            changed = surgery.fill(model, {f"{entry.path}/kernel": kernel})
            new = nnx.split(in_evaluation(changed))[1]
            outputs = [np.asarray(evaluate(new, jnp.asarray(b["image"]))) for b in data]
            out.append(_measured(entry, outputs, targets, data))
    return tuple(out)


def _composed(model: nnx.Module, entry: LayerPlan, key: Any) -> Any:
    layer: Any = surgery.module_at(model, entry.path)
    kernel = layer.kernel[...]
    if isinstance(layer, nnx.Linear):
        assert isinstance(entry.rule, Basis)
        left, right = svd_dense(kernel, entry.ranks[0])
        return jnp.matmul(left, right, precision="highest").astype(kernel.dtype)
    spec = spec_of(layer, entry.path)
    chain = entry.rule.chain(key, kernel, entry.ranks, spec, None)
    return compose_chain(chain, kernel.shape[:2], spec.groups).astype(kernel.dtype)


def _measured(
    entry: LayerPlan, outputs: list[np.ndarray], targets: list[np.ndarray], data: list[Any]
) -> LayerEffect:
    f, g = (np.concatenate(a).astype(np.float64) for a in (outputs, targets))
    error = float(np.sum((f - g) ** 2) / max(np.sum(g**2), np.finfo(float).tiny))
    loss = accuracy = None
    if all("label" in b for b in data):
        labels = np.concatenate([np.asarray(b["label"]) for b in data])
        top = f.max(1)
        log_sum = top + np.log(np.sum(np.exp(f - top[:, None]), axis=1))
        loss = float(np.mean(log_sum - f[np.arange(len(f)), labels]))
        accuracy = float(np.mean(f.argmax(1) == labels))
    return LayerEffect(entry.path, entry.ranks, entry.params, entry.macs, error, loss, accuracy)
