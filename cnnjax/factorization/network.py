"""Factorizes the layers of a network: plan (a decision, data), then apply (a new network)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax import graph as graphs
from cnnjax import surgery
from cnnjax.errors import did_you_mean
from cnnjax.factorization.chain import Chain, ConvSpec, conv_cost, stages_cost
from cnnjax.factorization.choose import choose_ranks
from cnnjax.factorization.matrix import check_finite, svd_dense
from cnnjax.factorization.rules import Basis, Rule
from cnnjax.tree import glob_match


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    Attributes:
      path: the layer's path.
      rule: the rule that matched first.
      ranks: its ranks; () where the layer is kept.
      params: (before, after).
      macs: (before, after) for one image; None without an example.
      kept: why the layer stays as it is, or None.
    """

    path: str
    rule: Rule
    ranks: tuple[int, ...]
    params: tuple[int, int]
    macs: tuple[int, int] | None
    kept: str | None = None

    def __str__(self) -> str:
        if self.kept:
            return f"{self.path}: kept, {self.kept}"
        macs = "" if self.macs is None else f", macs {self.macs[0]:,} -> {self.macs[1]:,}"
        before, after = self.params
        name = type(self.rule).__name__
        return f"{self.path}: {name} rank {self.ranks}, params {before:,} -> {after:,}{macs}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The decisions for a whole network, in the order of its layers."""

    layers: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        return "\n".join(str(layer) for layer in self.layers)


def _pair(value: Any) -> tuple[int, int]:
    if value is None:
        return (1, 1)
    if isinstance(value, int):
        return (value, value)
    return tuple(int(v) for v in value)  # pyright: ignore[reportReturnType]


def spec_of(layer: nnx.Conv, path: str) -> ConvSpec:
    """The geometry of an NNX convolution.

    Raises:
      ValueError: for what has no exact chain here: other than two spatial axes, input dilation, or
        a kernel mask.
    """
    if len(layer.kernel_size) != 2:
        raise ValueError(
            f"{path}: a convolution over {len(layer.kernel_size)} spatial axes; two are expected"
        )
    if _pair(layer.input_dilation) != (1, 1):
        raise ValueError(f"{path}: input dilation {layer.input_dilation} is not supported")
    if layer.mask is not None:
        raise ValueError(f"{path}: the kernel has a mask; fold it into the kernel first")
    padding = layer.padding
    if isinstance(padding, str):
        padding = padding.upper()
    elif isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    else:
        padding = tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding)
    return ConvSpec(
        _pair(layer.strides),
        padding,  # pyright: ignore[reportArgumentType]
        _pair(layer.kernel_dilation),
        layer.feature_group_count,
    )


def _candidates(model: nnx.Module, rules: Mapping[str, Rule | None]) -> list[tuple[str, Any, Rule]]:
    found = surgery.modules(model)
    layers = {p: m for p, m in found.items() if isinstance(m, nnx.Conv | nnx.Linear)}
    out, used = [], set()
    for path, layer in layers.items():
        for pattern, rule in rules.items():
            if glob_match(pattern, path):
                used.add(pattern)
                if rule is not None:
                    out.append((path, layer, rule))
                break
    for pattern in rules:
        if pattern not in used and not any(glob_match(pattern, p) for p in layers):
            raise ValueError(
                f"rule {pattern!r} matches no convolution or dense layer."
                f"{did_you_mean(pattern, layers)}"
            )
    return out


def _sizes(model: nnx.Module, example: Any) -> dict[str, tuple[int, int]]:
    examples = example if isinstance(example, tuple) else (example,)
    traced = graphs.trace(model, *examples)
    return {
        layer.path: (layer.input_shape[1], layer.input_shape[2])
        for layer in traced.layers
        if layer.kind == "conv" and len(layer.input_shape) == 4
    }


def plan(
    model: nnx.Module,
    rules: Mapping[str, Rule | None] | Rule,
    example: Any = None,
    *,
    key: Any = None,
) -> Plan:
    """Decides ranks; looks at weights, changes nothing.

    Args:
      model: any NNX network.
      rules: ``{path glob: rule}``, the first match counts, None keeps the layers; or one rule for
        every layer.
      example: input (array, ``ShapeDtypeStruct`` or tuple of them) from which MACs are known; None
        judges by parameters.
      key: unused by the rules of today; accepted so that plan and `factorize` take the same.

    Raises:
      ValueError: for a glob that matches no layer, a rank out of range (names the maximum), a
        non-finite kernel, a geometry that has no exact chain.
    """
    del key
    rules = {"**": rules} if isinstance(rules, Rule) else dict(rules)
    sizes = _sizes(model, example) if example is not None else {}
    out = []
    for path, layer, rule in _candidates(model, rules):
        kernel = np.asarray(layer.kernel[...])
        check_finite(kernel, f"kernel of {path}")
        out.append(
            _plan_dense(path, kernel, rule)
            if isinstance(layer, nnx.Linear)
            else _plan_conv(path, layer, kernel, rule, sizes.get(path))
        )
    return Plan(tuple(out))


def _plan_dense(path: str, kernel: np.ndarray, rule: Rule) -> LayerPlan:
    i, o = kernel.shape
    size = i * o
    if not isinstance(rule, Basis):
        return LayerPlan(path, rule, (), (size, size), (size, size), "dense: only Basis applies")
    ranks = choose_ranks(rule, kernel[None, None], ConvSpec(padding="VALID"), (1, 1))
    after = ranks[0] * (i + o)
    kept = None
    if after >= size and not rule.always:
        kept, ranks, after = f"rank {ranks[0]} is not cheaper", (), size
    return LayerPlan(path, rule, ranks, (size, after), (size, after), kept)


def _plan_conv(
    path: str, layer: nnx.Conv, kernel: np.ndarray, rule: Rule, size: tuple[int, int] | None
) -> LayerPlan:
    spec = spec_of(layer, path)
    params, macs = conv_cost(kernel.shape, spec, size or (1, 1))
    before = None if size is None else (macs, macs)
    if kernel.shape[2] == 1 and spec.groups > 1 and not rule.depthwise:
        return LayerPlan(path, rule, (), (params, params), before, "depthwise")
    ranks = choose_ranks(rule, kernel, spec, size)
    weights, cost = stages_cost(rule.stages(kernel.shape, ranks, spec), size or (1, 1))
    after = None if size is None else (macs, cost)
    dearer = weights >= params if size is None else cost >= macs
    if dearer and not rule.always:
        reason = f"rank {ranks} is not cheaper"
        return LayerPlan(path, rule, (), (params, params), before, reason)
    return LayerPlan(path, rule, ranks, (params, weights), after)


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
    for index, layer_plan in enumerate(decided.layers):
        if layer_plan.kept or not layer_plan.ranks:
            continue
        layer = surgery.module_at(model, layer_plan.path)
        assert isinstance(layer, nnx.Conv | nnx.Linear)
        module = factor_module(layer, layer_plan, jax.random.fold_in(key, index))
        out = surgery.replace(out, layer_plan.path, module)
    return out


def factor_module(layer: nnx.Conv | nnx.Linear, decided: LayerPlan, key: Any) -> nnx.Sequential:
    """The replacement of one layer."""
    bias = None if layer.bias is None else layer.bias[...]
    if isinstance(layer, nnx.Linear):
        first, second = svd_dense(layer.kernel[...], decided.ranks[0])
        return nnx.Sequential(_linear(layer, first, None), _linear(layer, second, bias))
    spec = spec_of(layer, decided.path)
    chain = decided.rule.chain(key, layer.kernel[...], decided.ranks, spec, bias)
    return chain_module(chain, layer)


def chain_module(chain: Chain, like: nnx.Conv) -> nnx.Sequential:
    """A chain as an ``nnx.Sequential`` of convolutions of the original's class and dtypes."""
    last = len(chain.kernels) - 1
    layers = [
        _conv(like, kernel, spec, chain.bias if k == last else None)
        for k, (kernel, spec) in enumerate(zip(chain.kernels, chain.specs))
    ]
    return nnx.Sequential(*layers)


def _conv(like: nnx.Conv, kernel: Any, spec: ConvSpec, bias: Any) -> nnx.Conv:
    kh, kw, i, o = kernel.shape

    def make() -> nnx.Conv:
        return type(like)(
            i * spec.groups,
            o,
            (kh, kw),
            spec.strides,
            padding=spec.padding,
            kernel_dilation=spec.dilation,
            feature_group_count=spec.groups,
            use_bias=bias is not None,
            dtype=like.dtype,
            param_dtype=like.param_dtype,
            precision=like.precision,
            rngs=nnx.Rngs(0),
        )

    return _filled(make, kernel, bias, like.param_dtype)


def _linear(like: nnx.Linear, kernel: Any, bias: Any) -> nnx.Linear:
    def make() -> nnx.Linear:
        return nnx.Linear(
            *kernel.shape,
            use_bias=bias is not None,
            dtype=like.dtype,
            param_dtype=like.param_dtype,
            precision=like.precision,
            rngs=nnx.Rngs(0),
        )

    return _filled(make, kernel, bias, like.param_dtype)


def _filled(make: Any, kernel: Any, bias: Any, dtype: Any) -> Any:
    # the structure without running its initialiser, then the factors' numbers
    layer = nnx.eval_shape(make)
    layer.kernel = nnx.Param(jax.numpy.asarray(kernel, dtype))
    if bias is not None:
        layer.bias = nnx.Param(jax.numpy.asarray(bias, dtype))
    return layer


def report(decided: Plan | Sequence[LayerPlan]) -> list[dict[str, Any]]:
    """The plan as JSON-able rows."""
    layers = decided.layers if isinstance(decided, Plan) else decided
    return [
        {
            "path": p.path,
            "rule": type(p.rule).__name__,
            "ranks": list(p.ranks),
            "params": list(p.params),
            "macs": None if p.macs is None else list(p.macs),
            "kept": p.kept,
        }
        for p in layers
    ]
