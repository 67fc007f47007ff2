"""Feature losses against loops in float64, their invariances, and gradients where maps vanish."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import distillation as d


def maps(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.method("hint_training")
def test_hint_value_gradient_and_shape_error():
    s, t = maps(0, 3, 4, 4, 5), maps(1, 3, 4, 4, 5)
    expected = 0.5 * np.sum((np.asarray(s, np.float64) - np.asarray(t)) ** 2) / 3
    np.testing.assert_allclose(d.hint(s, t), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(d.hint)(s, t), (s - t) / 3, atol=1e-6)
    assert (jax.grad(d.hint, argnums=1)(s, t) == 0).all()
    assert d.hint(t, t) == 0


@pytest.mark.method("hint_training")
@pytest.mark.usefixtures("as_user")
def test_hint_names_the_regressor():
    with pytest.raises(ValueError, match="HintRegressor"):
        d.hint(maps(0, 3, 4, 4, 5), maps(1, 3, 4, 4, 6))
    with pytest.raises(ValueError, match="earlier student layer"):
        d.HintRegressor((4, 4, 3), (6, 6, 3), rngs=nnx.Rngs(0))


@pytest.mark.method("hint_training")
def test_regressor_shapes_and_identity():
    regressor = d.HintRegressor((8, 6, 3), (5, 6, 7), rngs=nnx.Rngs(0))
    assert regressor(maps(0, 2, 8, 6, 3)).shape == (2, 5, 6, 7)
    identity = d.HintRegressor((4, 4, 3), (4, 4, 3), rngs=nnx.Rngs(0))
    identity.conv.kernel.set_value(jnp.eye(3)[None, None])
    features = jnp.abs(maps(2, 2, 4, 4, 3))
    np.testing.assert_allclose(d.hint(identity(features), features), 0, atol=1e-10)


@pytest.mark.method("attention_transfer_activation")
@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_attention_map_is_the_loop(p, reduce):
    f = np.asarray(maps(0, 2, 3, 4, 5), np.float64)
    expected = np.zeros((2, 12))
    for n in range(2):
        for i in range(3):
            for j in range(4):
                powers = np.abs(f[n, i, j]) ** p
                expected[n, i * 4 + j] = powers.sum() if reduce == "sum" else powers.max()
    got = d.attention_map(f.astype(np.float32), p=p, reduce=reduce)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.method("attention_transfer_activation")
@pytest.mark.parametrize("form", ["code", "paper"])
def test_attention_transfer_value(form):
    s, t = maps(0, 2, 4, 4, 5), maps(1, 2, 4, 4, 3)

    def unit(f):
        q = (np.asarray(f, np.float64) ** 2).sum(-1).reshape(2, -1)
        return q / np.linalg.norm(q, axis=1, keepdims=True)

    difference = unit(s) - unit(t)
    value = (
        np.mean(difference**2) if form == "code" else np.mean(np.linalg.norm(difference, axis=1))
    )
    got = d.attention_transfer([(s, t), (s, s)], beta=10.0, form=form)
    np.testing.assert_allclose(got, 5 * value, rtol=1e-4)


@pytest.mark.method("attention_transfer_activation")
def test_attention_transfer_invariances():
    s = maps(0, 2, 4, 4, 6)
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0].astype(np.float32)
    mixed = jnp.einsum("nhwc,cd->nhwd", s, rotation, precision="highest")
    np.testing.assert_allclose(d.attention_transfer([(s, s)]), 0, atol=1e-10)
    np.testing.assert_allclose(d.attention_transfer([(s, 7 * mixed)], beta=1.0), 0, atol=1e-10)


@pytest.mark.method("attention_transfer_activation")
@pytest.mark.parametrize("form", ["code", "paper"])
def test_attention_transfer_gradient_is_finite_at_zero(form):
    def loss(s, t):
        return d.attention_transfer([(s, t)], form=form)

    zero, t = jnp.zeros((2, 4, 4, 3)), maps(1, 2, 4, 4, 3)
    assert np.isfinite(jax.grad(loss)(zero, t)).all()
    assert np.isfinite(jax.grad(loss)(t, t)).all()
    assert (jax.grad(loss, argnums=1)(t + 1, t) == 0).all()


@pytest.mark.method("attention_transfer_activation")
def test_attention_transfer_pools_the_larger_map():
    t = maps(1, 2, 4, 4, 3)
    s = jnp.repeat(jnp.repeat(t, 2, axis=1), 2, axis=2)
    np.testing.assert_allclose(d.attention_transfer([(s, t)], beta=1.0), 0, atol=1e-12)
    with pytest.raises(ValueError, match="multiple of the other"):
        d.attention_transfer([(maps(0, 2, 3, 3, 3), t)])
    with pytest.raises(ValueError, match="at least one"):
        d.attention_transfer([])


@pytest.mark.method("fsp_matrix")
def test_fsp_matrix_is_the_double_loop():
    a, b = maps(0, 2, 3, 4, 5), maps(1, 2, 3, 4, 6)
    expected = np.zeros((2, 5, 6))
    for n in range(2):
        for i in range(5):
            for j in range(6):
                expected[n, i, j] = (
                    np.sum(np.float64(a[n, :, :, i]) * np.float64(b[n, :, :, j])) / 12
                )
    got = d.fsp_matrix(a, b)
    assert got.shape == (2, 5, 6)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.method("fsp_matrix")
def test_fsp_invariances_and_pooling():
    a, b = maps(0, 2, 4, 4, 5), maps(1, 2, 4, 4, 6)
    order = np.random.default_rng(0).permutation(16)

    def permute(x):
        return x.reshape(2, 16, -1)[:, order].reshape(x.shape)

    same = d.fsp_matrix(permute(a), permute(b))
    np.testing.assert_allclose(same, d.fsp_matrix(a, b), atol=1e-6)
    assert np.abs(d.fsp_matrix(permute(a), b) - d.fsp_matrix(a, b)).max() > 0.01
    channels = jnp.array([4, 2, 0, 1, 3])
    np.testing.assert_allclose(
        d.fsp_matrix(a[..., channels], b), d.fsp_matrix(a, b)[:, channels], atol=1e-6
    )
    large = jnp.repeat(jnp.repeat(a, 2, axis=1), 2, axis=2)
    np.testing.assert_allclose(d.fsp_matrix(large, b), d.fsp_matrix(a, b), atol=1e-6)


@pytest.mark.method("fsp_matrix")
def test_fsp_loss():
    a, b, c = maps(0, 2, 4, 4, 5), maps(1, 2, 4, 4, 6), maps(2, 2, 4, 4, 6)
    assert d.fsp([(a, b)], [(a, b)]) == 0
    gs, gt = np.float64(d.fsp_matrix(a, b)), np.float64(d.fsp_matrix(a, c))
    expected = 3.0 * np.sum((gs - gt) ** 2) / 2
    got = d.fsp([(a, b), (a, a)], [(a, c), (a, a)], weights=[3.0, 1.0])
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="1x1 adapters"):
        d.fsp([(a, b)], [(a, a)])
    with pytest.raises(ValueError, match="sections"):
        d.fsp([(a, b)], [])


@pytest.mark.method("saliency_distillation")
def test_saliency_is_cross_entropy_over_positions():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 4, 5))
    teacher = rng.dirichlet(np.ones(20), 3).reshape(3, 4, 5)
    fixed = rng.dirichlet(np.ones(20), 3).reshape(3, 4, 5)
    log_q = scores - np.log(np.exp(scores).sum((1, 2), keepdims=True))
    expected = np.mean(-np.sum((0.9 * teacher + 0.1 * fixed) * log_q, axis=(1, 2)))
    got = d.saliency(*(np.float32(x) for x in (scores, teacher, fixed)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    q = np.exp(log_q)
    entropy = np.mean(-np.sum(q * log_q, axis=(1, 2)))
    same = d.saliency(*(np.float32(x) for x in (scores, q, fixed)), soft_weight=1.0)
    np.testing.assert_allclose(same, entropy, rtol=1e-5)


def test_hierarchical_context_levels():
    s, t = maps(0, 2, 8, 8, 3), maps(1, 2, 8, 8, 3)
    difference = np.asarray(s - t, np.float64)
    expected, weight, total = np.mean(difference**2), 1.0, 1.0
    for level in (4, 2, 1):
        weight, k = weight / 2, 8 // level
        pooled = difference.reshape(2, level, k, level, k, 3).mean((2, 4))
        expected += weight * np.mean(pooled**2)
        total += weight
    np.testing.assert_allclose(d.hierarchical_context([s], [t]), expected / total, rtol=1e-5)
    assert d.hierarchical_context([t], [t]) == 0
