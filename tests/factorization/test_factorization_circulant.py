"""Circulant algebra against dense products; learned codes; reconfigured layers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.linalg

from cnnjax import factorization as f
from cnnjax.factorization import circulant as c

pytestmark = pytest.mark.method("circulant_feature_map")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("d", [7, 8])
def test_algebra(d):
    g = np.random.default_rng(d)
    r, y = g.normal(size=d), g.normal(size=(3, d))
    dense = scipy.linalg.circulant(r)
    np.testing.assert_allclose(c.circulant_matrix(r), dense)
    np.testing.assert_allclose(c.circulant_product(r, y), y @ dense.T, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(dense, 2), np.abs(np.fft.fft(r)).max(), rtol=1e-12)
    orthogonal = scipy.linalg.circulant(c.orthogonal_circulant(g.normal(size=d // 2 + 1), d))
    np.testing.assert_allclose(orthogonal @ orthogonal.T, np.eye(d), atol=1e-12)
    matrix = g.normal(size=(d, d))
    nearest = scipy.linalg.circulant(c.nearest_circulant(matrix))
    # the least squares over the d shifts, solved outright
    shifts = np.stack([scipy.linalg.circulant(np.eye(d)[k]).reshape(-1) for k in range(d)], 1)
    best = np.linalg.lstsq(shifts, matrix.reshape(-1), rcond=None)[0]
    np.testing.assert_allclose(nearest, scipy.linalg.circulant(best), atol=1e-12)


def test_learned_code_beats_random_codes_and_stays_below_pca():
    g = np.random.default_rng(0)
    y = g.normal(size=(2000, 6)) @ g.normal(size=(6, 32)) + 0.05 * g.normal(size=(2000, 32))
    moment = y.T @ y / 2000
    signs = g.choice([-1.0, 1.0], 32)
    r, energy = f.circulant_learn(jax.random.key(0), moment, 12, signs=signs)
    dense = scipy.linalg.circulant(r)
    np.testing.assert_allclose(dense @ dense.T, np.eye(32), atol=1e-12)
    rows = dense[:12] * signs
    np.testing.assert_allclose(energy, np.trace(rows @ moment @ rows.T) / np.trace(moment))
    for seed in range(5):
        phases = np.random.default_rng(seed).uniform(-np.pi, np.pi, 17)
        other = c.retained_energy(c.orthogonal_circulant(phases, 32), moment, signs, 12)
        assert energy > other + 0.1
    pca = np.linalg.eigvalsh(moment)[-12:].sum() / np.trace(moment)
    assert energy < pca


def test_reconfigured_layers():
    g = np.random.default_rng(1)
    kernel, bias = g.normal(size=(3, 3, 2, 8)), g.normal(size=8)
    following = g.normal(size=(3, 3, 8, 5))
    x = g.normal(size=(4, 10, 10, 2))
    spec = f.ConvSpec((1, 1), "VALID")
    response = np.asarray(f.convolve(x, kernel, spec)) + bias
    moment = np.einsum("nhwi,nhwj->ij", response, response) / response[..., 0].size
    signs = g.choice([-1.0, 1.0], 8)
    expected = f.convolve(response, following, spec)
    r, _ = f.circulant_learn(jax.random.key(0), moment, 8, signs=signs, steps=20)
    small = f.circulant_reconfigure(kernel, bias, following, r, signs, moment, 8, 1e-13)
    code = f.convolve(x, small[0], spec) + small[1]
    np.testing.assert_allclose(f.convolve(code, small[2], spec), expected, rtol=1e-5, atol=1e-6)
    # responses of rank 3: a code of 3 channels loses nothing
    low = kernel @ (g.normal(size=(8, 3)) @ g.normal(size=(3, 8)))
    response = np.asarray(f.convolve(x, low, spec))
    moment = np.einsum("nhwi,nhwj->ij", response, response) / response[..., 0].size
    small = f.circulant_reconfigure(low, 0 * bias, following, r, signs, moment, 3, 1e-13)
    assert small[0].shape == (3, 3, 2, 3)
    assert small[2].shape == (3, 3, 3, 5)
    code = f.convolve(x, small[0], spec) + small[1]
    expected = np.asarray(f.convolve(response, following, spec))
    error = np.asarray(f.convolve(code, small[2], spec)) - expected
    assert np.linalg.norm(error) < 1e-4 * np.linalg.norm(expected)


def test_code_length_out_of_range():
    with pytest.raises(ValueError, match="rank is 9; expected 1 to 8"):
        f.circulant_learn(jax.random.key(0), np.eye(8), 9)
