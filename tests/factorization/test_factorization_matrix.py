"""SVD-based factors: Eckart-Young, the weighted metric, spatial pairs, separable bases."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.linalg

from cnnjax import factorization as f


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.method("svd_dense")
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_eckart_young(x64, rank):
    w = rng().normal(size=(20, 12))
    left, right = f.svd_dense(w, rank)
    s = scipy.linalg.svdvals(w)
    error = np.linalg.norm(w - np.asarray(left) @ np.asarray(right))
    np.testing.assert_allclose(error, np.sqrt(np.sum(s[rank:] ** 2)), atol=1e-10)
    np.testing.assert_allclose(error, f.tail_norm(s, rank), atol=1e-10)
    # the split is balanced: both factors carry the root of each singular value
    np.testing.assert_allclose(
        np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-10
    )


@pytest.mark.method("weighted_low_rank")
def test_weighted_svd_is_the_best_response(x64):
    g = rng(1)
    w = g.normal(size=(10, 7))
    x = g.normal(size=(500, 10)) * 0.7 ** np.arange(10)
    moment = x.T @ x / 500

    def response(left, right):
        return np.linalg.norm(x @ (w - np.asarray(left) @ np.asarray(right)))

    best = response(*f.weighted_svd(w, moment, 3, damping=1e-12))
    # the residual is the root of the discarded squared singular values of C^(1/2) W
    root = scipy.linalg.sqrtm(moment).real
    tail = scipy.linalg.svdvals(root @ w)[3:]
    np.testing.assert_allclose(best, np.sqrt(500 * np.sum(tail**2)), rtol=1e-6)
    assert best <= response(*f.svd_dense(w, 3))
    # identical to projecting on the top eigenvectors of W^T C W
    vectors = np.linalg.eigh(w.T @ moment @ w)[1][:, -3:]
    np.testing.assert_allclose(best, np.linalg.norm(x @ w @ (np.eye(7) - vectors @ vectors.T)))
    # and no random rank-3 matrix, however it is refined, is better
    for seed in range(3):
        left = rng(seed).normal(size=(10, 3))
        for _ in range(50):
            right = np.linalg.lstsq(x @ left, x @ w, rcond=None)[0]
            left = np.linalg.lstsq(x, x @ w @ np.linalg.pinv(right), rcond=None)[0]
        assert best <= response(left, right) + 1e-8


@pytest.mark.method("weighted_low_rank")
def test_weighted_svd_with_a_singular_moment_is_finite():
    w = rng().normal(size=(6, 5)).astype(np.float32)
    moment = np.zeros((6, 6), np.float32)
    moment[0, 0] = 1.0
    left, right = f.weighted_svd(w, moment, 2)
    assert np.isfinite(left).all()
    assert np.isfinite(right).all()


@pytest.mark.method("filter_basis")
def test_filter_basis_error_and_equality_to_tucker(x64):
    kernel = rng(2).normal(size=(3, 3, 6, 8))
    s = scipy.linalg.svdvals(kernel.reshape(-1, 8))
    spatial, mix = f.filter_basis(kernel, 5)
    composed = np.einsum("abir,ro->abio", spatial, np.asarray(mix)[0, 0])
    np.testing.assert_allclose(
        np.linalg.norm(kernel - composed), np.sqrt(np.sum(s[5:] ** 2)), atol=1e-10
    )
    tucker = f.compose_tucker2(f.tucker2(kernel, 6, 5))
    np.testing.assert_allclose(tucker, composed, atol=1e-10)
    mix, spatial = f.dual_filter_basis(kernel, 4)
    dual = np.einsum("ir,abro->abio", np.asarray(mix)[0, 0], spatial)
    s = scipy.linalg.svdvals(np.moveaxis(kernel, 2, 0).reshape(6, -1))
    np.testing.assert_allclose(np.linalg.norm(kernel - dual), np.sqrt(np.sum(s[4:] ** 2)))


@pytest.mark.method("spatial_svd")
@pytest.mark.parametrize("size", [(3, 3), (5, 5), (3, 5), (1, 7)])
def test_spatial_svd_error_is_the_tail(x64, size):
    kernel = rng(3).normal(size=(*size, 4, 6))
    # the bijection written out by loops
    matrix = np.zeros((4 * size[0], 6 * size[1]))
    for a, b, i, o in np.ndindex(kernel.shape):
        matrix[i * size[0] + a, o * size[1] + b] = kernel[a, b, i, o]
    s = scipy.linalg.svdvals(matrix)
    for rank in (1, 3, len(s)):
        composed = f.compose_spatial(*f.spatial_svd(kernel, rank))
        error = np.linalg.norm(kernel - np.asarray(composed))
        np.testing.assert_allclose(error, np.sqrt(np.sum(s[rank:] ** 2)), atol=1e-12)


@pytest.mark.method("spatial_svd")
def test_spatial_svd_of_a_column_kernel_is_the_filter_basis(x64):
    kernel = rng(4).normal(size=(5, 1, 4, 6))
    vertical, horizontal = f.spatial_svd(kernel, 3)
    composed = np.asarray(f.compose_spatial(vertical, horizontal))
    spatial, mix = f.filter_basis(kernel, 3)
    np.testing.assert_allclose(
        composed, np.einsum("abir,ro->abio", spatial, np.asarray(mix)[0, 0]), atol=1e-12
    )


@pytest.mark.method("jaderberg_scheme2")
def test_scheme2_by_alternating_least_squares_is_never_better_than_the_closed_form(x64):
    g = rng(5)
    kernel = g.normal(size=(3, 3, 4, 5))
    best = np.linalg.norm(kernel - np.asarray(f.compose_spatial(*f.spatial_svd(kernel, 3))))
    matrix = kernel.transpose(2, 0, 3, 1).reshape(12, 15)
    for _ in range(5):
        left = g.normal(size=(12, 3))
        for _ in range(300):
            right = np.linalg.lstsq(left, matrix, rcond=None)[0]
            left = np.linalg.lstsq(right.T, matrix.T, rcond=None)[0].T
        assert best <= np.linalg.norm(matrix - left @ right) + 1e-9


@pytest.mark.method("jaderberg_scheme1")
def test_scheme1_recovers_planted_factors_and_improves_with_rank(x64):
    g = rng(6)
    v, h, c = g.normal(size=(3, 2, 2)), g.normal(size=(3, 2, 2)), g.normal(size=(2, 2, 7))
    planted = np.einsum("aim,bim,imo->abio", v, h, c)
    x, spec = g.normal(size=(2, 9, 8, 2)), f.ConvSpec((2, 2))
    chain = f.chain_apply(f.scheme1_chain(v, h, c, spec), x)
    np.testing.assert_allclose(chain, f.convolve(x, planted, spec), atol=1e-10)
    key = jax.random.key(0)
    found = f.compose_scheme1(*f.jaderberg_scheme1(key, planted, 2))
    # alternating least squares converges slowly here: close, not exact
    assert np.linalg.norm(found - planted) < 1e-2 * np.linalg.norm(planted)
    kernel = g.normal(size=(3, 3, 2, 7))
    errors = [
        np.linalg.norm(kernel - f.compose_scheme1(*f.jaderberg_scheme1(key, kernel, m)))
        for m in (1, 4, 9)
    ]
    assert all(b <= a + 1e-9 for a, b in zip(errors, errors[1:]))
    assert errors[-1] < 1e-8


@pytest.mark.method("svd_dense")
def test_energy_rank():
    s = np.array([3.0, 2.0, 1.0, 0.0])
    assert f.energy_rank(s, 9 / 14) == 1
    assert f.energy_rank(s, 0.65) == 2
    assert f.energy_rank(s, 1.0) == 3
    assert f.energy_rank(np.zeros(3), 0.9) == 1
    with pytest.raises(ValueError, match="energy is 1.5"):
        f.energy_rank(s, 1.5)


@pytest.mark.method("svd_dense")
def test_rank_errors_name_the_maximum():
    kernel = np.ones((3, 3, 4, 5), np.float32)
    with pytest.raises(ValueError, match="rank is 0; expected 1 to 5"):
        f.filter_basis(kernel, 0)
    with pytest.raises(ValueError, match="rank is 13; expected 1 to 12"):
        f.spatial_svd(kernel, 13)
    with pytest.raises(ValueError, match="tucker2 output rank is 6; expected 1 to 5"):
        f.tucker2(kernel, 4, 6)
    with pytest.raises(ValueError, match="rank is 10; expected 1 to 9"):
        f.jaderberg_scheme1(jax.random.key(0), kernel, 10)
