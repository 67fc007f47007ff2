"""Predicted parameters: exact with all rows, smooth against white noise, trainable."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import factorization as f

pytestmark = pytest.mark.method("predict_parameters")


@pytest.fixture(scope="module")
def grid():
    rows, columns = np.mgrid[:20, :20]
    return np.stack([rows.ravel(), columns.ravel()], 1).astype(np.float64)


def test_prediction_of_smooth_and_white_weights(grid):
    g = np.random.default_rng(0)
    with jax.enable_x64(True):
        kernel = np.asarray(f.squared_exponential(grid, grid, 3.0))
        squares = ((grid[:, None] - grid[None]) ** 2).sum(-1)
        np.testing.assert_allclose(kernel, np.exp(-squares / 18), rtol=1e-12)
        smooth = np.linalg.cholesky(kernel + 1e-9 * np.eye(400)) @ g.normal(size=(400, 10))
        white = g.normal(size=(400, 10))
        errors = []
        for share in (0.05, 0.10, 0.25, 0.50):
            rows = np.sort(g.choice(400, int(share * 400), replace=False))
            u = f.prediction_dictionary(kernel, rows, 1e-6)
            # kernel ridge regression by the textbook formula
            inner = kernel[np.ix_(rows, rows)] + 1e-6 * np.eye(len(rows))
            np.testing.assert_allclose(
                np.asarray(u) @ smooth[rows],
                kernel[:, rows] @ np.linalg.solve(inner, smooth[rows]),
                atol=1e-5,
            )
            errors.append(f.smoothness_gate(smooth, u, rows).relative_error)
        np.testing.assert_allclose(errors, [0.51, 0.28, 0.044, 0.012], rtol=0.8, atol=0.01)
        assert errors == sorted(errors, reverse=True)
        noise = f.smoothness_gate(white, u, rows)
        assert noise.relative_error > 1
        assert not noise.smooth


def test_all_rows_reproduce_the_weights():
    points = np.arange(12.0)[:, None]
    with jax.enable_x64(True):
        kernel = f.squared_exponential(points, points, 0.7)
        u = f.prediction_dictionary(kernel, jnp.arange(12), 1e-10)
        w = np.random.default_rng(0).normal(size=(12, 5))
        np.testing.assert_allclose(u @ w, w, atol=1e-6)


def test_layer_equals_its_matrix_and_trains_only_the_stored_rows():
    g = np.random.default_rng(1)
    dictionaries = g.normal(size=(2, 6, 3)).astype(np.float32)
    layer = f.PredictedLinear.of(dictionaries, 8, rngs=nnx.Rngs(0))
    x = g.normal(size=(5, 6)).astype(np.float32)
    value = np.asarray(layer.value[...])
    matrix = np.concatenate([d @ v for d, v in zip(dictionaries, value)], axis=1)
    np.testing.assert_allclose(layer(x), x @ matrix, atol=1e-5)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert sorted(params) == ["bias", "value"]
    with pytest.raises(ValueError, match="7 outputs"):
        f.PredictedLinear.of(dictionaries, 7, rngs=nnx.Rngs(0))
