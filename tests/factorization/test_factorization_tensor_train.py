"""Tensor trains: exact at full rank, error bounded by the discarded singular values."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from cnnjax import factorization as f


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_full_rank_is_exact_and_truncation_is_bounded():
    t = np.random.default_rng(0).normal(size=(4, 5, 6, 3))
    np.testing.assert_allclose(f.compose_tensor_train(f.tensor_train(t, (4, 18, 3))), t, atol=1e-12)
    ranks = (3, 8, 2)
    error = np.linalg.norm(t - np.asarray(f.compose_tensor_train(f.tensor_train(t, ranks))))
    tails = [
        np.sum(np.linalg.svd(t.reshape(int(np.prod(t.shape[:k])), -1), compute_uv=False)[r:] ** 2)
        for k, r in zip((1, 2, 3), ranks)
    ]
    assert np.sqrt(max(tails)) - 1e-12 <= error <= np.sqrt(sum(tails)) + 1e-12


def test_convolution_kernel_round_trip():
    kernel = np.random.default_rng(1).normal(size=(3, 3, 6, 8))
    cores = f.tt_conv_cores(kernel, (2, 3), (4, 2), (6, 6))
    assert [c.shape for c in cores] == [(1, 9, 6), (6, 8, 6), (6, 6, 1)]
    full = f.tt_conv_cores(kernel, (2, 3), (4, 2), (9, 6))
    np.testing.assert_allclose(f.compose_tt_conv(full, (3, 3), (2, 3), (4, 2)), kernel, atol=1e-12)


def test_bad_ranks_and_factors():
    with pytest.raises(ValueError, match="bond 0 rank is 5; expected 1 to 4"):
        f.tensor_train(np.ones((4, 5, 6)), (5, 2))
    with pytest.raises(ValueError, match="2 ranks for 4 modes"):
        f.tensor_train(np.ones((2, 2, 2, 2)), (1, 1))
    with pytest.raises(ValueError, match="do not multiply"):
        f.tt_conv_cores(np.ones((3, 3, 6, 8)), (2, 2), (4, 2), (2, 2))
