"""Which layers of a network the rules name, their geometry, and the decisions about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from cnnjax import graph as graphs
from cnnjax import surgery
from cnnjax.errors import did_you_mean
from cnnjax.factorization.chain import ConvSpec
from cnnjax.factorization.rules import Rule
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
      seconds: measured (before, after), see `cnnjax.factorization.keep_faster`.
    """

    path: str
    rule: Rule
    ranks: tuple[int, ...]
    params: tuple[int, int]
    macs: tuple[int, int] | None
    kept: str | None = None
    seconds: tuple[float, float] | None = None

    def kept_for(self, reason: str) -> LayerPlan:
        """The same layer, left as it is."""
        return dataclasses.replace(
            self,
            ranks=(),
            params=(self.params[0], self.params[0]),
            macs=None if self.macs is None else (self.macs[0], self.macs[0]),
            kept=reason,
        )

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


def as_rules(rules: Mapping[str, Rule | None] | Rule) -> dict[str, Rule | None]:
    """``{path glob: rule}``; one rule is for every layer.

    Raises:
      ValueError: for anything that is no rule.
    """
    if not isinstance(rules, Mapping):
        rules = {"**": rules}
    for pattern, rule in rules.items():
        if rule is not None and not isinstance(rule, Rule):
            raise ValueError(
                f"{pattern!r} is given {rule!r}; expected a rule, e.g. Basis(8) or "
                "make_rule('basis', 8), or None to keep the layers"
            )
    return dict(rules)


def matched_layers(
    model: nnx.Module, rules: Mapping[str, Rule | None]
) -> list[tuple[str, Any, Rule]]:
    """(path, layer, rule) of every layer that a rule takes.

    Raises:
      ValueError: for a glob that matches no convolution or dense layer; lists near matches.
    """
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


def input_sizes(model: nnx.Module, example: Any) -> dict[str, tuple[int, int]]:
    """Input (height, width) of every convolution over images."""
    examples = example if isinstance(example, tuple) else (example,)
    traced = graphs.trace(model, *examples)
    return {
        layer.path: (layer.input_shape[1], layer.input_shape[2])
        for layer in traced.layers
        if layer.kind == "conv" and len(layer.input_shape) == 4
    }


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
            **({} if p.seconds is None else {"seconds": list(p.seconds)}),
        }
        for p in layers
    ]
