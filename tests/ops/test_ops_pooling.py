"""Max pooling against `nnx.max_pool`, whose gradient is XLA's select_and_scatter."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import models, ops

CASES = [
    ((2, 6, 8, 3), 2, 2, "VALID"),
    ((2, 7, 5, 3), 2, 2, "SAME"),  # one window of padding and pixels
    ((1, 9, 8, 2), 3, 2, ((1, 1), (1, 1))),
    ((1, 8, 9, 2), 3, 2, ((0, 2), (1, 0))),
    ((2, 6, 6, 2), 3, 1, "SAME"),
    ((1, 11, 10, 2), 2, 3, "VALID"),  # pixels that no window sees
    ((1, 10, 10, 2), 3, 2, "VALID"),  # a last row that no window sees
    ((1, 5, 5, 1), 5, 5, "VALID"),
]
IDS = [f"{s[1]}x{s[2]}-{k}-{t}-{p}" for s, k, t, p in CASES]


def ours(x, k, s, p):
    return ops.max_pool(x, (k, k), (s, s), p)


def native(x, k, s, p):
    return nnx.max_pool(x, (k, k), (s, s), p)


def images(shape, *, ties=True):
    """Whole numbers from 0 to 3: most windows hold their largest value more than once."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, shape) if ties else rng.normal(size=shape)
    return jnp.asarray(x, jnp.float32)


def noise(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize(("shape", "k", "s", "p"), CASES, ids=IDS)
def test_values_and_both_derivatives_equal_the_native_ones(shape, k, s, p, ties):
    x = images(shape, ties=ties)
    y, back = jax.vjp(lambda x: ours(x, k, s, p), x)
    expected, native_back = jax.vjp(lambda x: native(x, k, s, p), x)
    np.testing.assert_array_equal(y, expected)
    ct = noise(y.shape)
    np.testing.assert_allclose(back(ct)[0], native_back(ct)[0], atol=1e-6)
    t = noise(shape, 2)
    pushed = jax.jvp(lambda x: ours(x, k, s, p), (x,), (t,))[1]
    # the tangent is the cotangent's transpose: <ct, J t> = <J^T ct, t>
    np.testing.assert_allclose(jnp.vdot(ct, pushed), jnp.vdot(back(ct)[0], t), rtol=1e-4)
    if not ties:  # JAX's own tangent is another element's where values are equal
        expected = jax.jvp(lambda x: native(x, k, s, p), (x,), (t,))[1]
        np.testing.assert_allclose(pushed, expected, atol=1e-6)


def test_a_tie_gives_everything_to_the_first():
    grad = jax.grad(lambda x: ours(x, 2, 2, "VALID").sum())(jnp.zeros((1, 2, 2, 1)))
    assert grad.ravel().tolist() == [1, 0, 0, 0]


def test_vmap_jit_and_second_derivatives():
    x = images((3, 2, 6, 6, 2), ties=False)

    def loss(pool, x):
        return jnp.sum(pool(x, 3, 2, ((1, 1), (1, 1))) ** 3)

    for mapped in (
        lambda pool: jax.vmap(jax.grad(lambda x: loss(pool, x))),
        lambda pool: jax.jit(jax.vmap(jax.grad(lambda x: loss(pool, x)), in_axes=1, out_axes=1)),
    ):
        np.testing.assert_allclose(mapped(ours)(x), mapped(native)(x), rtol=1e-5)
    # one input, many directions
    x, t = x[0], noise((4, *x.shape[1:]))
    hvp = [
        jax.vmap(lambda t, f=f: jax.jvp(jax.grad(lambda x: loss(f, x)), (x,), (t,))[1])(t)
        for f in (ours, native)
    ]
    np.testing.assert_allclose(hvp[0], hvp[1], rtol=1e-4, atol=1e-5)
    twice = [
        jax.grad(lambda x, f=f: jnp.sum(jax.grad(lambda x: loss(f, x))(x) ** 2))
        for f in (ours, native)
    ]
    np.testing.assert_allclose(twice[0](x), twice[1](x), rtol=1e-4, atol=1e-5)


def test_without_compilation():
    x = images((1, 6, 6, 2))
    expected = jax.grad(lambda x: ours(x, 2, 2, "VALID").sum())(x)
    with jax.disable_jit():
        got = jax.grad(lambda x: ours(x, 2, 2, "VALID").sum())(x)
    np.testing.assert_array_equal(got, expected)


def test_bfloat16_and_other_arrays():
    x = images((1, 6, 6, 2)).astype(jnp.bfloat16)
    y = ours(x, 2, 2, "VALID")
    assert y.dtype == jnp.bfloat16
    assert jax.grad(lambda x: ours(x, 2, 2, "VALID").sum())(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        ours(np.ones((1, 4, 4, 1), np.float32), 2, 2, "VALID"), np.ones((1, 2, 2, 1))
    )
    whole = jnp.arange(16).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(ours(whole, 2, 2, "VALID"), native(whole, 2, 2, "VALID"))
    line = images((2, 6, 3))
    expected = nnx.max_pool(line, (2,), (2,), "VALID")
    np.testing.assert_array_equal(ops.max_pool(line, (2,), (2,)), expected)


def test_each_platform_gets_its_form():
    grad = jax.jit(jax.grad(lambda x: ours(x, 3, 2, "SAME").sum()))
    like = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)
    for platform, native_form in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = jax.export.export(grad, platforms=[platform])(like).mlir_module()
        assert ("select_and_scatter" in text) is native_form, platform


def test_a_network_with_pools_has_the_gradients_of_the_native_pool(monkeypatch):
    model = models.create("lenet_5_caffe", rngs=nnx.Rngs(0))
    x = noise((2, 28, 28, 1))
    loss = nnx.grad(lambda m, x: jnp.sum(m(x) ** 2))
    got = nnx.to_pure_dict(loss(model, x))
    monkeypatch.setattr(ops, "max_pool", nnx.max_pool)
    expected = nnx.to_pure_dict(loss(model, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
