"""Separable transforms against SciPy; learned separable filters on planted ones."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.fft

from cnnjax import factorization as f


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.method("separable_transform")
@pytest.mark.parametrize("n", [1, 4, 8])
def test_dct_layer_equals_scipy(n):
    d = f.dct_matrix(n)
    np.testing.assert_allclose(d @ d.T, np.eye(n), atol=1e-12)
    blocks = np.random.default_rng(0).normal(size=(2, 3 * n, 2 * n, 2))
    got = np.asarray(f.chain_apply(f.separable_transform_chain(d, 2), blocks))
    for row in range(3):
        for column in range(2):
            for c in range(2):
                block = blocks[:, row * n : (row + 1) * n, column * n : (column + 1) * n, c]
                expected = scipy.fft.dctn(block, axes=(1, 2), norm="ortho")
                ours = got[:, row, column].reshape(2, 2, n, n)[:, c]
                np.testing.assert_allclose(ours, expected, atol=1e-12)


@pytest.mark.method("separable_transform")
def test_dct_basis_is_separable_and_spatial_svd_finds_it():
    n = 4
    d = f.dct_matrix(n)
    basis = np.einsum("pa,qb->abpq", d, d).reshape(n, n, 1, n * n)
    for o in range(n * n):
        s = np.linalg.svd(basis[:, :, 0, o], compute_uv=False)
        assert s[1] < 1e-12
    composed = f.compose_spatial(*f.spatial_svd(basis, n))
    np.testing.assert_allclose(composed, basis, atol=1e-12)


@pytest.mark.method("separable_transform")
def test_haar_reconstructs_perfectly():
    h = f.haar_matrix(8)
    np.testing.assert_allclose(h @ h.T, np.eye(8), atol=1e-12)
    image = np.random.default_rng(0).normal(size=(8, 8))
    coefficients = h @ image @ h.T
    # the low-low quarter by hand: twice the mean of each 2x2 block
    means = image.reshape(4, 2, 4, 2).mean((1, 3))
    np.testing.assert_allclose(coefficients[:4, :4], 2 * means, atol=1e-12)
    layer = f.chain_apply(f.separable_transform_chain(h), image[None, :, :, None])
    np.testing.assert_allclose(np.asarray(layer).reshape(8, 8), coefficients, atol=1e-12)
    np.testing.assert_allclose(h.T @ coefficients @ h, image, atol=1e-12)
    with pytest.raises(ValueError, match="even"):
        f.haar_matrix(5)


@pytest.mark.method("learn_separable_filters")
def test_planted_separable_filters_are_found():
    g = np.random.default_rng(0)
    v, h, w = g.normal(size=(4, 7)), g.normal(size=(4, 7)), g.normal(size=(30, 4))
    filters = np.einsum("nm,mi,mj->nij", w, v, h)
    a, b, c = f.learn_separable_filters(jax.random.key(0), filters, 4)
    found = np.einsum("nm,mi,mj->nij", c, a, b)
    assert np.linalg.norm(found - filters) < 1e-8 * np.linalg.norm(filters)
    with pytest.raises(ValueError, match="count is 0"):
        f.learn_separable_filters(jax.random.key(0), filters, 0)
