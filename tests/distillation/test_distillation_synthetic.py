"""MUNGE: exactness at its limits, neighbours by brute force, and the noisy ring."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import distillation as d
from cnnjax.distillation.synthetic import nearest_neighbours

pytestmark = pytest.mark.method("munge")


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)


def test_neighbours_by_brute_force(data):
    nominal = np.array([False, False, True, False, False])
    data = data.copy()
    data[:, 2] = np.round(data[:, 2])
    standard = (data - data.mean(0)) / data.std(0)
    expected = []
    for i in range(len(data)):
        squares = ((standard - standard[i])[:, ~nominal] ** 2).sum(-1)
        distance = squares + (data[:, 2] != data[i, 2])
        distance[i] = np.inf
        expected.append(distance.argmin())
    got = nearest_neighbours(data, nominal)
    np.testing.assert_array_equal(got, expected)


def test_p_zero_returns_the_data(data):
    got = d.munge(jax.random.key(0), data, k=3, p=0.0)
    np.testing.assert_array_equal(got, np.tile(data, (3, 1)))


def test_infinite_s_only_swaps(data):
    got = np.asarray(d.munge(jax.random.key(0), data, k=2, p=0.5, s=float("inf")))
    assert (got[:60] != data).any()
    for part in (got[:60], got[60:]):
        np.testing.assert_array_equal(np.sort(part, axis=0), np.sort(data, axis=0))


def test_nominal_attributes_keep_their_values(data):
    nominal = np.array([True, False, False, False, True])
    got = np.asarray(d.munge(jax.random.key(1), data, nominal, k=1, p=0.5, s=1.0))
    for column in (0, 4):
        np.testing.assert_array_equal(np.sort(got[:, column]), np.sort(data[:, column]))
    assert (np.sort(got[:, 1]) != np.sort(data[:, 1])).any()


def test_ring():
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 500)
    radius = 1 + rng.normal(0, 0.05, 500)
    ring = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)

    def off(x):
        return np.abs(np.linalg.norm(np.asarray(x), axis=1) - 1).mean()

    near = d.munge(jax.random.key(0), ring, k=4, p=0.5, s=2.0)
    independent = d.independent_marginals(jax.random.key(0), ring, size=2000)
    assert off(near) < 1.5 * off(ring)
    assert off(independent) > 3 * off(ring)


def test_bad_arguments(data):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="p is 1.5"):
        d.munge(key, data, p=1.5)
    with pytest.raises(ValueError, match="s is 0.0"):
        d.munge(key, data, s=0.0)
    with pytest.raises(ValueError, match="k is 0"):
        d.munge(key, data, k=0)
    with pytest.raises(ValueError, match=">= 2 rows"):
        d.munge(key, jnp.zeros((1, 3)))
