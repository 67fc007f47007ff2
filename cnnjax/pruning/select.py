"""Which channels go: scores, reduced over what belongs together, against a ratio or a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cnnjax.errors import did_you_mean
from cnnjax.graph import Graph
from cnnjax.pruning.aggregate import NORMALIZE, REDUCE, normalized, score_atoms
from cnnjax.pruning.costs import Cost, CostModel
from cnnjax.pruning.keep import Keep
from cnnjax.pruning.plan import SCOPES, Plan
from cnnjax.pruning.pools import Pool, pools
from cnnjax.tree import Patterns, check_patterns, match_any

PyTree = Any
Ratio = float | int | Mapping[str, float | int]


def select_channels(
    graph: Graph,
    scores: PyTree,
    *,
    ratio: float | int | Mapping[str, float | int] | None = None,
    macs: float | int | None = None,
    params: float | int | None = None,
    bytes: float | int | None = None,
    latency: float | int | None = None,
    cost: Cost | None = None,
    scope: str = "layer",
    round_to: int = 1,
    min_width: int | None = None,
    exclude: Patterns = (),
    reduce: str = "mean",
    within: str = "sum",
    normalize: str = "none",
    statistics: bool = False,
) -> Keep:
    """Chooses the channels that stay, whole groups of tied axes at a time.

    Give exactly one of ``ratio``, ``macs``, ``params``, ``bytes``, ``latency``.

    Args:
      graph: from `cnnjax.graph.trace`.
      scores: higher = keep. A tree like the parameters (any subset of its leaves), or
        ``{path: array}``; each leaf has its variable's shape (a score for every weight), or is one
        axis long (a score for every channel of the last axis that is not contracted).
      ratio: fraction of channels to remove: ``ceil(ratio * n)`` of n; or ``{glob: ratio}`` by group
        name (the first glob that matches counts; groups that none matches stay whole).
      macs, params, bytes: budget: at most this many are left. A value up to 1 is the fraction of
        the original.
      latency: budget in seconds (never a fraction), by ``cost``: see `measured_latency` and
        `latency_table`.
      cost: for ``latency``: a function from a decision (``alive``) to seconds.
      scope: ``"layer"``: the same ratio in every group; ``"global"``: the lowest scores anywhere;
        ``"isomorphic"``: the lowest scores among groups of the same structure, at the same ratio.
      round_to: widths are rounded up to a multiple of this (or stay whole).
      min_width: no group becomes narrower. With scope ``"layer"`` and no ``min_width`` a ratio that
        would empty a group is an error; otherwise one channel at least stays.
      exclude: globs of variables or group names whose groups stay whole.
      reduce: how the scores of a channel's axes (every kernel and scale that makes it) combine:
        ``"sum"``, ``"mean"``, ``"max"``, ``"min"``, ``"l2"``.
      within: how the weights of one axis' channel combine to its score.
      normalize: of each group's scores before groups compete: ``"none"``, ``"mean"``, ``"max"``,
        ``"sum"``, ``"l2"`` (divide by that) or ``"standard"`` (zero mean, unit deviation).
      statistics: also prune groups under a statistic over channels (LayerNorm, GroupNorm, softmax),
        which changes what the remaining channels compute.

    Returns:
      The `Keep`. Groups without any score stay whole; of equal scores the lower channel goes first.

    Raises:
      ValueError: wrong options; a glob that matches nothing; a ratio that would empty a layer; a
        budget out of reach (gives the smallest cost that can be reached); scores that match no
        group.
    """
    given = {"ratio": ratio, "macs": macs, "params": params, "bytes": bytes, "latency": latency}
    given = {k: v for k, v in given.items() if v is not None}
    if len(given) != 1:
        raise ValueError(
            "give exactly one of ratio, macs, params, bytes, latency; got "
            f"{', '.join(sorted(given)) or 'none'}"
        )
    _check_options(scope, normalize, reduce, within, round_to, min_width)
    _check_exclude(graph, exclude)
    atom_score, scored = score_atoms(graph, scores, reduce=reduce, within=within)
    candidates = [
        p
        for p in pools(graph)
        if (statistics or p.statistic is None)
        and all(scored[graph.groups[i].atoms].all() for i in p.groups)
        and not any(_excluded(graph, i, exclude) for i in p.groups)
    ]
    if not candidates:
        raise ValueError(
            "no group can be pruned: every one is excluded, without scores, under a statistic over "
            "channels (statistics=True allows those), or fixed; print the graph for the reasons"
        )
    for pool in candidates:
        atoms = np.concatenate(pool.cells)
        atom_score[atoms] = normalized(atom_score[atoms], normalize)
    plan = Plan(graph, candidates, atom_score, round_to, min_width or 1)
    if ratio is not None:
        alive = _by_ratio(plan, ratio, scope, min_width)
    else:
        ((kind, budget),) = given.items()
        alive = _by_budget(plan, kind, float(budget), cost, scope)
    return Keep.of(graph, alive)


def _check_options(
    scope: str, normalize: str, reduce: str, within: str, round_to: int, min_width: int | None
) -> None:
    for name, value, known in (
        ("scope", scope, SCOPES),
        ("normalize", normalize, NORMALIZE),
        ("reduce", reduce, tuple(REDUCE)),
        ("within", within, tuple(REDUCE)),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown.{did_you_mean(str(value), known)}")
    if round_to < 1 or (min_width is not None and min_width < 1):
        raise ValueError(
            f"round_to and min_width must be at least 1, got {round_to} and {min_width}"
        )


def _check_exclude(graph: Graph, exclude: Patterns) -> None:
    if exclude:
        modules = {p.rpartition("/")[0] for p in graph.shapes}
        names = {*graph.shapes, *(g.name for g in graph.groups), *modules} - {""}
        check_patterns(exclude, sorted(names), what="exclude")


def _excluded(graph: Graph, index: int, exclude: Patterns) -> bool:
    group = graph.groups[index]
    # a consumer's path doesn't exempt the layer before it
    paths = {path for path, _ in group.producers} | {group.name}
    paths |= {path.rpartition("/")[0] for path in paths}
    return bool(exclude) and any(match_any(exclude, p) for p in paths)


def _ratio_of(pool: Pool, graph: Graph, ratio: Ratio) -> float:
    if not isinstance(ratio, Mapping):
        return float(ratio)
    for pattern, value in ratio.items():
        if any(match_any(pattern, graph.groups[i].name) for i in pool.groups):
            return float(value)
    return 0.0


def _count(ratio: float, n: int) -> int:
    # 1e-9: 0.1 * 30 is a hair above 3 in floating point
    return min(n, math.ceil(ratio * n - 1e-9))


def _steps_of(ratio: float, pool: Pool) -> int:
    """The first step after which the fraction is gone; the last one only for everything."""
    wanted = _count(ratio, pool.size)
    steps = int(np.searchsorted(pool.gone, wanted))
    return steps if wanted == pool.size else min(steps, pool.steps - 1)


def _by_ratio(plan: Plan, ratio: Ratio, scope: str, min_width: int | None) -> np.ndarray:
    values = list(ratio.values()) if isinstance(ratio, Mapping) else [ratio]
    if not all(0 <= v <= 1 for v in values):
        raise ValueError(f"ratio is the fraction to remove, between 0 and 1; got {ratio}")
    if isinstance(ratio, Mapping):
        check_patterns(list(ratio), [g.name for g in plan.graph.groups], what="ratio's glob")
    if scope == "layer":
        steps = []
        for pool in plan.pools:
            p = _ratio_of(pool, plan.graph, ratio)
            n = _steps_of(p, pool)
            if n == pool.steps and min_width is None:
                raise ValueError(
                    f"ratio {p} would empty {pool.name!r} ({pool.size} channels); lower it, "
                    "exclude the group, or set min_width"
                )
            steps.append(n)
        return plan.alive(steps)
    if isinstance(ratio, Mapping):
        raise ValueError(f"a ratio by glob needs scope='layer', not {scope!r}")
    return plan.alive(_ranked(plan, scope, lambda n: _count(float(ratio), n)))


def _ranked(plan: Plan, scope: str, count: Callable[[int], int]) -> list[int]:
    """Steps of each pool when the worst channels of each class of pools go."""
    steps = [0] * len(plan.pools)
    for members in plan.classes(scope):
        pool, width = plan.ranked(members)
        wanted = count(int(width.sum()))
        # so many channels go; a step that would overshoot still goes (the count is rounded up)
        taken = int(np.searchsorted(np.cumsum(width), wanted)) + 1 if wanted else 0
        for i, n in zip(*np.unique(pool[:taken], return_counts=True)):
            steps[int(i)] = int(n)
    return steps


def _by_budget(plan: Plan, kind: str, budget: float, cost: Cost | None, scope: str) -> np.ndarray:
    model = CostModel(plan.graph)
    measure: Cost
    if kind == "latency":
        if cost is None:
            raise ValueError(
                "latency= needs cost=, a function from a decision to seconds: "
                "cnnjax.pruning.measured_latency(model, graph) or latency_table(graph)"
            )
        measure = cost
    else:
        if cost is not None:
            raise ValueError(f"cost= belongs to latency=, not to {kind}=")
        measure = {"macs": model.macs, "params": model.params, "bytes": model.bytes}[kind]
    full = measure(plan.graph.alive())
    if budget <= 0:
        raise ValueError(f"{kind}={budget} must be positive")
    limit = budget * full if budget <= 1 and kind != "latency" else budget
    if scope == "global":
        pool, _ = plan.ranked(list(range(len(plan.pools))))

        def decide(n: int) -> np.ndarray:
            return plan.alive(np.bincount(pool[:n], minlength=len(plan.pools)).tolist())

        top = len(pool)
    else:
        # finer than any pool's steps, so that every reachable combination is met
        top = 4 * max(pool.size for pool in plan.pools)

        def decide(n: int) -> np.ndarray:
            p = n / top
            if scope == "isomorphic":
                return plan.alive(_ranked(plan, scope, lambda n: _count(p, n)))
            return plan.alive([_steps_of(p, pool) for pool in plan.pools])

    low, high = -1, top  # decide(high) meets the budget, decide(low) doesn't
    least = measure(decide(top))
    if least > limit:
        raise ValueError(
            f"{kind}={budget:g} (at most {limit:.6g}) is out of reach: the narrowest network that "
            f"is allowed has {least:.6g} of {full:.6g}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if measure(decide(middle)) <= limit:
            high = middle
        else:
            low = middle
    return decide(high)
