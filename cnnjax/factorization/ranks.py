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


def allocate_ranks(
    gains: Sequence[AnyArray],
    costs: Sequence[AnyArray],
    budget: float,
    *,
    bins: int = 2000,
) -> list[int]:
    """Chooses one option per layer that maximises the total gain within a cost budget.

    Exact dynamic programming over costs rounded *up* to ``budget / bins``, so the budget always
    holds; the loss against the true optimum vanishes as ``bins`` grows.

    Args:
      gains: per layer the gain of each option (log of the retained energy, accuracy, ...).
      costs: per layer the cost of each option, non-negative.
      budget: total cost allowed.
      bins: resolution.

    Returns:
      Index of the chosen option of each layer.

    Raises:
      ValueError: if even the cheapest options exceed the budget.
    """
    if not budget > 0:
        raise ValueError(f"budget is {budget}; expected a positive cost")
    gains = [np.asarray(g, np.float64) for g in gains]
    units = [np.ceil(np.asarray(c, np.float64) / budget * bins - 1e-9).astype(int) for c in costs]
    for layer, (gain, unit) in enumerate(zip(gains, units, strict=True)):
        if gain.shape != unit.shape or not len(gain):
            raise ValueError(
                f"layer {layer}: {gain.shape} gains and {unit.shape} costs must match, at least one"
            )
    least = sum(int(u.min()) for u in units)
    if least > bins:
        raise ValueError(
            f"budget {budget:.6g} is below the cost of the cheapest options "
            f"({sum(float(np.min(c)) for c in costs):.6g})"
        )
    best = np.zeros(bins + 1)
    choices = []
    for gain, unit in zip(gains, units):
        # table[option, b]: gain with b bins left for this layer and those before it
        table = np.full((len(gain), bins + 1), -np.inf)
        for option, (g, u) in enumerate(zip(gain, unit)):
            if u <= bins:
                table[option, u:] = best[: bins + 1 - u] + g
        choices.append(table.argmax(0))
        best = table.max(0)
    out, left = [], bins
    for chosen, unit in zip(reversed(choices), reversed(units)):
        option = int(chosen[left])
        out.append(option)
        left -= int(unit[option])
    return out[::-1]


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
