"""Layer by layer: replace one layer, fine-tune the whole network, then take the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from cnnjax import surgery
from cnnjax.factorization.modules import factor_module
from cnnjax.factorization.network import plan
from cnnjax.factorization.rules import Rule
from cnnjax.factorization.sites import find_sites
from cnnjax.factorization.survey import LayerPlan, Plan

FineTune = Callable[[nnx.Module, int, LayerPlan], nnx.Module]
ORDERS = ("forward", "backward")


def layer_order(model: nnx.Module, decided: Plan, example: Any, order: str = "forward") -> Plan:
    """The layers of a plan that are replaced, as the network applies them or the other way round.

    Raises:
      ValueError: for another order.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; expected one of {ORDERS}")
    layers = {p.path: p for p in decided.layers if p.ranks and not p.kept}
    if not layers:
        return Plan(())
    paths = [site.path for site in find_sites(model, list(layers), example)]
    return Plan(tuple(layers[p] for p in (paths if order == "forward" else paths[::-1])))


def factorize_layerwise(
    model: nnx.Module,
    rules: Mapping[str, Rule | None] | Rule | Plan,
    fine_tune: FineTune,
    *,
    example: Any,
    order: str = "forward",
    key: Any = None,
) -> tuple[nnx.Module, Sequence[LayerPlan]]:
    """Replaces the layers one at a time with fine-tuning of the whole network after each.

    Each layer's factors are those of its kernel *as fine-tuned so far*. Meant for CP, whose
    one-shot replacement of all layers is hard to recover from. With a ``fine_tune`` that returns
    its argument the result is that of `factorize`.

    Args:
      model: any NNX network; untouched.
      rules: as for `factorize`; ranks are decided on the given weights.
      fine_tune: ``(network, number, layer's plan) -> network`` of the same structure, called after
        each replacement.
      example: an input, abstract or not.
      order: ``"forward"`` from the input, or ``"backward"``.
      key: for rules with random starts; default ``key(0)``.

    Returns:
      The network, and the plans of the layers in the order in which they were replaced.

    Reference:
      Astrid & Lee, "CP-decomposition with tensor power method", BigComp 2017, arXiv 1701.07148.
    """
    decided = rules if isinstance(rules, Plan) else plan(model, rules, example)
    key = jax.random.key(0) if key is None else key
    # the same key for a layer as in one shot
    keys = {p.path: jax.random.fold_in(key, i) for i, p in enumerate(decided.layers)}
    steps = layer_order(model, decided, example, order).layers
    out = model
    for number, entry in enumerate(steps):
        layer = surgery.module_at(out, entry.path)
        assert isinstance(layer, nnx.Conv | nnx.Linear)
        out = surgery.replace(out, entry.path, factor_module(layer, entry, keys[entry.path]))
        out = fine_tune(out, number, entry)
    return out, steps
