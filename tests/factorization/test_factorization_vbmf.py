"""EVBMF: planted ranks over sizes, exact thresholds, invariances, planted Tucker-2 kernels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cnnjax import factorization as f
from cnnjax.factorization.vbmf import threshold_tau

pytestmark = pytest.mark.method("evbmf_rank")

SIZES = [(16, 16), (16, 144), (32, 288), (64, 64), (64, 576), (128, 128), (96, 256), (144, 16)]


def planted(shape, rank, snr, noise, rng):
    """Noise plus ``rank`` components with singular values at ``snr`` x the EVBMF threshold."""
    rows, columns = min(shape), max(shape)
    alpha = rows / columns
    tau = threshold_tau(alpha)
    threshold = noise * math.sqrt(columns * (1 + tau) * (1 + alpha / tau))
    u = np.linalg.qr(rng.normal(size=(shape[0], max(rank, 1))))[0][:, :rank]
    v = np.linalg.qr(rng.normal(size=(shape[1], max(rank, 1))))[0][:, :rank]
    s = snr * threshold * np.linspace(1.0, 1.5, rank) if rank else np.zeros(0)
    return (u * s) @ v.T + noise * rng.normal(size=shape)


def test_threshold_constants():
    expected = {0.01: 2.829, 0.1: 2.600, 0.25: 2.545, 0.5: 2.521, 1.0: 2.5129}
    for alpha, value in expected.items():
        np.testing.assert_allclose(threshold_tau(alpha) / math.sqrt(alpha), value, atol=6e-4)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_planted_ranks(shape):
    rng = np.random.default_rng(sum(shape))
    for rank in (0, 2, 4, 8):
        if rank > min(shape) // 4:
            continue
        draws = 20 if max(shape) < 300 else 8
        right, sigmas = 0, []
        for _ in range(draws):
            found = f.evbmf_rank(planted(shape, rank, 2.0, 0.3, rng))
            right += found.rank == rank
            sigmas.append(found.sigma2)
        assert right >= draws * 18 // 20, rank
        np.testing.assert_allclose(np.mean(sigmas), 0.09, rtol=0.2)


def test_scaling_and_transposition():
    y = planted((32, 60), 5, 2.5, 0.3, np.random.default_rng(0))
    base = f.evbmf_rank(y)
    assert base.rank == 5
    for other in (f.evbmf_rank(10 * y), f.evbmf_rank(y.T)):
        assert other.rank == base.rank
    np.testing.assert_allclose(f.evbmf_rank(10 * y).sigma2, 100 * base.sigma2, rtol=1e-4)
    assert f.evbmf_rank(y, search="global").rank == 5
    assert f.evbmf_rank(y, sigma2=0.09).rank == 5
    assert len(base.shrunk) == 5
    assert (base.shrunk < np.linalg.svd(y, compute_uv=False)[:5]).all()


@pytest.mark.parametrize(
    ("k", "i", "o", "r3", "r4"),
    [(3, 32, 64, 4, 8), (3, 64, 64, 10, 6), (5, 16, 32, 3, 5), (3, 128, 128, 12, 20)],
)
def test_planted_tucker_kernels(k, i, o, r3, r4):
    rng = np.random.default_rng(k * i)
    core = rng.normal(size=(k, k, r3, r4))
    kernel = np.einsum("abpq,ip,oq->abio", core, rng.normal(size=(i, r3)), rng.normal(size=(o, r4)))
    noisy = kernel + 0.2 * rng.normal(size=kernel.shape)
    assert f.tucker2_ranks(noisy) == (r3, r4)
    full = f.tucker2_ranks(noisy, weaken=1.0)
    assert full == (i, o)
    floored = f.tucker2_ranks(noisy, floor=0.5)
    assert floored == (i // 2, o // 2)


def test_trained_kernels_reproduce_known_ranks(real_data):
    weights = np.load(real_data / "weights" / "cifar10_resnet20.npz")
    expected = {
        "layer2.0.conv1": (8, 4),
        "layer2.2.conv1": (7, 4),
        "layer3.0.conv1": (8, 10),
        "layer3.0.conv2": (13, 4),
        "layer3.2.conv2": (21, 26),
    }
    keys = {k.removeprefix("module."): k for k in weights.files}
    for name, ranks in expected.items():
        kernel = weights[keys[f"{name}.weight"]].transpose(2, 3, 1, 0)
        for search in ("brent", "global"):
            assert f.tucker2_ranks(kernel, search=search) == ranks, (name, search)


def test_zero_matrix_and_bad_arguments():
    assert f.evbmf_rank(np.zeros((4, 6))).rank == 0
    with pytest.raises(ValueError, match="search is 'newton'"):
        f.evbmf_rank(np.ones((4, 6)), search="newton")
    with pytest.raises(ValueError, match="non-finite"):
        f.evbmf_rank(np.full((4, 6), np.nan))
    with pytest.raises(ValueError, match="sigma2 is -1"):
        f.evbmf_rank(np.ones((4, 6)), sigma2=-1.0)
    with pytest.raises(ValueError, match="floor is 2"):
        f.tucker2_ranks(np.ones((3, 3, 4, 4)), floor=2.0)
