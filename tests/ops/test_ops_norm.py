"""Batch normalization: Flax's numbers in every direction of differentiation, less to keep."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import ops

SHAPE = (4, 5, 3, 6)


def arrays(count):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(SHAPE) * 2 + 1, jnp.float32) for _ in range(count)]


def network(cls, **options):
    """A function (weights, x) -> (output, new statistics), and the weights."""
    layer = cls(6, use_running_average=False, rngs=nnx.Rngs(0), **options)
    for name, low, high in (("scale", 0.5, 2.0), ("bias", -1.0, 1.0)):
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = jnp.linspace(low, high, 6)
    graphdef, weights, rest = nnx.split(layer, nnx.Param, ...)

    def run(weights, x):
        inner = nnx.merge(graphdef, weights, rest, copy=True)
        return inner(x), nnx.state(inner, nnx.BatchStat)

    return run, weights


def both(measure, **options):
    return [measure(*network(cls, **options)) for cls in (nnx.BatchNorm, ops.BatchNorm)]


def close(trees, rtol):
    for want, got in zip(*map(jax.tree.leaves, trees), strict=True):
        assert got.dtype == want.dtype
        want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
        np.testing.assert_allclose(got, want, atol=rtol * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_fast_variance": False}, {"use_scale": False}, {"use_bias": False}, {"axis": 3}],
)
def test_values_statistics_and_gradients_are_those_of_flax(options):
    x, ct = arrays(2)

    def measure(run, weights):
        (y, stats), pull = jax.vjp(run, weights, x)
        # the statistics' cotangents go nowhere: they are updated, not differentiated
        return y, stats, pull((ct, jax.tree.map(jnp.zeros_like, stats)))

    close(both(measure, **options), 1e-5)


def test_forward_mode_and_second_derivatives():
    x, ct, t = arrays(3)

    def measure(run, weights):
        def loss(weights, x):
            return jnp.sum(jnp.sin(run(weights, x)[0]) * ct)

        gradient = jax.grad(loss, (0, 1))
        along = jax.tree.map(jnp.ones_like, weights)
        return (
            jax.jvp(lambda w, x: run(w, x)[0], (weights, x), (along, t)),
            jax.jvp(gradient, (weights, x), (along, t))[1],
            jax.grad(lambda x: jnp.sum(gradient(weights, x)[1] * t))(x),
            jax.vmap(lambda x: gradient(weights, x))(jnp.stack([x, 2 * x, -x])),
        )

    close(both(measure), 2e-5)


def test_bfloat16_keeps_bfloat16():
    x, ct = arrays(2)

    def measure(run, weights):
        y, pull, _ = jax.vjp(run, weights, x, has_aux=True)
        return y, pull(ct.astype(y.dtype))

    want, got = both(measure, dtype=jnp.bfloat16)
    assert got[0].dtype == jnp.bfloat16
    close([want, got], 1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_backward_pass_keeps_the_input_alone(dtype):
    x = arrays(1)[0].astype(dtype)

    def kept(run, weights):
        pull = jax.vjp(run, weights, x, has_aux=True)[1]
        return sum(v.nbytes for v in jax.tree.leaves(pull) if v.size >= x.size)

    flax, ours = both(kept, dtype=jnp.dtype(dtype))
    assert ours == x.nbytes
    assert flax >= 2 * ours


def test_what_is_not_ours_is_flax(monkeypatch):
    x = arrays(1)[0]
    mask = jnp.asarray(np.random.default_rng(1).integers(0, 2, (*SHAPE[:3], 1)), bool)
    calls = []
    flax = nnx.BatchNorm.__call__
    monkeypatch.setattr(
        nnx.BatchNorm, "__call__", lambda *a, **k: (calls.append(a), flax(*a, **k))[1]
    )
    for options, given in [
        ({"use_running_average": True}, {}),
        ({}, {"use_running_average": True}),
        ({}, {"mask": mask}),
        ({"axis": 1, "num": 5}, {}),
    ]:
        options = dict(options)
        count = options.pop("num", 6)
        options.setdefault("use_running_average", False)
        outs = []
        for cls in (nnx.BatchNorm, ops.BatchNorm):
            layer = cls(count, rngs=nnx.Rngs(0), **options)
            outs.append((layer(x, **given), layer.mean[...], layer.var[...]))
        close(outs, 1e-7)
    assert len(calls) == 8
    with pytest.raises(ValueError, match="use_running_average"):
        ops.BatchNorm(6, rngs=nnx.Rngs(0), use_running_average=None)(x)


def test_on_devices_and_without_compilation():
    x, ct = arrays(2)
    x, ct = (jnp.concatenate([v, v + 1]) for v in (x, ct))
    run, weights = network(ops.BatchNorm)

    def gradient(weights, x, ct):
        return jax.grad(lambda w, x: jnp.sum(run(w, x)[0] * ct), (0, 1))(weights, x)

    want = jax.jit(gradient)(weights, x, ct)
    with jax.disable_jit():
        close([want, gradient(weights, x, ct)], 1e-5)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    close([want, jax.jit(gradient)(weights, *jax.device_put((x, ct), split))], 1e-5)
