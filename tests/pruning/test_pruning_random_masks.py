"""Searches over masks, merging of neurons, sensitivity and rewinding against exhaustive oracles."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import pruning
from cnnjax.pruning import merging, random_masks

RNG = np.random.default_rng(21)
PARAMS = {
    "a": {
        "kernel": jnp.asarray(RNG.normal(size=(2, 2, 3, 6)), jnp.float32),
        "bias": jnp.asarray(RNG.normal(size=6), jnp.float32),
    },
    "b": {"kernel": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)},
}
X = jnp.asarray(RNG.normal(size=(10, 12)), jnp.float32)


def outputs(p):
    return jax.nn.relu(X @ p["a"]["kernel"].reshape(12, 6) + p["a"]["bias"]) @ p["b"]["kernel"]


FULL = outputs(PARAMS)


def damage(p):
    return jnp.mean(jnp.square(outputs(p) - FULL))


@pytest.mark.method("random_mask_pruning")
def test_best_of_n_is_the_minimum_and_improves_with_n():
    found = {}
    for n in (8, 24):
        best = pruning.best_of_n(
            jax.random.key(0), PARAMS, damage, ratio=0.5, count=n, include="a/kernel", batch=8
        )
        assert best.error == best.errors.min()
        masked = pruning.apply_mask(PARAMS, best.mask)
        np.testing.assert_allclose(damage(masked), best.error, rtol=1e-5)
        kept = np.asarray(best.mask["a"]["kernel"]).any((0, 1, 2))
        assert kept.sum() == 3
        np.testing.assert_array_equal(best.mask["a"]["bias"], kept)
        assert np.asarray(best.mask["b"]["kernel"]).all()
        found[n] = best
    np.testing.assert_array_equal(found[24].errors[:8], found[8].errors)
    assert found[24].error <= found[8].error
    # all subsets of 6 channels, one by one in numpy
    errors = {}
    p = jax.tree.map(np.asarray, PARAMS)
    for keep in itertools.combinations(range(6), 3):
        m = np.isin(range(6), keep)
        h = np.maximum(
            np.asarray(X) @ (p["a"]["kernel"].reshape(12, 6) * m) + p["a"]["bias"] * m, 0
        )
        errors[keep] = ((h @ p["b"]["kernel"] - np.asarray(FULL)) ** 2).mean()
    stacked = np.stack([np.isin(range(6), keep) for keep in errors])
    masks = jax.tree.map(lambda w: jnp.ones((20, *w.shape), bool), PARAMS)
    masks["a"]["bias"] = jnp.asarray(stacked)
    masks["a"]["kernel"] = jnp.broadcast_to(stacked[:, None, None, None], (20, 2, 2, 3, 6))
    best = pruning.best_of_masks(PARAMS, masks, damage)
    np.testing.assert_allclose(best.errors, list(errors.values()), rtol=1e-4)
    assert tuple(np.flatnonzero(best.mask["a"]["bias"])) == min(errors, key=errors.get)


@pytest.mark.method("random_mask_pruning")
def test_cuts_are_exact_in_each_layer_and_combine():
    best = pruning.best_of_n(
        jax.random.key(1),
        PARAMS,
        damage,
        ratio=[("filter", 0.34), ("kernel", 0.5)],
        count=4,
        include="a/kernel",
    )
    m = np.asarray(best.mask["a"]["kernel"])
    maps = m.any((0, 1, 2))
    assert maps.sum() <= 3  # ceil(0.34 * 6) = 3 go, and a map may lose all its kernels
    kernels = m.any((0, 1))
    assert kernels.sum() <= 9
    np.testing.assert_array_equal(m, np.broadcast_to(kernels, m.shape))
    assert np.asarray(best.mask["a"]["bias"]).sum() <= 3
    with pytest.raises(ValueError, match="removes all 1 groups .layer. of a/kernel"):
        pruning.best_of_n(
            jax.random.key(0), PARAMS, damage, ratio=0.5, granularity="layer", include="a/kernel"
        )
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pruning.best_of_n(jax.random.key(0), PARAMS, damage, ratio=0.5, count=0)


@pytest.mark.method("particle_filter_pruning")
def test_systematic_resampling_is_unbiased_and_within_one():
    w = np.asarray([0.05, 0.4, 0.15, 0.3, 0.1])
    n = 7

    @jax.jit
    def draw(key):
        found = random_masks.systematic_resample(key, jnp.asarray(w, jnp.float32), n)
        return jnp.bincount(found, length=5)

    counts = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000)))
    assert (np.abs(counts - n * w) < 1 + 1e-5).all()
    np.testing.assert_allclose(counts.mean(0), n * w, atol=4 * 0.5 / np.sqrt(4000))


VALUES = np.asarray([3, -1, 4, 1, -5, 9, 2, -6, 5, 3.5, -8, 0.5])


@pytest.mark.method("particle_filter_pruning")
def test_particles_find_the_optimum_of_a_separable_score_and_never_get_worse():
    values = jnp.asarray(VALUES, jnp.float32)
    seen = []

    def error(bits):
        return -jnp.sum(jnp.where(bits, values, 0))

    for seed in range(3):
        best = pruning.particle_filter(
            jax.random.key(seed), error, 12, 5, particles=24, generations=25
        )
        lowest = np.asarray(best.errors).min(axis=1)
        assert (np.diff(lowest) <= 0).all()
        assert best.mask.sum() == 5
        assert best.error == lowest[-1]
        seen.append(set(np.flatnonzero(best.mask)))
    assert set(np.argsort(VALUES)[-5:]) in seen
    assert sum(s == set(np.argsort(VALUES)[-5:]) for s in seen) >= 2
    whole = pruning.particle_filter(jax.random.key(0), jnp.sum, 4, 4, particles=3, generations=2)
    assert whole.mask.all()
    first = pruning.particle_filter(jax.random.key(0), error, 12, 5, particles=4, generations=0)
    assert first.errors.shape == (1, 4)
    with pytest.raises(ValueError, match=r"\[1, 12\], got 13"):
        pruning.particle_filter(jax.random.key(0), error, 12, 13)
    mask = pruning.bits_to_mask(PARAMS, jnp.arange(6) % 2 == 0, ["a/kernel"], "filter")
    np.testing.assert_array_equal(mask["a"]["bias"], np.arange(6) % 2 == 0)
    with pytest.raises(ValueError, match="5 bits for 6 groups"):
        pruning.bits_to_mask(PARAMS, jnp.ones(5, bool), ["a/kernel"], "filter")


@pytest.mark.method("data_free_neuron_merging")
def test_duplicates_merge_without_a_change_and_others_within_the_bound():
    w, b, a = RNG.normal(size=(5, 8)), RNG.normal(size=8), RNG.normal(size=(8, 3))
    w[:, 6], b[6] = w[:, 2], b[2]
    x = RNG.normal(size=(200, 5))

    def net(w, b, a):
        return np.maximum(x @ w + b, 0) @ a

    with jax.enable_x64(True):
        args = jnp.asarray(w), jnp.asarray(b), jnp.asarray(a)
        one = jax.device_get(merging.merge(*args, 1))
        s = np.asarray(merging.saliencies(*args))
        many = jax.device_get(merging.merge(*args, 5))
    kept = one.alive
    assert set(one.pairs[0]) == {2, 6}
    assert one.saliencies[0] == 0
    np.testing.assert_allclose(
        net(w[:, kept], b[kept], one.outgoing[kept]), net(w, b, a), atol=1e-13
    )
    for i, j in [(0, 1), (4, 3)]:
        want = ((w[:, i] - w[:, j]) ** 2).sum() + (b[i] - b[j]) ** 2
        np.testing.assert_allclose(s[i, j], want * (a[j] ** 2).mean(), rtol=1e-12)
        merged = a.copy()
        merged[i] += merged[j]
        rest = np.arange(8) != j
        change = np.abs(net(w[:, rest], b[rest], merged[rest]) - net(w, b, a))
        size = np.sqrt((x**2).sum(1) + 1)
        assert (change <= np.abs(a[j]) * np.sqrt(want) * size[:, None] + 1e-12).all()
    # every step from scratch in numpy
    out, alive = a.copy(), np.ones(8, bool)
    apart = ((w[:, :, None] - w[:, None]) ** 2).sum(0) + (b[:, None] - b) ** 2
    for (i, j), value in zip(many.pairs, many.saliencies):
        table = apart * (out**2).mean(1)[None]
        table[~alive] = table[:, ~alive] = np.inf
        np.fill_diagonal(table, np.inf)
        np.testing.assert_allclose(value, table.min(), rtol=1e-10, atol=1e-14)
        assert table[i, j] <= table.min() * (1 + 1e-10) + 1e-14
        out[i] += out[j]
        out[j], alive[j] = 0, False
    np.testing.assert_allclose(many.outgoing, out, rtol=1e-10)
    np.testing.assert_array_equal(many.alive, alive)


@pytest.mark.method("data_free_neuron_merging")
def test_merged_trees_are_smaller_and_bad_ones_are_refused():
    draw = lambda *s: jnp.asarray(RNG.normal(size=s), jnp.float32)  # noqa: E731
    params = {
        "fc1": {"kernel": draw(7, 9), "bias": draw(9)},
        "fc2": {"kernel": draw(9, 4), "bias": draw(4)},
    }
    small, kept = pruning.merge_neurons(params, "fc1", "fc2", 3)
    total = sum(w.size for w in jax.tree.leaves(small))
    assert total == sum(w.size for w in jax.tree.leaves(params)) - 3 * (7 + 1 + 4)
    np.testing.assert_array_equal(small["fc1"]["bias"], np.asarray(params["fc1"]["bias"])[kept])
    count = merging.cutoff_count(
        params["fc1"]["kernel"], params["fc1"]["bias"], params["fc2"]["kernel"]
    )
    assert 0 <= count < 9
    auto, _ = pruning.merge_neurons(params, "fc1", "fc2")
    assert auto["fc1"]["bias"].size == 9 - count
    with pytest.raises(ValueError, match="no neuron would be left"):
        pruning.merge_neurons(params, "fc1", "fc2", 9)
    with pytest.raises(KeyError, match="fc3/kernel"):
        pruning.merge_neurons(params, "fc1", "fc3", 1)
    with pytest.raises(ValueError, match="must be dense kernels"):
        pruning.merge_neurons(params, "fc2", "fc1", 1)


def test_sensitivity_equals_pruning_one_layer_at_a_time():
    ratios = (0.3, 0.6)
    got = pruning.sensitivity(PARAMS, damage, ratios, batch=3)
    assert set(got) == {"", "a/kernel", "b/kernel"}
    np.testing.assert_allclose(got[""], 0, atol=1e-10)
    for path in ("a/kernel", "b/kernel"):
        for value, ratio in zip(got[path], ratios):
            scores = jax.tree.map(jnp.abs, PARAMS)
            mask = pruning.mask_from_scores(
                scores, ratio, granularity="filter", op="sum", include=path
            )
            want = damage(pruning.apply_mask(PARAMS, mask))
            np.testing.assert_allclose(value, want, rtol=1e-4)
    with pytest.raises(ValueError, match="removes all 4 groups"):
        pruning.sensitivity(PARAMS, damage, (0.99,), include="b/kernel")


def test_lottery_tickets_are_early_weights_under_the_trained_mask():
    early = {"k": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32), "b": jnp.ones(5)}
    shift = jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)
    rounds = []

    def train(params, mask, number):
        rounds.append((number, int(np.asarray(mask["k"]).sum()), np.asarray(params["k"])))
        return {"k": params["k"] + shift, "b": params["b"] * 2}

    ticket, mask = pruning.lottery_ticket(early, train, [0.5, 0.75])
    first = np.abs(np.asarray(early["k"] + shift))
    cut = first >= np.sort(first.ravel())[10]
    trained = np.abs(np.where(cut, early["k"] + shift, 0))
    final = trained >= np.sort(trained.ravel())[15]
    np.testing.assert_array_equal(mask["k"], final)
    np.testing.assert_array_equal(ticket["k"], np.where(final, early["k"], 0))
    np.testing.assert_array_equal(ticket["b"], early["b"])
    assert [r[:2] for r in rounds] == [(0, 20), (1, 10)]
    np.testing.assert_array_equal(rounds[1][2], np.where(cut, early["k"], 0))  # rewound
    with pytest.raises(ValueError, match="must not decrease"):
        pruning.lottery_ticket(early, train, [0.5, 0.4])
    with pytest.raises(ValueError, match="empty"):
        pruning.lottery_ticket(early, train, [])
