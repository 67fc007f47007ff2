"""CP: planted factors, solvers against each other, degeneracy, deflation identities."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from cnnjax import factorization as f
from cnnjax.factorization.cp_factors import mttkrp
from cnnjax.factorization.cp_nls import negative_gradient, normal_product


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def planted(shape, rank, seed):
    g = np.random.default_rng(seed)
    factors = [g.normal(size=(n, rank)) for n in shape]
    letters = "abcd"[: len(shape)]
    t = np.einsum(",".join(f"{c}r" for c in letters) + "->" + letters, *factors)
    return t, factors


def match_score(found, true):
    """Mean product of |cosines|, components paired by assignment."""
    scores = np.ones((found[0].shape[1], true[0].shape[1]))
    for a, b in zip(found, true):
        a = np.asarray(a) / np.linalg.norm(a, axis=0)
        b = b / np.linalg.norm(b, axis=0)
        scores *= np.abs(a.T @ b)
    rows, columns = scipy.optimize.linear_sum_assignment(-scores)
    return scores[rows, columns].mean()


def restarts(method, tensor, rank, count=4, **options):
    run = jax.vmap(functools.partial(method, tensor=tensor, rank=rank, **options))
    return f.best_of(run(jax.random.split(jax.random.key(0), count)))


@pytest.mark.method("cp_als")
@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((3, 3, 8, 10), 4),
        pytest.param((3, 3, 12, 16), 6, marks=pytest.mark.slow),
        pytest.param((5, 5, 16, 24), 8, marks=pytest.mark.slow),
    ],
)
def test_als_recovers_planted_factors(shape, rank):
    tensor, factors = planted(shape, rank, 0)
    found, info = restarts(f.cp_als, tensor, rank, sweeps=600, tolerance=1e-13, ridge=1e-13)
    assert info.relative_error < 1e-9
    assert match_score(found, factors) > 0.999


@pytest.mark.method("cp_nls")
@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((3, 3, 8, 10), 4),
        pytest.param((3, 3, 12, 16), 6, marks=pytest.mark.slow),
        pytest.param((5, 5, 16, 24), 8, marks=pytest.mark.slow),
    ],
)
def test_nls_recovers_planted_factors(shape, rank):
    tensor, factors = planted(shape, rank, 0)
    found, info = restarts(f.cp_nls, tensor, rank, steps=80)
    assert info.relative_error < 1e-9
    assert match_score(found, factors) > 0.999


@pytest.mark.method("cp_nls")
def test_nls_beats_als_from_the_same_starts():
    tensor, _ = planted((9, 8, 10), 4, 1)
    keys = jax.random.split(jax.random.key(1), 8)

    def errors(solver, **options):
        run = jax.vmap(lambda key: solver(key, tensor, 4, **options)[1].relative_error)
        return np.asarray(jax.jit(run)(keys))

    als = errors(f.cp_als, sweeps=1000, tolerance=1e-13, ridge=1e-13)
    nls = errors(f.cp_nls, steps=120)
    assert nls.max() < 1e-10
    assert als.max() > 0.05  # stalled after 1,000 sweeps
    assert np.median(als) < 1e-9  # though most draws converge


@pytest.mark.method("cp_als")
def test_als_error_is_non_increasing_and_continues_from_a_start():
    tensor = np.random.default_rng(0).normal(size=(5, 6, 7))
    errors, start = [], None
    for _ in range(12):
        start, info = f.cp_als(jax.random.key(0), tensor, 4, sweeps=1, start=start)
        errors.append(float(info.relative_error))
    assert all(b <= a + 1e-9 for a, b in zip(errors, errors[1:]))
    recount = np.linalg.norm(tensor - np.asarray(f.compose_cp(start))) / np.linalg.norm(tensor)
    np.testing.assert_allclose(errors[-1], recount, rtol=1e-9)
    # much damping: small steps, but steps
    _, info = f.cp_als(jax.random.key(0), tensor, 4, sweeps=3, ridge=0.5)
    assert info.iterations == 3
    assert info.relative_error < 1
    with pytest.raises(ValueError, match="ridge is -1"):
        f.cp_als(jax.random.key(0), tensor, 4, ridge=-1.0)


@pytest.mark.method("cp_als")
@pytest.mark.parametrize(
    ("shape", "rank", "rtol"),
    # the second: normal equations with a condition number beyond single precision
    [((3, 3, 24, 24), 16, 1e-5), ((1, 2, 64, 96), 48, 3e-4)],
)
def test_als_in_single_precision_takes_the_steps_of_the_textbook(shape, rank, rtol):
    # every unfolding times the Khatri-Rao product of the others, and the pseudo-inverse
    g = np.random.default_rng(0)
    falling = [1 / np.arange(1, n + 1) for n in shape[2:]]
    tensor = g.normal(size=shape) * falling[0][:, None] * falling[1]
    tensor = (tensor / np.linalg.norm(tensor)).astype(np.float32)
    start = [g.normal(size=(n, rank)).astype(np.float32) for n in shape]
    factors = [x.astype(np.float64) for x in start]
    for _ in range(25):
        for mode in range(4):
            others = [factors[m] for m in range(4) if m != mode]
            product = np.einsum("ar,br,cr->abcr", *others).reshape(-1, rank)
            unfolded = np.moveaxis(tensor, mode, 0).reshape(shape[mode], -1)
            factors[mode] = unfolded @ product @ np.linalg.pinv(product.T @ product)
    again = np.einsum("ar,br,cr,dr->abcd", *factors)
    found, info = f.cp_als(jax.random.key(0), tensor, rank, sweeps=25, tolerance=-1.0, start=start)
    assert info.relative_error.dtype == np.float32
    found = np.einsum("ar,br,cr,dr->abcd", *(np.asarray(x, np.float64) for x in found))
    np.testing.assert_allclose(
        np.linalg.norm(tensor - found), np.linalg.norm(tensor - again), rtol=rtol
    )


@pytest.mark.method("cp_als")
@pytest.mark.parametrize("shape", [(1, 1, 7, 5), (4, 1, 6, 1), (6, 9)])
def test_a_matrix_gets_its_truncated_svd(shape):
    tensors = np.random.default_rng(0).normal(size=(2, *shape))
    singular = np.linalg.svd(tensors[0].squeeze(), compute_uv=False)
    for rank in (1, 3, len(singular)):
        factors, info = f.cp_als(jax.random.key(0), tensors[0], rank)
        lost = np.linalg.norm(tensors[0] - np.asarray(f.compose_cp(factors)))
        np.testing.assert_allclose(lost, np.linalg.norm(singular[rank:]), atol=1e-10)
        np.testing.assert_allclose(
            info.relative_error, lost / np.linalg.norm(tensors[0]), atol=1e-10
        )
        both, _ = f.cp_als_together(jax.random.split(jax.random.key(0)), tensors, rank)
        for one, first in zip(factors, both, strict=True):
            np.testing.assert_allclose(first[0], one, atol=1e-10)


@pytest.mark.method("cp_nls")
def test_normal_product_and_gradient_equal_autodiff():
    tensor, _ = planted((3, 4, 5, 2), 3, 1)
    factors = [jnp.asarray(x) for x in planted((3, 4, 5, 2), 3, 2)[1]]

    def flat_compose(*factors):
        return f.compose_cp(factors).reshape(-1)

    jacobian = jax.jacfwd(flat_compose, argnums=range(4))(*factors)
    jacobian = np.concatenate([np.asarray(j).reshape(j.shape[0], -1) for j in jacobian], axis=1)
    direction = [jnp.asarray(x) for x in planted((3, 4, 5, 2), 3, 3)[1]]
    flat = np.concatenate([np.asarray(d).reshape(-1) for d in direction])
    ours = np.concatenate([np.asarray(b).reshape(-1) for b in normal_product(factors, direction)])
    np.testing.assert_allclose(ours, jacobian.T @ (jacobian @ flat), rtol=1e-9)
    residual = tensor.reshape(-1) - np.asarray(flat_compose(*factors))
    gradient = negative_gradient(jnp.asarray(tensor), factors)
    ours = np.concatenate([np.asarray(b).reshape(-1) for b in gradient])
    np.testing.assert_allclose(ours, jacobian.T @ residual, rtol=1e-9)


@pytest.mark.method("cp_nls")
def test_cg_and_dense_solvers_agree():
    tensor, _ = planted((4, 5, 6), 3, 4)
    _, dense = restarts(f.cp_nls, tensor, 3, count=2, solver="dense", steps=60)
    _, cg = restarts(f.cp_nls, tensor, 3, count=2, solver="cg", cg_steps=45, steps=60)
    assert dense.relative_error < 1e-9
    assert cg.relative_error < 1e-8
    with pytest.raises(ValueError, match="solver is 'lu'"):
        f.cp_nls(jax.random.key(0), tensor, 3, solver="lu")


@pytest.mark.method("cp_als")
def test_degeneracy_is_reported_on_a_border_rank_tensor():
    g = np.random.default_rng(0)
    a, b = np.linalg.qr(g.normal(size=(6, 2)))[0].T

    def outer(x, y, z):
        return np.einsum("i,j,k->ijk", x, y, z)

    tensor = outer(a, a, b) + outer(a, b, a) + outer(b, a, a)
    errors, degeneracies = [], []
    for sweeps in (30, 120, 500):
        _, info = f.cp_als(jax.random.key(1), tensor, 2, sweeps=sweeps, tolerance=0.0, ridge=1e-14)
        errors.append(float(info.relative_error))
        degeneracies.append(float(info.degeneracy))
    # the error falls without end while the components diverge and cancel
    assert errors[0] > errors[1] > errors[2] > 0
    assert degeneracies[0] < degeneracies[1] < degeneracies[2]
    assert degeneracies[2] > 1.5 * degeneracies[0]
    # the damped steps of Levenberg-Marquardt come nearer in a tenth of the passes, from any start
    keys = jax.random.split(jax.random.key(2), 4)

    def error(solver, **options):
        run = jax.jit(lambda key: solver(key, tensor, 2, **options)[1].relative_error)
        return np.array([float(run(key)) for key in keys])

    als = error(f.cp_als, sweeps=500, tolerance=0.0, ridge=1e-14)
    assert (error(f.cp_nls, steps=50) < als).all()
    # a ridge keeps the components finite, and the error hardly larger
    _, ridged = f.cp_als(jax.random.key(1), tensor, 2, sweeps=500, tolerance=0.0, ridge=1e-4)
    assert float(ridged.degeneracy) < degeneracies[2]
    assert float(ridged.relative_error) < 0.1


@pytest.mark.method("cp_tpm")
def test_deflation_identity_and_orthogonal_recovery():
    g = np.random.default_rng(0)
    u, v, w = (np.linalg.qr(g.normal(size=(n, 4)))[0] for n in (9, 6, 7))
    weights = np.array([4.0, 3.0, 2.0, 1.0])
    tensor = np.einsum("r,ar,br,cr->abc", weights, u, v, w)
    factors, info = f.cp_tpm(jax.random.key(0), tensor, 4, tolerance=1e-14, iterations=1000)
    assert info.relative_error < 1e-12
    norms = np.prod([np.linalg.norm(x, axis=0) for x in factors], axis=0)
    np.testing.assert_allclose(norms, weights, rtol=1e-9)
    noise = g.normal(size=(9, 6, 7))
    factors, _ = f.cp_tpm(jax.random.key(1), noise, 5, tolerance=1e-12, iterations=1000)
    residual, previous = noise, np.sum(noise**2)
    for r in range(5):
        term = np.einsum("a,b,c->abc", *(np.asarray(x)[:, r] for x in factors))
        residual = residual - term
        np.testing.assert_allclose(np.sum(residual**2), previous - np.sum(term**2), rtol=1e-9)
        previous = np.sum(residual**2)


@pytest.mark.method("cp_tpm")
def test_greedy_is_not_better_than_als_but_close():
    noise = np.random.default_rng(0).normal(size=(9, 6, 8))
    _, greedy = f.cp_tpm(jax.random.key(0), noise, 5)
    _, als = restarts(f.cp_als, noise, 5, count=2, sweeps=100)
    assert als.relative_error <= greedy.relative_error < als.relative_error + 0.1


@pytest.mark.method("cp_als")
@pytest.mark.parametrize("mode", range(4))
def test_mttkrp_is_the_unfolding_times_khatri_rao(mode):
    tensor, factors = planted((3, 4, 5, 2), 3, 5)
    others = [factors[m] for m in range(4) if m != mode]
    khatri_rao = others[0]
    for other in others[1:]:
        khatri_rao = np.einsum("ar,br->abr", khatri_rao, other).reshape(-1, 3)
    unfolded = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
    got = mttkrp(jnp.asarray(tensor), [jnp.asarray(x) for x in factors], mode)
    np.testing.assert_allclose(got, unfolded @ khatri_rao, rtol=1e-9)


@pytest.mark.method("cp_als")
def test_bad_rank():
    with pytest.raises(ValueError, match="cp_als rank is 0; expected 1 to 12"):
        f.cp_als(jax.random.key(0), np.ones((3, 4, 5)), 0)
    with pytest.raises(ValueError, match="cp_tpm rank is 13; expected 1 to 12"):
        f.cp_tpm(jax.random.key(0), np.ones((3, 4, 5)), 13)


@pytest.mark.method("cp_als")
def test_tensors_side_by_side_are_fitted_as_alone():
    tensors = np.random.default_rng(0).standard_normal((3, 3, 4, 5)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 3)
    factors, info = f.cp_als_together(keys, tensors, 3, sweeps=6, tolerance=-1.0)
    assert [x.shape for x in factors] == [(3, 3, 3), (3, 4, 3), (3, 5, 3)]
    for i, tensor in enumerate(tensors):
        alone, fit = f.cp_als(keys[i], tensor, 3, sweeps=6, tolerance=-1.0)
        np.testing.assert_allclose(info.relative_error[i], fit.relative_error, rtol=1e-4)
        again = np.einsum("ar,br,cr->abc", *(np.asarray(x[i]) for x in factors))
        expected = np.einsum("ar,br,cr->abc", *(np.asarray(x) for x in alone))
        np.testing.assert_allclose(again, expected, atol=2e-3)
        error = np.linalg.norm(tensor - again) / np.linalg.norm(tensor)
        np.testing.assert_allclose(info.relative_error[i], error, rtol=1e-4)
