"""Response reconstruction: PCA and GSVD oracles, the exact z-update, orderings on held-out data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from cnnjax import factorization as f
from cnnjax.factorization.response import (
    relaxed_targets,
    response_factors,
    response_spectrum,
    sample_positions,
)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def layer(seed=0, n=1500, patch=40, o=24, decay=0.85, shift=0.0):
    """Inputs with a decaying spectrum, a kernel matrix, and the responses."""
    g = np.random.default_rng(seed)
    basis = np.linalg.qr(g.normal(size=(patch, patch)))[0]
    x = (g.normal(size=(n, patch)) * decay ** np.arange(patch)) @ basis
    w, c = g.normal(size=(patch, o)), 0.3 * g.normal(size=o) + shift
    return x, w, c, x @ w + c


@pytest.mark.method("response_low_rank")
def test_symmetric_solution_is_pca_of_the_responses():
    *_, y = layer()
    centred = y - y.mean(0)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    for rank in (3, 8, 24):
        fitted = f.response_low_rank(y, rank)
        error = np.sum((y - np.asarray(fitted(y))) ** 2)
        np.testing.assert_allclose(error, values[rank:].sum(), rtol=1e-5, atol=1e-6 * values[0])
    # full rank is exact but for the ridge
    full = f.response_low_rank(y, 24, eps=1e-14)
    np.testing.assert_allclose(full(y), y, atol=1e-8 * np.abs(y).max())
    np.testing.assert_allclose(
        response_spectrum(y), values / len(y), rtol=1e-7, atol=1e-9 * values[0]
    )


@pytest.mark.method("response_low_rank")
def test_general_solution_equals_the_generalised_svd():
    g = np.random.default_rng(1)
    *_, y = layer(2, o=8)
    z = np.maximum(y, 0) @ g.normal(size=(8, 8)) + 0.1 * g.normal(size=y.shape)
    yc, zc = (y - y.mean(0)).T, (z - z.mean(0)).T
    full = zc @ yc.T @ np.linalg.inv(yc @ yc.T)
    root = scipy.linalg.sqrtm(yc @ yc.T).real
    u, s, vt = np.linalg.svd(full @ root)
    expected = (u[:, :3] * s[:3]) @ vt[:3] @ np.linalg.inv(root)
    fitted = f.response_low_rank(y, 3, z=z, eps=1e-14)
    np.testing.assert_allclose(fitted.p @ fitted.q.T, expected, atol=1e-7)
    np.testing.assert_allclose(fitted.b, z.mean(0) - expected @ y.mean(0), atol=1e-7)


@pytest.mark.method("response_low_rank")
def test_held_out_error_is_below_weight_only():
    x, w, c, y = layer(3)
    held_x, held_y = x[1000:], y[1000:]
    for rank in (4, 8, 16):
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        plain = held_x @ ((u[:, :rank] * s[:rank]) @ vt[:rank]) + c
        ours = np.asarray(f.response_low_rank(y[:1000], rank)(held_y))
        ratio = np.linalg.norm(held_y - ours) / np.linalg.norm(held_y - plain)
        assert ratio < 0.9, rank


@pytest.mark.method("nonlinear_response_low_rank")
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_target_update_beats_a_fine_grid(penalty):
    g = np.random.default_rng(0)
    y, predicted = g.normal(0, 2, (40, 1)), g.normal(0, 2, (40, 1))
    z = np.asarray(relaxed_targets(y, predicted, penalty))

    def cost(z):
        return (np.maximum(y, 0) - np.maximum(z, 0)) ** 2 + penalty * (z - predicted) ** 2

    grid = np.linspace(-12, 12, 240_001)[None]
    assert (cost(z)[:, 0] <= cost(grid).min(1) + 1e-12).all()


@pytest.mark.method("nonlinear_response_low_rank")
def test_relu_aware_beats_linear_after_the_relu():
    *_, y = layer(4, n=4000, decay=0.93, shift=-2.0)
    train, held = y[:3000], y[3000:]

    def error(fitted):
        return np.sum((np.maximum(held, 0) - np.maximum(np.asarray(fitted(held)), 0)) ** 2)

    # near full rank there is nothing left to gain
    for rank in (4, 8):
        linear = f.response_low_rank(train, rank)
        aware = f.nonlinear_response_low_rank(train, rank)
        assert error(aware) < 0.98 * error(linear), rank


@pytest.mark.method("nonlinear_response_low_rank")
def test_penalised_objective_does_not_increase():
    *_, y = layer(5, n=300, o=8)
    penalty, target = 0.5, np.maximum(y, 0)
    fitted, values = f.response_low_rank(y, 3), []
    for _ in range(8):
        z = np.asarray(relaxed_targets(y, fitted(y), penalty))
        fitted = f.response_low_rank(y, 3, z=z, eps=1e-14)
        residual = np.sum((z - np.asarray(fitted(y))) ** 2)
        values.append(np.sum((target - np.maximum(z, 0)) ** 2) + penalty * residual)
    assert all(b <= a * (1 + 1e-9) for a, b in zip(values, values[1:]))


@pytest.mark.method("asymmetric_reconstruction")
def test_asymmetric_reduces_to_symmetric_and_absorbs_earlier_errors():
    x, w, c, y = layer(6)
    same = f.nonlinear_response_low_rank(y, 6, target=y)
    np.testing.assert_allclose(same.p, f.nonlinear_response_low_rank(y, 6).p)
    # an approximated layer before: the inputs lose their weak directions and get an offset
    g = np.random.default_rng(7)
    damaged = x @ (np.eye(40) + 0.15 * g.normal(size=(40, 40))) + 0.2
    y_hat = damaged @ w + c
    train, held = slice(0, 1000), slice(1000, None)

    def error(fitted):
        out = np.asarray(fitted(y_hat[held]))
        return np.sum((np.maximum(y[held], 0) - np.maximum(out, 0)) ** 2)

    symmetric = f.nonlinear_response_low_rank(y_hat[train], 10)
    asymmetric = f.nonlinear_response_low_rank(y_hat[train], 10, target=y[train])
    assert error(asymmetric) < error(symmetric)


@pytest.mark.method("response_low_rank")
def test_factors_make_the_layer_answer_the_map():
    g = np.random.default_rng(8)
    kernel, bias = g.normal(size=(3, 3, 4, 10)), g.normal(size=10)
    x = g.normal(size=(6, 9, 9, 4))
    spec = f.ConvSpec((2, 2), "SAME")
    response = f.convolve(x, kernel, spec) + bias
    samples = sample_positions(jax.random.key(0), response, 10)
    assert samples.shape == (60, 10)
    for rank in (4, 10):
        fitted = f.response_low_rank(samples, rank, eps=1e-14)
        spatial, mix, new_bias = response_factors(kernel, bias, fitted)
        chain = f.basis_chain(spatial, mix, spec, new_bias)
        np.testing.assert_allclose(f.chain_apply(chain, x), fitted(response), atol=1e-9)
    # full rank reproduces the layer itself
    np.testing.assert_allclose(f.chain_apply(chain, x), response, atol=1e-7)


@pytest.mark.method("response_low_rank")
def test_bad_input():
    y = jnp.ones((5, 8))
    with pytest.raises(ValueError, match="5 samples for 8 outputs: at least 8"):
        f.response_low_rank(y, 2)
    with pytest.raises(ValueError, match="response rank is 9; expected 1 to 8"):
        f.response_low_rank(jnp.ones((20, 8)), 9)
