"""Tucker: exactness, HOSVD bounds, monotone sweeps, planted ranks."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.linalg

from cnnjax import factorization as f


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def unfold(t, n):
    return np.moveaxis(t, n, 0).reshape(t.shape[n], -1)


def planted(shape, ranks, seed):
    g = np.random.default_rng(seed)
    t = g.normal(size=ranks)
    for mode, (n, r) in enumerate(zip(shape, ranks)):
        t = np.moveaxis(np.tensordot(t, g.normal(size=(n, r)), axes=([mode], [1])), -1, mode)
    return t


@pytest.mark.method("tucker_hooi")
def test_full_and_planted_ranks_are_exact():
    t = np.random.default_rng(0).normal(size=(4, 5, 6))
    core, factors = f.tucker_hooi(t, (4, 5, 6))
    np.testing.assert_allclose(f.compose_tucker(core, factors), t, atol=1e-10)
    low = planted((6, 7, 8, 5), (2, 3, 2, 4), 1)
    core, factors = f.tucker_hooi(low, (2, 3, 2, 4))
    np.testing.assert_allclose(f.compose_tucker(core, factors), low, atol=1e-9)


@pytest.mark.method("tucker_hooi")
def test_hosvd_bounds_and_monotone_sweeps():
    t = np.random.default_rng(1).normal(size=(6, 7, 8))
    ranks = (3, 4, 2)
    tails = [np.sum(scipy.linalg.svdvals(unfold(t, m))[r:] ** 2) for m, r in enumerate(ranks)]
    errors = []
    for sweeps in (0, 1, 2, 5, 50):
        core, factors = f.tucker_hooi(t, ranks, sweeps=sweeps)
        for factor in factors:
            np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-12)
        error = np.linalg.norm(t - np.asarray(f.compose_tucker(core, factors)))
        shortcut = np.sqrt(np.sum(t**2) - np.sum(np.asarray(core) ** 2))
        np.testing.assert_allclose(error, shortcut, rtol=1e-9)
        errors.append(error)
    assert np.sqrt(max(tails)) <= errors[0] <= np.sqrt(sum(tails))
    assert all(b <= a + 1e-10 for a, b in zip(errors, errors[1:]))


@pytest.mark.method("tucker2")
def test_tucker2_orthonormal_error_and_sweeps():
    kernel = np.random.default_rng(2).normal(size=(3, 3, 8, 10))
    errors = []
    for sweeps in (0, 1, 3, 20):
        t = f.tucker2(kernel, 4, 5, sweeps=sweeps)
        np.testing.assert_allclose(t.first.T @ t.first, np.eye(4), atol=1e-12)
        np.testing.assert_allclose(t.last.T @ t.last, np.eye(5), atol=1e-12)
        error = np.linalg.norm(kernel - np.asarray(f.compose_tucker2(t)))
        np.testing.assert_allclose(
            error, np.sqrt(np.sum(kernel**2) - np.sum(np.asarray(t.core) ** 2)), rtol=1e-9
        )
        errors.append(error)
    assert all(b <= a + 1e-10 for a, b in zip(errors, errors[1:]))


@pytest.mark.method("tucker2")
def test_tucker2_agrees_with_general_hooi():
    kernel = np.random.default_rng(3).normal(size=(3, 3, 8, 10))
    ours = f.compose_tucker2(f.tucker2(kernel, 4, 5, sweeps=200))
    core, factors = f.tucker_hooi(kernel, (3, 3, 4, 5), sweeps=200, tolerance=1e-14)
    np.testing.assert_allclose(ours, f.compose_tucker(core, factors), atol=1e-5)


@pytest.mark.method("tucker2")
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((1, 1, 7, 12), (3, 5)),
        ((1, 1, 12, 7), (4, 2)),
        ((1, 1, 4, 9), (4, 6)),
        ((1, 1, 9, 9), (9, 9)),
    ],
)
def test_tucker2_of_a_matrix_is_its_truncated_svd(shape, ranks):
    kernel = np.random.default_rng(3).normal(size=shape)
    t = f.tucker2(kernel, *ranks)
    for factor, rank in ((t.first, ranks[0]), (t.last, ranks[1])):
        np.testing.assert_allclose(factor.T @ factor, np.eye(rank), atol=1e-12)
    u, s, vt = np.linalg.svd(kernel[0, 0], full_matrices=False)
    r = min(ranks)
    np.testing.assert_allclose(
        np.asarray(f.compose_tucker2(t))[0, 0], (u[:, :r] * s[:r]) @ vt[:r], atol=1e-10
    )


@pytest.mark.method("tucker2")
def test_tucker2_of_more_outputs_than_there_are_taps_and_inputs():
    # past the rank of the unfolding a factor is any orthonormal completion
    kernel = np.random.default_rng(4).normal(size=(2, 2, 3, 24))
    t = f.tucker2(kernel, 2, 16)
    np.testing.assert_allclose(t.last.T @ t.last, np.eye(16), atol=1e-12)
    lost = np.linalg.norm(kernel - np.asarray(f.compose_tucker2(t)))
    singular = np.linalg.svd(unfold(kernel, 2), compute_uv=False)
    np.testing.assert_allclose(lost, singular[2], rtol=1e-10)


@pytest.mark.method("tucker_hooi")
def test_bad_ranks():
    t = np.ones((3, 4, 5))
    with pytest.raises(ValueError, match="2 ranks for a tensor of 3 modes"):
        f.tucker_hooi(t, (2, 2))
    with pytest.raises(ValueError, match="mode 1 rank is 5; expected 1 to 4"):
        f.tucker_hooi(t, (2, 5, 2))
