"""Neuron selection: planted profiles, brute-force minimisation, balanced accuracies by loops."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import distillation as d
from cnnjax.distillation.neurons import mean_field, redundancy, unary_cost

IA = np.arange(12) < 8


def planted(ia=10, na=10, flat=20, seed=0):
    """Profiles (k, 12): selective to one identity attribute, to one nuisance one, to none."""
    rng = np.random.default_rng(seed)
    x = 0.5 + 0.02 * rng.random((ia + na + flat, 12))
    x[np.arange(ia), np.arange(ia) % 8] = 0.9
    x[ia + np.arange(na), 8 + np.arange(na) % 4] = 0.9
    return x.astype(np.float32)


@pytest.mark.method("neuron_selection")
def test_profile_equals_the_best_threshold_by_search():
    rng = np.random.default_rng(0)
    activations = np.round(rng.normal(size=(40, 3)), 1).astype(np.float32)  # with ties
    attributes = rng.random((40, 2)) < 0.4
    attributes = np.concatenate([attributes, np.ones((40, 1), bool)], 1)  # one is constant
    expected = np.full((3, 3), 0.5)
    for i, j in itertools.product(range(3), range(2)):
        for threshold in np.unique(activations[:, i]):
            positive = activations[:, i] > threshold
            y = attributes[:, j]
            balanced = 0.5 * (positive[y].mean() + (~positive[~y]).mean())
            expected[i, j] = max(expected[i, j], balanced, 1 - balanced)
    np.testing.assert_allclose(d.neuron_profile(activations, attributes), expected, atol=1e-6)


@pytest.mark.method("neuron_selection")
def test_planted_profiles_are_found():
    x = planted()
    f = np.asarray(unary_cost(x, IA))
    assert f[:10].mean() < 0.3
    assert f[10:20].mean() > 4
    assert 0.3 < np.median(f[20:]) < 3
    chosen, _ = d.select_neurons(x, IA, 8)
    assert set(np.asarray(chosen)) <= set(range(10))
    more, _ = d.select_neurons(x, IA, 12)
    assert set(range(10)) <= set(np.asarray(more))
    assert not set(range(10, 20)) & set(np.asarray(more))


@pytest.mark.method("neuron_selection")
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_low_temperature_mean_field_is_the_brute_force_minimum(tau):
    x = planted(4, 4, 4)
    cost, pair = np.asarray(unary_cost(x, IA)), np.asarray(redundancy(x))
    lam = 0.01
    best, argument = np.inf, None
    for bits in itertools.product((0, 1), repeat=12):
        y = np.array(bits)
        energy = np.sum((cost - tau) * y) + lam * y @ pair @ y
        if energy < best:
            best, argument = energy, y
    q = np.asarray(mean_field(cost, pair, tau, lam, 0.01))
    np.testing.assert_array_equal(q > 0.5, argument == 1)


@pytest.mark.method("neuron_selection")
def test_duplicates_are_not_both_chosen_when_redundancy_is_dear():
    x = planted(8, 8, 8)
    # neuron 1 becomes a copy of neuron 0, and a little cheaper than the unselective ones
    x[1] = x[0]
    chosen, _ = d.select_neurons(x, IA, 2, lam=0.0)
    assert set(np.asarray(chosen)) <= set(range(8))
    wide = np.full((3, 12), 0.5, np.float32)
    wide[0, 0] = wide[1, 0] = 5.0  # far from neuron 2 in profile space: no redundancy with it
    wide[2, 1] = 4.0
    pair, _ = d.select_neurons(wide, IA, 2, lam=50.0, theta=0.05)
    assert set(np.asarray(pair)) != {0, 1}


@pytest.mark.method("neuron_selection")
def test_permuting_neurons_permutes_the_result():
    x = planted()
    order = np.random.default_rng(1).permutation(len(x))
    a, qa = d.select_neurons(x, IA, 8)
    b, qb = d.select_neurons(x[order], IA, 8)
    np.testing.assert_allclose(qb, np.asarray(qa)[order], atol=1e-4)
    assert set(order[np.asarray(b)]) == set(np.asarray(a))


@pytest.mark.method("neuron_selection")
def test_selection_errors():
    x = planted()
    with pytest.raises(ValueError, match="count is 41"):
        d.select_neurons(x, IA, 41)
    with pytest.raises(ValueError, match="at least one attribute"):
        d.select_neurons(x, np.ones(12, bool), 3)


@pytest.mark.method("neuron_mimic")
def test_mimic_loss():
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(6, 9)).astype(np.float32)
    student = rng.normal(size=(6, 3)).astype(np.float32)
    selected = np.array([1, 4, 7])
    scale = np.array([1.0, 2.0, 0.5], np.float32)
    expected = 0.5 * np.mean(((teacher[:, selected] / scale - student) ** 2).sum(1))
    got = d.neuron_mimic(jnp.asarray(student), teacher, selected, scale)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
