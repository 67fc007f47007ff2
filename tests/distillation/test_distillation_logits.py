"""Output losses against NumPy closed forms in float64, and their limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from cnnjax import distillation as d


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, (16, 10)).astype(np.float32)
    v = rng.normal(0, 3, (16, 10)).astype(np.float32)
    y = rng.integers(0, 10, 16)
    return jnp.asarray(z), jnp.asarray(v), jnp.asarray(y)


def numpy_kl(z, v, t):
    z, v = np.asarray(z, np.float64), np.asarray(v, np.float64)
    p = softmax(v / t, -1)
    return t**2 * np.mean(np.sum(p * (log_softmax(v / t, -1) - log_softmax(z / t, -1)), -1))


def numpy_ce(z, y):
    z = np.asarray(z, np.float64)
    return -np.mean(log_softmax(z, -1)[np.arange(len(y)), np.asarray(y)])


@pytest.mark.method("kd_soft_targets")
@pytest.mark.parametrize("t", [1.0, 4.0, 20.0])
def test_kd_value_and_gradient_equal_the_closed_form(logits, t):
    z, v, y = logits
    alpha = 0.7
    expected = alpha * numpy_kl(z, v, t) + (1 - alpha) * numpy_ce(z, y)
    np.testing.assert_allclose(d.kd(z, v, y, temperature=t, alpha=alpha), expected, rtol=1e-5)
    gradient = jax.grad(lambda z: d.kd(z, v, temperature=t, alpha=1.0))(z)
    closed = t * (softmax(np.asarray(z) / t, -1) - softmax(np.asarray(v) / t, -1)) / len(z)
    np.testing.assert_allclose(gradient, closed, atol=1e-6)


@pytest.mark.method("kd_soft_targets")
def test_kd_special_cases(logits):
    z, v, y = logits
    np.testing.assert_allclose(d.kd(z, z, alpha=1.0), 0, atol=1e-7)
    same = jax.grad(lambda x: d.kd(x, z, alpha=1.0))(z)
    np.testing.assert_allclose(same, 0, atol=1e-7)
    np.testing.assert_allclose(d.kd(z, v, y, alpha=0.0), numpy_ce(z, y), rtol=1e-6)
    one_hot = jnp.where(jax.nn.one_hot(y, 10) > 0, 50.0, 0.0)
    np.testing.assert_allclose(
        d.kd(z, one_hot, temperature=1.0, alpha=1.0), numpy_ce(z, y), rtol=1e-5
    )
    huge = jnp.array([[1e4, -1e4, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: d.kd(x, -huge, alpha=1.0))(huge)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (jax.grad(lambda v: d.kd(z, v, y))(v) == 0).all()


@pytest.mark.method("kd_soft_targets")
def test_high_temperature_tends_to_logit_matching_as_one_over_t():
    rng = np.random.default_rng(1)
    z, v = rng.normal(0, 3, (2, 256, 10))
    z, v = z - z.mean(-1, keepdims=True), v - v.mean(-1, keepdims=True)
    limit = (z - v) / 10 / len(z)

    def gap(t):
        # float64: at T = 1e4 float32 differences of probabilities have no digits left
        with jax.enable_x64(True):
            g = jax.grad(
                lambda x: (
                    t**2
                    * jnp.mean(
                        jnp.sum(
                            jax.nn.softmax(v / t)
                            * (jax.nn.log_softmax(v / t) - jax.nn.log_softmax(x / t)),
                            -1,
                        )
                    )
                )
            )(jnp.asarray(z))
            g = np.asarray(g)
        return np.linalg.norm(g - limit) / np.linalg.norm(limit)

    gaps = [gap(t) for t in (10.0, 100.0, 1e3, 1e4)]
    np.testing.assert_allclose(gaps, [0.22, 0.021, 0.0021, 0.00021], rtol=0.2)
    # and the library's own float32 gradient at T = 100 is within that gap
    ours = jax.grad(lambda x: d.soft_targets(x, jnp.asarray(v, jnp.float32), 100.0))(
        jnp.asarray(z, jnp.float32)
    )
    assert np.linalg.norm(ours - limit) / np.linalg.norm(limit) < 0.03


@pytest.mark.method("kd_soft_targets")
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_bad_temperature(logits, bad):
    z, v, y = logits
    with pytest.raises(ValueError, match=f"temperature is {bad}"):
        d.kd(z, v, y, temperature=bad)


@pytest.mark.method("kd_soft_targets")
@pytest.mark.usefixtures("as_user")
def test_bad_arguments(logits):
    z, v, y = logits
    with pytest.raises(ValueError, match="same classes"):
        d.kd(z, v[:, :9], y)
    with pytest.raises(ValueError, match="alpha is 1.5"):
        d.kd(z, v, y, alpha=1.5)
    with pytest.raises(ValueError, match="no labels"):
        d.kd(z, v, alpha=0.5)


@pytest.mark.method("teacher_student_pipeline")
def test_masked_labels_have_no_influence(logits):
    z, v, y = logits
    mask = jnp.zeros(16)
    permuted = y[::-1]
    grad = jax.grad(d.kd)
    a = grad(z, v, y, mask=mask)
    b = grad(z, v, permuted, mask=mask)
    assert (a == b).all()
    garbage = jnp.full_like(y, 10**6)  # a label that would index out of range
    assert (grad(z, v, garbage, mask=mask) == a).all()
    half = jnp.arange(16) < 8
    np.testing.assert_allclose(d.cross_entropy(z, y, half), numpy_ce(z[:8], y[:8]), rtol=1e-6)


@pytest.mark.method("logit_regression")
def test_logit_regression(logits):
    z, v, _ = logits
    zz, vv = np.asarray(z, np.float64), np.asarray(v, np.float64)
    np.testing.assert_allclose(d.logit_regression(z, v), np.sum((zz - vv) ** 2) / 32, rtol=1e-5)
    assert d.logit_regression(z, z) == 0
    gradient = jax.grad(d.logit_regression)(z, v)
    np.testing.assert_allclose(gradient, (zz - vv) / 16, atol=1e-6)
    shifted = z + jnp.arange(16.0)[:, None]
    np.testing.assert_allclose(
        d.logit_regression(shifted, v, center=True),
        d.logit_regression(z, v, center=True),
        rtol=1e-4,
    )
    scale = vv.std(0).astype(np.float32)
    np.testing.assert_allclose(
        d.logit_regression(z, v, scale=scale), np.sum(((zz - vv) / scale) ** 2) / 32, rtol=1e-5
    )


@pytest.mark.method("logit_regression")
def test_logit_regression_is_the_high_temperature_limit_of_kd(logits):
    z, v, _ = logits
    z, v = z / 3, v / 3
    # T^2 KL -> ||centred difference||^2 / (2 C)
    limit = d.logit_regression(z, v, center=True) / 10
    np.testing.assert_allclose(d.soft_targets(z, v, 50.0), limit, rtol=0.03)


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_dkd_equals_numpy_and_reduces_to_kd(logits, t):
    z, v, y = (np.asarray(a, np.float64) for a in logits)
    y = y.astype(int)
    tckd, nckd, pt = [], [], []
    for zi, vi, yi in zip(z / t, v / t, y):
        p, q = softmax(vi), softmax(zi)
        b = np.array([p[yi], 1 - p[yi]])
        c = np.array([q[yi], 1 - q[yi]])
        rest = np.arange(10) != yi
        ph, qh = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        tckd.append(np.sum(b * np.log(b / c)))
        nckd.append(np.sum(ph * np.log(ph / qh)))
        pt.append(p[yi])
    tckd, nckd, pt = map(np.array, (tckd, nckd, pt))
    ours = d.dkd(*logits, temperature=t, alpha=1.0, beta=8.0)
    np.testing.assert_allclose(ours, t**2 * np.mean(tckd + 8 * nckd), rtol=1e-4)
    np.testing.assert_allclose(
        t**2 * np.mean(tckd + (1 - pt) * nckd), d.soft_targets(*logits[:2], t), rtol=1e-4
    )
    gradient = jax.grad(d.dkd)(*logits)
    assert np.isfinite(gradient).all()


def test_dkd_needs_three_classes():
    two = jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="at least 3"):
        d.dkd(two, two, jnp.zeros(4, int))


@pytest.mark.method("teacher_ensemble")
def test_ensembles(logits):
    z, v, y = logits
    rng = np.random.default_rng(2)
    members = [z, v, jnp.asarray(rng.normal(0, 3, (16, 10)), jnp.float32)]
    for mode in ("geometric", "arithmetic"):
        single = d.ensemble_logits([z], mode=mode, temperature=3.0)
        repeated = d.ensemble_logits([z, z, z], mode=mode, temperature=3.0)
        for got in (single, repeated):
            np.testing.assert_allclose(jax.nn.softmax(got / 3), jax.nn.softmax(z / 3), atol=1e-6)
    stacked = np.stack(members).astype(np.float64)
    np.testing.assert_allclose(d.ensemble_logits(members), stacked.mean(0), atol=1e-5)
    mean = softmax(stacked / 3, -1).mean(0)
    got = softmax(
        np.asarray(d.ensemble_logits(members, mode="arithmetic", temperature=3.0)) / 3, -1
    )
    np.testing.assert_allclose(got, mean, atol=1e-6)
    # Jensen: the arithmetic mean's cross-entropy is at most the members' mean
    combined = d.ensemble_logits(members, mode="arithmetic")
    assert d.cross_entropy(combined, y) <= np.mean([d.cross_entropy(m, y) for m in members])
    weighted = d.ensemble_logits(members, weights=[2.0, 0.0, 0.0])
    np.testing.assert_allclose(weighted, z, atol=1e-6)


@pytest.mark.method("teacher_ensemble")
@pytest.mark.usefixtures("as_user")
def test_ensemble_errors(logits):
    z, v, _ = logits
    with pytest.raises(ValueError, match="at least one"):
        d.ensemble_logits([])
    with pytest.raises(ValueError, match="different shapes"):
        d.ensemble_logits([z, v[:, :5]])
    with pytest.raises(ValueError, match="non-negative"):
        d.ensemble_logits([z, v], weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="mode is 'median'"):
        d.ensemble_logits([z, v], mode="median")


@pytest.mark.usefixtures("as_user")
def test_contrastive_is_a_symmetric_infonce():
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 8, 5)).astype(np.float32)
    sn = s / np.linalg.norm(s, axis=1, keepdims=True)
    tn = t / np.linalg.norm(t, axis=1, keepdims=True)
    scores = (sn @ tn.T).astype(np.float64) / 0.2
    rows = logsumexp(scores, 1) - np.diag(scores)
    columns = logsumexp(scores, 0) - np.diag(scores)
    got = d.contrastive(jnp.asarray(s), jnp.asarray(t), temperature=0.2)
    np.testing.assert_allclose(got, 0.5 * np.mean(rows + columns), rtol=1e-5)
    with pytest.raises(ValueError, match="project both"):
        d.contrastive(jnp.asarray(s), jnp.asarray(t[:, :4]))
