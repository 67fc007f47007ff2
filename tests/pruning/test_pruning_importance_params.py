"""Scores from the parameters alone, against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax.pruning import importance
from cnnjax.tree import flatten


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return {
        "conv": {"kernel": draw(3, 3, 4, 6), "bias": draw(6)},
        "norm": {"scale": draw(6), "bias": draw(6)},
        "fc": {"kernel": draw(6, 5)},
    }


def test_norms_are_of_every_weight_of_every_kernel(params):
    for name, fn in (("l1", np.abs), ("l2", np.square)):
        got = flatten(importance.get(name)(params))
        assert set(got) == {"conv/kernel", "fc/kernel"}
        for path, x in got.items():
            np.testing.assert_allclose(x, fn(np.asarray(flatten(params)[path])), rtol=1e-6)


def test_random_is_uniform_per_channel_and_follows_its_key(params):
    a, b, c = (flatten(importance.random(params, jax.random.key(s))) for s in (0, 0, 1))
    assert {p: x.shape for p, x in a.items()} == {"conv/kernel": (6,), "fc/kernel": (5,)}
    for p in a:
        np.testing.assert_array_equal(a[p], b[p])
        assert not np.array_equal(a[p], c[p])
        assert ((a[p] >= 0) & (a[p] < 1)).all()
    wide = importance.random({"k": jnp.zeros((2, 4000))}, jax.random.key(2))["k"]
    assert abs(float(wide.mean()) - 0.5) < 0.03
    assert abs(float(wide.var()) - 1 / 12) < 0.01


def test_bn_scale_is_the_size_of_gamma(params):
    got = flatten(importance.bn_scale(params))
    assert set(got) == {"norm/scale"}
    np.testing.assert_allclose(got["norm/scale"], np.abs(params["norm"]["scale"]))
    renamed = {"norm": {"gamma": params["norm"]["scale"]}}
    assert set(flatten(importance.bn_scale(renamed, scale="gamma"))) == {"norm/gamma"}


def test_any_flax_tree_and_jit(params):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    for tree in (state, nnx.to_pure_dict(state)):
        assert set(flatten(importance.l1(tree))) == {"layers/0/kernel"}
        assert set(flatten(importance.bn_scale(tree))) == {"layers/1/scale"}
    np.testing.assert_allclose(
        jax.jit(importance.l2)(params)["fc"]["kernel"], importance.l2(params)["fc"]["kernel"]
    )


def test_registry_and_refusals():
    assert {"l1", "l2", "random", "bn_scale"} <= set(importance.names())
    with pytest.raises(ValueError, match="unknown score 'l11'. Did you mean 'l1'"):
        importance.get("l11")
    with pytest.raises(ValueError, match="registered already"):
        importance.register("l1")(lambda params: params)
    with pytest.raises(ValueError, match="no kernel"):
        importance.l1({"b": jnp.zeros(3)})
    with pytest.raises(ValueError, match="no normalization scale named 'scale'"):
        importance.bn_scale({"b": jnp.zeros(3)})
