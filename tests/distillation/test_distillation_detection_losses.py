"""Detection losses: their reductions to simpler losses, the bound, and empty batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from cnnjax import distillation as d

pytestmark = pytest.mark.method("detection_distillation")


@pytest.fixture(scope="module")
def boxes():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8, 4)).astype(np.float32)
    v = rng.normal(size=(8, 4)).astype(np.float32)
    y = rng.integers(0, 4, 8)
    return z, v, y


def test_weighted_soft_cross_entropy(boxes):
    z, v, y = boxes
    p = softmax(v, -1)
    w = np.array([1.5, 1, 1, 1], np.float32)
    expected = np.mean(-np.sum(w * p * log_softmax(z, -1), -1))
    np.testing.assert_allclose(d.weighted_soft_cross_entropy(z, p, w), expected, rtol=1e-5)
    plain = np.mean(-np.sum(p * log_softmax(z, -1), -1))
    got = d.detection_classification(z, v, y, mu=0.0, background_weight=1.0)
    np.testing.assert_allclose(got, plain, rtol=1e-5)
    one_hot = np.eye(4, dtype=np.float32)[y]
    weighted = np.mean(w[y] * -log_softmax(z, -1)[np.arange(8), y])
    np.testing.assert_allclose(d.weighted_soft_cross_entropy(z, one_hot, w), weighted, rtol=1e-5)
    mixed = 0.3 * np.mean(-log_softmax(z, -1)[np.arange(8), y]) + 0.7 * expected
    np.testing.assert_allclose(d.detection_classification(z, v, y, mu=0.3), mixed, rtol=1e-5)


def test_bound():
    y = jnp.zeros((3, 4))
    worse = jnp.array([[2.0, 0, 0, 0]] * 3)
    teacher = jnp.array([[1.0, 0, 0, 0]] * 3)
    assert d.bounded_regression(y, teacher, y) == 0
    # the student is worse than the teacher: the whole squared error, gradient 2 (R - y)
    value, gradient = jax.value_and_grad(d.bounded_regression)(worse, teacher, y)
    np.testing.assert_allclose(value, 4.0)
    np.testing.assert_allclose(gradient, 2 * (worse - y) / 3)
    # better by more than the margin: neither value nor gradient
    value, gradient = jax.value_and_grad(d.bounded_regression)(teacher, worse, y, 1.0)
    assert value == 0
    assert (gradient == 0).all()
    # better, but by less than the margin
    np.testing.assert_allclose(d.bounded_regression(teacher, worse, y, 3.5), 1.0)


def test_regression_is_smooth_l1_plus_the_bound():
    rng = np.random.default_rng(0)
    r, t, y = (rng.normal(0, 2, (5, 4)).astype(np.float32) for _ in range(3))
    a = np.abs(r - y)
    huber = np.mean(np.where(a < 1, 0.5 * a**2, a - 0.5).sum(1))
    ours, theirs = ((r - y) ** 2).sum(1), ((t - y) ** 2).sum(1)
    bound = np.mean(np.where(ours > theirs, ours, 0))
    got = d.detection_regression(r, t, y, nu=0.5)
    np.testing.assert_allclose(got, huber + 0.5 * bound, rtol=1e-5)


def test_no_positive_box_is_zero_not_nan():
    r = jnp.ones((4, 4))
    none = jnp.zeros(4)
    value, gradient = jax.value_and_grad(d.detection_regression)(r, 2 * r, 0 * r, mask=none)
    assert value == 0
    assert (gradient == 0).all()


def test_adapter_with_identity_kernel_gives_zero_hint():
    from flax import nnx

    adapter = d.ChannelAdapter(3, 3, rngs=nnx.Rngs(0))
    adapter.conv.kernel.set_value(jnp.eye(3)[None, None])
    f = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
    np.testing.assert_allclose(d.hint(adapter(f), f), 0, atol=1e-10)
