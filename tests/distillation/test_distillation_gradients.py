"""Gradient attention on a tiny smooth network: central differences at the input and weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import distillation as d

pytestmark = pytest.mark.method("attention_transfer_gradient")


def make(seed):
    k1, k2 = jax.random.split(jax.random.key(seed))
    return {
        "a": 0.4 * jax.random.normal(k1, (3 * 3 * 2, 5)),
        "b": 0.4 * jax.random.normal(k2, (5, 4)),
    }


def apply(params, x):
    x = x.reshape(x.shape[0], -1)
    return jax.nn.softplus(x @ params["a"]) @ params["b"]


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(3, 3, 3, 2)), jnp.float32), jnp.array([0, 3, 1])


def numpy_loss(params, x, y):
    """Cross-entropy of each example in float64."""
    a, b = (np.asarray(params[k], np.float64) for k in "ab")
    z = np.log1p(np.exp(np.asarray(x, np.float64).reshape(len(x), -1) @ a)) @ b
    return np.log(np.exp(z).sum(-1)) - z[np.arange(len(y)), np.asarray(y)]


def numpy_gradient(params, x, y, step=1e-5):
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape[1:]):
        up, down = x.copy(), x.copy()
        up[(slice(None), *index)] += step
        down[(slice(None), *index)] -= step
        change = numpy_loss(params, up, y) - numpy_loss(params, down, y)
        out[(slice(None), *index)] = change / (2 * step)
    return out


def test_input_gradient_equals_central_differences(batch):
    params = make(0)
    got = d.input_gradient(lambda x: apply(params, x), *batch)
    np.testing.assert_allclose(got, numpy_gradient(params, *batch), atol=1e-5)


@pytest.mark.parametrize("form", ["mean_square", "norm"])
def test_value_and_parameter_gradient(batch, form):
    student, teacher = make(0), make(1)

    def loss(params):
        return d.gradient_attention(
            lambda x: apply(params, x), lambda x: apply(teacher, x), *batch, beta=4.0, form=form
        )

    def numpy_value(params):
        difference = numpy_gradient(params, *batch) - numpy_gradient(teacher, *batch)
        if form == "mean_square":
            return 2 * np.mean(difference**2)
        return 2 * np.mean(np.sqrt(np.sum(difference**2, axis=(1, 2, 3))))

    np.testing.assert_allclose(loss(student), numpy_value(student), rtol=1e-4)
    gradient = jax.grad(loss)(student)
    direction = {k: np.random.default_rng(2).normal(size=v.shape) for k, v in student.items()}
    up = {k: np.asarray(v, np.float64) + 1e-3 * direction[k] for k, v in student.items()}
    down = {k: np.asarray(v, np.float64) - 1e-3 * direction[k] for k, v in student.items()}
    slope = (numpy_value(up) - numpy_value(down)) / 2e-3
    ours = sum(np.sum(np.asarray(gradient[k]) * direction[k]) for k in student)
    np.testing.assert_allclose(ours, slope, rtol=2e-3)


def test_same_network_is_zero_with_finite_gradient(batch):
    params = make(0)
    for form in ("mean_square", "norm"):
        value, gradient = jax.value_and_grad(
            lambda p, form=form: d.gradient_attention(
                lambda x: apply(p, x), lambda x: apply(params, x), *batch, form=form
            )
        )(params)
        assert value == 0
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_symmetry_is_zero_for_a_mirror_invariant_network(batch):
    params = make(0)

    def symmetric(x):
        return apply(params, x) + apply(params, x[:, :, ::-1])

    np.testing.assert_allclose(d.gradient_symmetry(symmetric, *batch), 0, atol=1e-12)
    assert d.gradient_symmetry(lambda x: apply(params, x), *batch) > 1e-6


def test_unknown_form(batch):
    with pytest.raises(ValueError, match="form is 'l1'"):
        d.gradient_symmetry(lambda x: apply(make(0), x), *batch, form="l1")


def test_the_whole_loss_by_finite_differences_in_the_parameters():
    """Cross-entropy and gradient attention of a smooth network in float64: to 1e-4."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        student, teacher = (
            {k: jnp.asarray(v, jnp.float64) for k, v in make(seed).items()} for seed in (0, 1)
        )
        x, y = jnp.asarray(rng.normal(size=(3, 3, 3, 2))), jnp.array([0, 3, 1])

        def cross_entropy(params, x):
            z = apply(params, x)
            return jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, y[:, None], 1)[:, 0]

        @jax.jit
        def loss(params):
            def slope(p):
                return jax.grad(lambda x: cross_entropy(p, x).sum())(x)

            distance = jnp.mean((slope(params) - slope(teacher)) ** 2)
            return cross_entropy(params, x).mean() + 2.0 * distance

        gradient = jax.jit(jax.grad(loss))(student)
        for name, leaf in student.items():
            for at in [(0, 0), (leaf.shape[0] - 1, leaf.shape[1] - 1), (1, 2)]:
                ends = [loss({**student, name: leaf.at[at].add(s)}) for s in (1e-5, -1e-5)]
                np.testing.assert_allclose(
                    gradient[name][at], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-9
                )
        # and the library's own float32 gradient of that loss
        ours = jax.grad(
            lambda p: (
                d.cross_entropy(apply(p, x), y)
                + d.gradient_attention(
                    lambda x: apply(p, x), lambda x: apply(teacher, x), x, y, beta=4.0
                )
            )
        )(student)
        for name, leaf in gradient.items():
            np.testing.assert_allclose(ours[name], leaf, atol=1e-4 * float(jnp.abs(leaf).max()))
