"""Standardized logits, linear bottlenecks and densities over pixels, against numpy and scipy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import ndimage

from cnnjax import distillation as D

RNG = np.random.default_rng(3)


@pytest.mark.method("logit_regression")
def test_standardized_logits_come_back():
    v = (RNG.standard_normal((50, 4)) * [1.0, 5.0, 0.1, 2.0] + [0, 3, -2, 9]).astype(np.float32)
    v[:, 3] = 7.0  # a class whose logit never changes
    scale = D.logit_scale(v)
    z = np.asarray(scale.standardize(v), np.float64)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z[:, :3].std(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(z[:, 3], 0)
    np.testing.assert_allclose(scale.unstandardize(scale.standardize(v)), v, rtol=1e-5, atol=1e-5)
    # squared error on standardized logits is the scaled loss
    s = v + RNG.standard_normal(v.shape).astype(np.float32)
    a = D.logit_regression(scale.standardize(s), scale.standardize(v))
    np.testing.assert_allclose(a, D.logit_regression(s, v, scale=scale.std), rtol=1e-4)
    with pytest.raises(ValueError, match="at least 2 examples"):
        D.logit_scale(v[:1])
    with pytest.raises(ValueError, match="floor is 0"):
        D.logit_scale(v, floor=0.0)


@pytest.mark.method("logit_regression")
def test_a_bottleneck_of_full_rank_is_any_dense_layer():
    kernel = RNG.standard_normal((7, 5)).astype(np.float32)
    bias = RNG.standard_normal(5).astype(np.float32)
    x = RNG.standard_normal((3, 7)).astype(np.float32)
    full = D.LinearBottleneck(7, 5, 5, rngs=nnx.Rngs(0))
    full.represent(kernel, bias)
    np.testing.assert_allclose(full(x), x @ kernel + bias, atol=1e-5)
    thin = D.LinearBottleneck(7, 5, 2, rngs=nnx.Rngs(0))
    thin.represent(kernel, bias)
    product = np.asarray(thin.first.kernel[...]) @ np.asarray(thin.second.kernel[...])
    rest = np.linalg.svd(kernel, compute_uv=False)[2:]  # Eckart & Young
    np.testing.assert_allclose(np.linalg.norm(kernel - product), np.linalg.norm(rest), rtol=1e-4)
    with pytest.raises(ValueError, match="rank is 6"):
        D.LinearBottleneck(7, 5, 6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expected \(7, 5\)"):
        thin.represent(kernel.T)


@pytest.mark.method("saliency_distillation")
def test_two_one_dimensional_blurs_are_the_two_dimensional_one():
    maps = RNG.standard_normal((2, 9, 12)).astype(np.float32)
    for sigma in (0.8, 1.7):
        got = D.gaussian_blur(maps, sigma)
        # scipy's filter, and the outer product as one kernel
        want = [ndimage.gaussian_filter(m.astype(np.float64), sigma, mode="nearest") for m in maps]
        np.testing.assert_allclose(got, want, atol=1e-5)
        half = int(4 * sigma + 0.5)
        taps = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
        kernel = np.outer(taps, taps) / taps.sum() ** 2
        whole = [ndimage.correlate(m.astype(np.float64), kernel, mode="nearest") for m in maps]
        np.testing.assert_allclose(got, whole, atol=1e-5)
    with pytest.raises(ValueError, match="sigma is 0"):
        D.gaussian_blur(maps, 0.0)


@pytest.mark.method("saliency_distillation")
def test_densities_sum_to_one_and_the_prior_is_theirs_without_features():
    prior = D.center_prior(6, 8, 0.3)
    np.testing.assert_allclose(np.exp(prior).sum(), 1, rtol=1e-5)
    head = D.DensityHead(3, (6, 8), prior=prior, rngs=nnx.Rngs(0))
    features = RNG.standard_normal((2, 3, 4, 3)).astype(np.float32)
    log_q = jax.nn.log_softmax(head(features).reshape(2, -1))
    np.testing.assert_allclose(np.exp(log_q).sum(-1), 1, rtol=1e-5)
    # a readout of nothing leaves the prior
    head.second.kernel.set_value(jnp.zeros((1, 1, 8, 1)))
    log_q = jax.nn.log_softmax(head(features).reshape(2, -1))
    np.testing.assert_allclose(log_q, np.tile(prior.ravel(), (2, 1)), atol=1e-5)
    with pytest.raises(ValueError, match="the prior is"):
        D.DensityHead(3, (6, 8), prior=prior.T, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sigma is 0"):
        D.center_prior(3, 3, 0.0)


class Gaze(nnx.Module):
    """A convolution and a density."""

    def __init__(self, width, *, rngs):
        self.conv1 = nnx.Conv(1, width, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.head = D.DensityHead(width, (16, 16), rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv2(nnx.relu(self.conv1(x)))))


def blobs(n, rng):
    """Images with a bright blob among dim ones; one noisy fixation each, on or near the bright."""
    y, x = np.mgrid[:16, :16]
    images, places = rng.normal(0, 0.2, (n, 16, 16)), rng.uniform(2, 14, (n, 3, 2))
    for i in range(n):
        for j, (a, b) in enumerate(places[i]):
            size = 1.0 if j == 0 else 0.4
            images[i] += size * np.exp(-0.5 * ((y - a) ** 2 + (x - b) ** 2) / 2)
    at = np.clip(np.round(places[:, 0] + rng.normal(0, 1.5, (n, 2))), 0, 15).astype(int)
    fixed = np.zeros((n, 16, 16), np.float32)
    fixed[np.arange(n), at[:, 0], at[:, 1]] = 1
    return images[..., None].astype(np.float32), fixed


@pytest.mark.slow
@pytest.mark.method("saliency_distillation")
def test_a_students_map_is_nearer_to_the_teachers_than_without_it():
    """Toy maps: a quarter of the width; KL to the teacher, taught against labels alone."""

    def train(model, images, targets, steps=400):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        tx = optax.adam(5e-3)

        @jax.jit
        def step(params, opt, x, fixed, soft, weight):
            def loss(p):
                return D.saliency(nnx.merge(graphdef, p, rest, copy=True)(x), soft, fixed, weight)

            updates, opt = tx.update(jax.grad(loss)(params), opt)
            return optax.apply_updates(params, updates), opt

        opt, rng = tx.init(params), np.random.default_rng(0)
        fixed, soft, weight = targets
        for _ in range(steps):
            rows = rng.integers(0, len(images), 32)
            params, opt = step(params, opt, images[rows], fixed[rows], soft[rows], weight)
        return nnx.merge(graphdef, params, rest)

    def density(model, images):
        scores = np.asarray(model(images), np.float64).reshape(len(images), -1)
        scores -= scores.max(-1, keepdims=True)
        p = np.exp(scores)
        return (p / p.sum(-1, keepdims=True)).reshape(-1, 16, 16)

    rng = np.random.default_rng(0)
    many, few, test = blobs(2000, rng), blobs(150, rng), blobs(300, rng)
    teacher = train(Gaze(16, rngs=nnx.Rngs(0)), many[0], (many[1], many[1], 0.0), 1200)
    soft = density(teacher, few[0]).astype(np.float32)
    target = density(teacher, test[0])
    far = {}
    for name, weight in (("alone", 0.0), ("taught", 0.9)):
        student = train(Gaze(4, rngs=nnx.Rngs(1)), few[0], (few[1], soft, weight))
        q = density(student, test[0])
        far[name] = (target * (np.log(target + 1e-12) - np.log(q + 1e-12))).sum((1, 2)).mean()
    assert far["taught"] < 0.9 * far["alone"], far
