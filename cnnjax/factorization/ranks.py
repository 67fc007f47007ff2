"""Ranks of a whole network under a budget: Zhang's greedy product, and an exact allocation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnnjax.typing import AnyArray


def pca_energy_ranks(
    spectra: Sequence[AnyArray],
    costs: Sequence[float] | AnyArray,
    budget: float,
    *,
    minimum: int = 1,
) -> list[int]:
    """Greedy ranks that keep the product of the layers' retained PCA energies large.

    Cost model: layer l at rank d costs ``costs[l] * d / len(spectra[l])``. From full rank, removes
    again and again the last eigenvalue of the layer that loses the least energy per cost.

    Args:
      spectra: for each layer its response eigenvalues, descending.
      costs: cost of each layer at full rank (MACs, say).
      budget: total cost allowed.
      minimum: smallest rank of a layer.

    Raises:
      ValueError: if the budget is out of reach even at the minimum ranks.

    Reference:
      Zhang et al., TPAMI 2016, arXiv 1505.06798, section 2.4.
    """
    spectra = [np.asarray(s, np.float64) for s in spectra]
    if len(spectra) != len(costs):
        raise ValueError(f"{len(spectra)} spectra and {len(costs)} costs: one each per layer")
    unit = [c / len(s) for c, s in zip(costs, spectra)]
    least = sum(u * min(minimum, len(s)) for u, s in zip(unit, spectra))
    if budget < least:
        raise ValueError(
            f"budget {budget:.6g} is below {least:.6g}, the cost of rank {minimum} everywhere"
        )
    sums = [np.cumsum(s) for s in spectra]
    ranks = [len(s) for s in spectra]

    def loss(layer: int) -> float:
        rank = ranks[layer]
        if rank <= minimum:
            return np.inf
        total = sums[layer][rank - 1]
        share = spectra[layer][rank - 1] / total if total > 0 else 0.0
        return share / unit[layer]

    losses = [loss(layer) for layer in range(len(ranks))]
    spent = float(sum(costs))
    while spent > budget * (1 + 1e-12):
        layer = int(np.argmin(losses))
        ranks[layer] -= 1
        spent -= unit[layer]
        losses[layer] = loss(layer)
    return ranks


def frontier(gain: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the undominated points (more gain, less cost), from cheap to dear."""
    order = np.lexsort((-gain, cost))
    best = np.maximum.accumulate(gain[order])
    rising = np.ones(len(order), bool)
    rising[1:] = best[1:] > best[:-1]
    return order[rising]


def greedy_allocation(
    gains: Sequence[AnyArray], costs: Sequence[AnyArray], budget: float
) -> list[int]:
    """One option per layer by steepest steps: the generalisation of `pca_energy_ranks`.

    Starts from the best option everywhere and takes, until the budget holds, the step to a layer's
    next cheaper undominated option that loses the least gain per cost saved.

    Args:
      gains: per layer the gain of each option (log of the retained energy, say).
      costs: per layer the cost of each option.
      budget: total cost allowed.

    Returns:
      Index of the chosen option of each layer.

    Raises:
      ValueError: if even the cheapest options exceed the budget.
    """
    gains = [np.asarray(g, np.float64) for g in gains]
    costs = [np.asarray(c, np.float64) for c in costs]
    _check_reach(costs, budget)
    fronts = [frontier(g, c) for g, c in zip(gains, costs)]
    at = [len(front) - 1 for front in fronts]
    spent = sum(float(c[f[-1]]) for c, f in zip(costs, fronts))

    def rate(k: int) -> float:
        if at[k] == 0:
            return float("inf")
        here, there = fronts[k][at[k]], fronts[k][at[k] - 1]
        return float((gains[k][here] - gains[k][there]) / (costs[k][here] - costs[k][there]))

    rates = [rate(k) for k in range(len(at))]
    while spent > budget * (1 + 1e-12):
        k = int(np.argmin(rates))
        spent -= costs[k][fronts[k][at[k]]] - costs[k][fronts[k][at[k] - 1]]
        at[k] -= 1
        rates[k] = rate(k)
    return [int(f[a]) for f, a in zip(fronts, at)]


def _check_reach(costs: Sequence[np.ndarray], budget: float) -> None:
    least = sum(float(np.min(c)) for c in costs)
    if least > budget * (1 + 1e-12):
        raise ValueError(
            f"budget {budget:.6g} is below the cost of the cheapest options ({least:.6g})"
        )


def allocate_ranks(
    gains: Sequence[AnyArray],
    costs: Sequence[AnyArray],
    budget: float,
    *,
    bins: int = 4000,
) -> list[int]:
    """Chooses one option per layer that maximises the total gain within a cost budget.

    Layer by layer the undominated (cost, gain) sums are kept: exact as long as there are at most
    ``bins`` of them; beyond, the best sum in each of ``bins`` equal intervals of cost stays. Costs
    are never rounded, so the budget always holds, and the result is never worse than
    `greedy_allocation`'s.

    Args:
      gains: per layer the gain of each option (log of the retained energy, accuracy, ...).
      costs: per layer the cost of each option, non-negative.
      budget: total cost allowed.
      bins: sums kept.

    Returns:
      Index of the chosen option of each layer.

    Raises:
      ValueError: if even the cheapest options exceed the budget.
    """
    if not budget > 0:
        raise ValueError(f"budget is {budget}; expected a positive cost")
    gains = [np.asarray(g, np.float64) for g in gains]
    costs = [np.asarray(c, np.float64) for c in costs]
    for layer, (gain, cost) in enumerate(zip(gains, costs, strict=True)):
        if gain.shape != cost.shape or not len(gain):
            raise ValueError(
                f"layer {layer}: {gain.shape} gains and {cost.shape} costs must match, at least one"
            )
    _check_reach(costs, budget)
    limit = budget * (1 + 1e-12)
    # what the layers still to come cost at least
    reserve = np.append(np.cumsum([c.min() for c in costs][::-1])[::-1][1:], 0.0)
    value, spent = np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for gain, cost, later in zip(gains, costs, reserve):
        values = (value[:, None] + gain).ravel()
        sums = (spent[:, None] + cost).ravel()
        inside = np.flatnonzero(sums + later <= limit)
        chosen = inside[frontier(values[inside], sums[inside])]
        if len(chosen) > bins:
            slot = (sums[chosen] / budget * bins).astype(int)
            last = np.append(slot[1:] != slot[:-1], True)
            chosen = chosen[last | (np.arange(len(chosen)) == 0)]
        trail.append(np.divmod(chosen, len(gain)))
        value, spent = values[chosen], sums[chosen]
    out, at = [], int(np.argmax(value))
    for before, option in reversed(trail):
        out.append(int(option[at]))
        at = int(before[at])
    out.reverse()
    greedy = greedy_allocation(gains, costs, budget)

    def total(options: Sequence[int]) -> float:
        return sum(float(g[o]) for g, o in zip(gains, options))

    return out if total(out) >= total(greedy) else greedy


def break_even_rank(kernel_shape: Sequence[int], form: str) -> int:
    """Largest rank at which a chain has fewer parameters than its kernel (0: never).

    Args:
      kernel_shape: (kh, kw, i, o); (i, o) for ``"dense"``.
      form: ``"dense"``, ``"basis"``, ``"spatial"``, ``"cp4"``, ``"cp3"`` or ``"scheme1"``.
    """
    if form == "dense":
        i, o = kernel_shape
        return _largest(i * o, i + o)
    kh, kw, i, o = kernel_shape
    size = kh * kw * i * o
    per_rank = {
        "basis": kh * kw * i + o,
        "spatial": kh * i + kw * o,
        "cp4": i + o + kh + kw,
        "cp3": i + o + kh * kw,
        "scheme1": i * (kh + kw + o),
    }
    if form not in per_rank:
        raise ValueError(f"form is {form!r}; expected one of {['dense', *per_rank]}")
    return _largest(size, per_rank[form])


def _largest(size: int, per_rank: int) -> int:
    return (size - 1) // per_rank
