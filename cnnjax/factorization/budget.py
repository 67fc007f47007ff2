"""Ranks of a whole network under one budget of MACs or parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax import graph as graphs
from cnnjax.factorization.chain import ConvSpec, conv_cost, split_groups
from cnnjax.factorization.matrix import check_finite
from cnnjax.factorization.ranks import allocate_ranks, greedy_allocation
from cnnjax.factorization.rules import Ranks, Rule
from cnnjax.factorization.survey import (
    LayerPlan,
    Plan,
    input_sizes,
    matched_layers,
    spec_of,
)


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to treat a layer.

    Attributes:
      ranks: () keeps the layer.
      params: its weights.
      macs: for one image.
      gain: log of the share of the kernel's energy that is kept (0: all of it), or what a
        measurement put there; higher is better.
    """

    ranks: Ranks
    params: int
    macs: int
    gain: float


@dataclasses.dataclass(frozen=True)
class Menu:
    """The options of a layer, the layer itself first, then from dear to cheap."""

    path: str
    rule: Rule
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Menus:
    """The options of all layers, and what the rest of the network costs."""

    layers: tuple[Menu, ...]
    total: Mapping[str, int]

    def rest(self, what: str) -> int:
        """Cost of everything that has no menu; ``what`` is ``"macs"`` or ``"params"``."""
        return self.total[what] - sum(getattr(m.options[0], what) for m in self.layers)


def menus(
    model: nnx.Module,
    rules: Mapping[str, Rule | None],
    example: Any,
    *,
    levels: int = 48,
    key: Any = None,
) -> Menus:
    """What each matched layer could become: ranks, cost, and the energy of the kernel kept.

    Singular values tell the energy where the ranks truncate unfoldings (exact for one rank, the
    HOSVD bound for two); for CP and scheme 1 a few ranks are fitted and measured.

    Args:
      model: any NNX network.
      rules: ``{path glob: rule}``; the rules' own ranks play no part.
      example: input that fixes the layers' sizes.
      levels: options per layer, at most.
      key: for measured fits.
    """
    examples = example if isinstance(example, tuple) else (example,)
    counted = graphs.profile(model, *examples)
    sizes = input_sizes(model, example)
    key = jax.random.key(0) if key is None else key
    out = []
    for path, layer, rule in matched_layers(model, rules):
        kernel = np.asarray(layer.kernel[...])
        check_finite(kernel, f"kernel of {path}")
        if isinstance(layer, nnx.Linear):
            if not rule.dense:
                continue
            kernel, spec, size = kernel[None, None], ConvSpec(padding="VALID"), (1, 1)
        else:
            spec, size = spec_of(layer, path), sizes[path]
            if kernel.shape[2] == 1 and spec.groups > 1 and not rule.depthwise:
                continue
        out.append(Menu(path, rule, _options(rule, kernel, spec, size, levels, key)))
    return Menus(tuple(out), {"macs": counted.macs, "params": counted.params})


def _options(
    rule: Rule,
    kernel: np.ndarray,
    spec: ConvSpec,
    size: tuple[int, int],
    levels: int,
    key: Any,
) -> tuple[Option, ...]:
    blocks = np.asarray(split_groups(kernel, spec.groups))
    params, macs = conv_cost(kernel.shape, spec, size)
    kept = _spectral(rule, blocks) if rule.spectral else _shares(rule, blocks, 6)
    found = [Option((), params, macs, 0.0)]
    cheaper = []
    for ranks, energy in kept:
        weights, cost = rule.cost(kernel.shape, ranks, spec, size)
        if weights < params and cost < macs:
            cheaper.append((ranks, weights, cost, energy))
    if len(cheaper) > levels:
        cheaper = [
            cheaper[k] for k in np.unique(np.linspace(0, len(cheaper) - 1, levels, dtype=int))
        ]
    for ranks, weights, cost, energy in cheaper:
        if energy is None:
            energy = rule.retained(key, blocks, ranks)
        found.append(Option(ranks, weights, cost, float(np.log(max(energy, 1e-12)))))
    return tuple(sorted(found, key=lambda option: -option.macs))


def _spectral(rule: Rule, blocks: np.ndarray) -> list[tuple[Ranks, float]]:
    """Ranks along a falling tail: every mode discards about the same energy."""
    tails = []
    for k in range(len(rule.full(blocks.shape[1:]))):
        squares = sum(
            np.linalg.svd(rule.matrices(np.asarray(b, np.float64))[k], compute_uv=False) ** 2
            for b in blocks
        )
        # tails[k][r]: energy lost at rank r
        tails.append(np.append(np.cumsum(np.asarray(squares)[::-1])[::-1], 0.0))
    total = max(tails[0][0], 1e-30)
    out: dict[Ranks, float] = {}
    for level in np.unique(np.concatenate([t[1:] for t in tails])):
        ranks = tuple(max(1, int(np.argmax(t <= level * (1 + 1e-12)))) for t in tails)
        lost = sum(t[r] for t, r in zip(tails, ranks)) / total
        out.setdefault(ranks, max(1 - lost, 0.0))
    return list(out.items())


def _shares(rule: Rule, blocks: np.ndarray, count: int) -> list[tuple[Ranks, float | None]]:
    """Geometric ranks whose energy is still to be measured."""
    full = rule.full(blocks.shape[1:])
    top = rule.break_even(blocks.shape[1:])
    steps = np.unique(np.geomspace(1, max(top, 1), 2 * count).astype(int))[-count:]
    shape = blocks.shape[1:]
    at = [rule.admissible(shape, tuple(min(int(s), f) for f in full)) for s in steps[::-1]]
    return [(ranks, None) for ranks in dict.fromkeys(at)]


def allocate(
    found: Menus,
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    how: str = "optimal",
) -> Plan:
    """Chooses one option per layer so that the product of kept energies is large.

    Args:
      found: from `menus`.
      macs: budget of the whole network's MACs: a float is a share of today's, an int a count.
      params: the same for parameters; give one of the two.
      how: ``"optimal"`` (exact where the numbers of options allow, never below greedy) or
        ``"greedy"`` (Zhang's: again and again the step that loses least per cost saved).

    Raises:
      ValueError: for both or no budget, an unknown ``how``, or a budget below what the cheapest
        options cost (named).

    Reference:
      Zhang et al., TPAMI 2016, arXiv 1505.06798, section 2.4 (greedy).
    """
    if (macs is None) == (params is None):
        raise ValueError(f"give one budget, macs or params; got macs={macs} and params={params}")
    what, value = ("macs", macs) if macs is not None else ("params", params)
    if how not in ("optimal", "greedy"):
        raise ValueError(f"how is {how!r}; expected 'optimal' or 'greedy'")
    assert value is not None
    total = found.total[what]
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(
            f"{what} budget is the share {value}; expected one in (0, 1], or an int, a count"
        )
    absolute = value * total if isinstance(value, float) else value
    costs = [np.array([getattr(o, what) for o in m.options], np.float64) for m in found.layers]
    gains = [np.array([o.gain for o in m.options]) for m in found.layers]
    least = found.rest(what) + sum(int(c.min()) for c in costs)
    if absolute < least:
        raise ValueError(
            f"{what} budget {value} ({absolute:,.0f} of {total:,}) is out of reach: the cheapest "
            f"options leave {least:,} ({least / total:.3f} of the network)"
        )
    left = float(absolute - found.rest(what))
    choose = allocate_ranks if how == "optimal" else greedy_allocation
    chosen = choose(gains, costs, left) if found.layers else []
    layers = []
    for menu, index in zip(found.layers, chosen):
        first, option = menu.options[0], menu.options[index]
        layers.append(
            LayerPlan(
                menu.path,
                menu.rule,
                option.ranks,
                (first.params, option.params),
                (first.macs, option.macs),
                None if option.ranks else "the budget leaves it whole",
            )
        )
    return Plan(tuple(layers))


def sensitivity(
    model: nnx.Module,
    found: Menus,
    evaluate: Callable[[nnx.Module], float],
    *,
    points: int = 3,
    key: Any = None,
) -> Menus:
    """Gains measured on data: each layer alone is factorized and the network evaluated.

    Args:
      model: the network that ``found`` describes.
      found: from `menus`.
      evaluate: ``model -> score``, higher is better (accuracy, minus the loss).
      points: options of each layer that are evaluated, spread over its menu; those between are
        interpolated over the logarithm of the kept energy.
      key: for random starts of the factorizations.

    Returns:
      The menus with ``gain`` = score - score of the whole network, never rising towards the cheap
      end.
    """
    from cnnjax.factorization.network import factorize

    if points < 1:
        raise ValueError(f"points is {points}; at least one option per layer must be evaluated")
    base = evaluate(model)
    out = []
    for menu in found.layers:
        options = list(menu.options)
        spots = np.unique(np.linspace(0, len(options) - 1, points + 1).round().astype(int))
        scores = [0.0]
        for spot in spots[1:]:
            o = options[spot]
            single = LayerPlan(menu.path, menu.rule, o.ranks, (0, o.params), (0, o.macs))
            scores.append(evaluate(factorize(model, Plan((single,)), key=key)) - base)
        scores = np.minimum.accumulate(np.minimum(scores, 0.0))
        lost = np.array([-o.gain for o in options])
        gains = np.interp(lost, lost[spots], scores)
        out.append(
            dataclasses.replace(
                menu,
                options=tuple(
                    dataclasses.replace(o, gain=float(g)) for o, g in zip(options, gains)
                ),
            )
        )
    return dataclasses.replace(found, layers=tuple(out))


def total_gain(found: Menus, decided: Plan) -> float:
    """Sum of the chosen options' gains: what `allocate` maximises."""
    by_path: dict[str, Sequence[Option]] = {m.path: m.options for m in found.layers}
    return sum(next(o.gain for o in by_path[p.path] if o.ranks == p.ranks) for p in decided.layers)
