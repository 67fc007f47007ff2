"""Factorizes the layers of a network: plan (a decision, data), then apply (a new network)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.factorization.budget import allocate, menus
from cnnjax.factorization.chain import ConvSpec, conv_cost
from cnnjax.factorization.choose import choose_ranks
from cnnjax.factorization.matrix import check_finite
from cnnjax.factorization.modules import _linear, chain_module, factor_module
from cnnjax.factorization.rules import Rule
from cnnjax.factorization.survey import (
    LayerPlan,
    Plan,
    as_rules,
    input_sizes,
    matched_layers,
    report,
    spec_of,
)

__all__ = [
    "LayerPlan",
    "Plan",
    "_linear",
    "chain_module",
    "factor_module",
    "factorize",
    "plan",
    "report",
    "spec_of",
]


def plan(
    model: nnx.Module,
    rules: Mapping[str, Rule | None] | Rule,
    example: Any = None,
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    allocation: str = "optimal",
    key: Any = None,
) -> Plan:
    """Decides ranks; looks at weights, changes nothing.

    Each rule chooses the ranks of its layers, or, with a budget, all layers share ``macs`` or
    ``params`` of the whole network; the rules' own ranks play no part then.

    Args:
      model: any NNX network.
      rules: ``{path glob: rule}``, the first match counts, None keeps the layers; or one rule for
        every layer.
      example: input (array, ``ShapeDtypeStruct`` or tuple of them) from which MACs are known; None
        judges by parameters.
      macs: budget of the whole network's MACs: a float is a share of today's, an int a count.
      params: the same for parameters.
      allocation: under a budget, ``"optimal"`` or ``"greedy"``; see `allocate`.
      key: for fits that measure what a rank keeps (CP, under a budget).

    Raises:
      ValueError: for a glob that matches no layer, a rank out of range (names the maximum), a
        non-finite kernel, a geometry that has no exact chain.
    """
    rules = as_rules(rules)
    if macs is not None or params is not None:
        if example is None:
            raise ValueError("a budget needs example= (the input sizes of the layers)")
        return allocate(
            menus(model, rules, example, key=key), macs=macs, params=params, how=allocation
        )
    sizes = input_sizes(model, example) if example is not None else {}
    out = []
    for path, layer, rule in matched_layers(model, rules):
        kernel = np.asarray(layer.kernel[...])
        check_finite(kernel, f"kernel of {path}")
        out.append(
            _plan_dense(path, kernel, rule)
            if isinstance(layer, nnx.Linear)
            else _plan_conv(path, layer, kernel, rule, sizes.get(path))
        )
    return Plan(tuple(out))


def _plan_dense(path: str, kernel: np.ndarray, rule: Rule) -> LayerPlan:
    size = kernel.size
    entry = LayerPlan(path, rule, (), (size, size), (size, size))
    if not rule.dense:
        return entry.kept_for("dense: only Basis and Predicted apply")
    return _decided(entry, kernel[None, None], ConvSpec(padding="VALID"), (1, 1))


def _plan_conv(
    path: str, layer: nnx.Conv, kernel: np.ndarray, rule: Rule, size: tuple[int, int] | None
) -> LayerPlan:
    spec = spec_of(layer, path)
    params, macs = conv_cost(kernel.shape, spec, size or (1, 1))
    before = None if size is None else (macs, macs)
    entry = LayerPlan(path, rule, (), (params, params), before)
    if kernel.shape[2] == 1 and spec.groups > 1 and not rule.depthwise:
        return entry.kept_for("depthwise")
    return _decided(entry, kernel, spec, size)


def _decided(
    entry: LayerPlan, kernel: np.ndarray, spec: ConvSpec, size: tuple[int, int] | None
) -> LayerPlan:
    rule, params = entry.rule, entry.params[0]
    try:
        ranks = choose_ranks(rule, kernel, spec, size)
    except ValueError as error:
        raise ValueError(f"{entry.path}: {error}") from None
    weights, cost = rule.cost(kernel.shape, ranks, spec, size or (1, 1))
    macs = None if entry.macs is None else entry.macs[0]
    if macs is None or rule.saves == "params":
        dearer = weights >= params
    else:
        dearer = cost >= macs
    if not rule.always:
        if dearer:
            return entry.kept_for(f"rank {ranks} is not cheaper")
        if objection := rule.objection(kernel, ranks):
            return entry.kept_for(objection)
    return dataclasses.replace(
        entry,
        ranks=ranks,
        params=(params, weights),
        macs=None if macs is None else (macs, cost),
    )


def factorize(
    model: nnx.Module,
    rules: Mapping[str, Rule | None] | Rule | Plan,
    example: Any = None,
    *,
    key: Any = None,
) -> nnx.Module:
    """A new network whose layers are replaced by the factors that the rules ask for.

    Each replaced layer becomes an ``nnx.Sequential`` of small layers with the original's dtypes;
    at full rank it computes the same. The result trains, saves, loads and shrinks as any network.

    Args:
      model: any NNX network; untouched.
      rules: ``{path glob: rule}``, one rule, or a `Plan` made before.
      example: input from which layers' costs are known (see `plan`).
      key: random key for rules with random starts; default ``jax.random.key(0)``.

    Raises:
      ValueError: see `plan`.
    """
    decided = rules if isinstance(rules, Plan) else plan(model, rules, example)
    key = jax.random.key(0) if key is None else key
    out = model
    keys = [jax.random.fold_in(key, index) for index in range(len(decided.layers))]
    made = _together(model, decided, keys)
    for index, layer_plan in enumerate(decided.layers):
        if layer_plan.kept or not layer_plan.ranks:
            continue
        layer = surgery.module_at(model, layer_plan.path)
        assert isinstance(layer, nnx.Conv | nnx.Linear)
        module = made.get(index) or factor_module(layer, layer_plan, keys[index])
        out = surgery.replace(out, layer_plan.path, module)
    return out


def _together(model: nnx.Module, decided: Plan, keys: list[Any]) -> dict[int, nnx.Module]:
    """Replacements of same-shaped layers whose rule fits several at once faster."""
    groups: dict[Any, list[int]] = {}
    for index, entry in enumerate(decided.layers):
        layer: Any = surgery.module_at(model, entry.path)
        if entry.kept or not entry.ranks or not isinstance(layer, nnx.Conv):
            continue
        spec, shape = spec_of(layer, entry.path), tuple(layer.kernel.shape)
        if entry.rule.side_by_side(shape, spec):
            groups.setdefault((entry.rule, entry.ranks, shape, spec), []).append(index)
    made: dict[int, nnx.Module] = {}
    for (rule, ranks, _, spec), members in groups.items():
        if len(members) < 2:
            continue
        layers: list[Any] = [surgery.module_at(model, decided.layers[i].path) for i in members]
        kernels = jnp.stack([layer.kernel[...] for layer in layers])
        biases = [None if layer.bias is None else layer.bias[...] for layer in layers]
        chains = rule.chains(jnp.stack([keys[i] for i in members]), kernels, ranks, spec)
        for i, layer, chain, bias in zip(members, layers, chains, biases):
            made[i] = chain_module(dataclasses.replace(chain, bias=bias), layer)
    return made
