"""Rank allocation against brute force over all combinations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cnnjax import factorization as f

pytestmark = pytest.mark.method("pca_energy_ranks")


def energy(spectra, ranks):
    return np.prod([s[:r].sum() for s, r in zip(spectra, ranks)])


def draw(seed):
    g = np.random.default_rng(seed)
    spectra = [np.sort(g.exponential(size=6) ** 2)[::-1] for _ in range(3)]
    return spectra, g.uniform(1, 5, 3)


def greedy(spectra, costs, budget):
    """The rule of section 5.4 written out: every step takes away what costs least energy."""
    ranks = [6] * 3
    steps = [cost / 6 for cost in costs]
    while sum(step * rank for step, rank in zip(steps, ranks)) > budget:
        before = list(ranks)
        share = {
            k: spectra[k][ranks[k] - 1] / spectra[k][: ranks[k]].sum() / steps[k]
            for k in range(3)
            if ranks[k] > 1
        }
        ranks[min(share, key=share.__getitem__)] -= 1
    return ranks, before


def test_greedy_is_near_the_brute_force_optimum():
    shares = []
    for seed in range(50):
        spectra, costs = draw(seed)
        budget = 0.5 * costs.sum()
        ranks = f.pca_energy_ranks(spectra, costs, budget)
        spent = sum(c * r / 6 for c, r in zip(costs, ranks))
        assert spent <= budget * (1 + 1e-9)
        expected, before = greedy(spectra, costs, budget)
        assert ranks == expected
        # the last eigenvalue taken away was needed
        assert sum(c * r / 6 for c, r in zip(costs, before)) > budget
        best = max(
            energy(spectra, combination)
            for combination in itertools.product(range(1, 7), repeat=3)
            if sum(c * r / 6 for c, r in zip(costs, combination)) <= budget
        )
        shares.append(energy(spectra, ranks) / best)
    assert np.mean(shares) >= 0.97
    assert max(shares) <= 1 + 1e-12


def test_allocation_is_the_brute_force_optimum():
    for seed in range(20):
        spectra, costs = draw(seed)
        budget = 0.53 * costs.sum()  # not a sum of steps: exact ties fall to the rounding
        gains = [np.log(np.cumsum(s)) for s in spectra]
        tables = [c * np.arange(1, 7) / 6 for c in costs]
        chosen = [i + 1 for i in f.allocate_ranks(gains, tables, budget, bins=20_000)]
        assert sum(c * r / 6 for c, r in zip(costs, chosen)) <= budget * (1 + 1e-9)
        best = max(
            energy(spectra, combination)
            for combination in itertools.product(range(1, 7), repeat=3)
            if sum(c * r / 6 for c, r in zip(costs, combination)) <= budget
        )
        np.testing.assert_allclose(energy(spectra, chosen), best, rtol=1e-9)


def test_equal_layers_get_equal_ranks_and_budgets_are_monotone():
    spectrum = 0.7 ** np.arange(8)
    ranks = f.pca_energy_ranks([spectrum] * 4, [2.0] * 4, 4.0)
    assert max(ranks) - min(ranks) <= 1
    totals = [
        sum(f.pca_energy_ranks([spectrum, spectrum[::2]], [1.0, 3.0], b))
        for b in (1.0, 2.0, 3.0, 4.0)
    ]
    assert totals == sorted(totals)
    assert f.pca_energy_ranks([spectrum], [2.0], 2.0) == [8]


def test_budget_out_of_reach():
    with pytest.raises(ValueError, match="below 0.5, the cost of rank 1"):
        f.pca_energy_ranks([np.ones(4)], [2.0], 0.4)
    with pytest.raises(ValueError, match="cheapest options"):
        f.allocate_ranks([np.zeros(2)], [np.array([2.0, 3.0])], 1.0)
    with pytest.raises(ValueError, match="budget is 0"):
        f.allocate_ranks([np.zeros(2)], [np.array([2.0, 3.0])], 0.0)


def test_break_even():
    for shape, form in (((3, 3, 16, 32), "spatial"), ((3, 3, 16, 32), "cp4"), ((20, 30), "dense")):
        rank = f.break_even_rank(shape, form)
        size = int(np.prod(shape))
        per = {"spatial": 3 * 16 + 3 * 32, "cp4": 16 + 32 + 6, "dense": 50}[form]
        assert rank * per < size <= (rank + 1) * per
    with pytest.raises(ValueError, match="form is 'ring'"):
        f.break_even_rank((3, 3, 4, 4), "ring")
