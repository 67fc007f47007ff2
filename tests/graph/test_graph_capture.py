"""Capture: values equal those of running the pieces by hand; nothing is changed on the model."""

from __future__ import annotations

import graph_zoo as zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import graph as g


def evaluated(name):
    model, inputs = zoo.build(name)
    return g.tracing.evaluation_mode(model), inputs[0]


def test_values_are_those_of_the_pieces():
    model, x = evaluated("batch_norm")
    y, found = g.capture(model, {"body/*": "both", "head": "input"})(x)
    one = model.body[0](x)
    two = model.body[1](one)
    np.testing.assert_array_equal(found["body/0"][0], x)
    np.testing.assert_allclose(found["body/0"][1], one)
    np.testing.assert_allclose(found["body/1"][0], one)
    np.testing.assert_allclose(found["body/1"][1], two)
    np.testing.assert_allclose(found["head"], two)
    np.testing.assert_allclose(y, model(x))


def test_under_jit_and_grad_with_a_perturbation():
    model, x = evaluated("batch_norm")
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss(add):
        y, found = g.capture(nnx.merge(graphdef, state, copy=True), "body/0", add=add)(x)
        return (y**2).sum(), found

    zero = jnp.zeros((2, 8, 8, 8))
    grad, found = jax.grad(loss, has_aux=True)({"body/0": zero})
    tail = lambda z: (model.head(model.body[1](z)) ** 2).sum()  # noqa: E731
    np.testing.assert_allclose(
        grad["body/0"], jax.grad(tail)(found["body/0"]), rtol=1e-4, atol=1e-6
    )


def test_model_and_class_are_untouched_and_statistics_updated():
    model, inputs = zoo.build("batch_norm")
    model.train()
    kinds = [type(m) for _, m in nnx.iter_modules(model)]
    before = np.asarray(model.body[0].bn.mean[...])
    g.capture(model, "body/*/conv")(inputs[0])
    assert [type(m) for _, m in nnx.iter_modules(model)] == kinds
    assert np.abs(np.asarray(model.body[0].bn.mean[...]) - before).max() > 0


def test_every_call_of_a_shared_module_is_kept():
    model, x = evaluated("weight_reuse")
    _, found = g.capture(model, "b")(x)
    assert list(found) == ["b", "b#1", "b#2"]
    np.testing.assert_allclose(found["b#1"], model.b(found["b"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("taps", "words"),
    [
        ({"bodi/*": "output"}, "body/0"),
        ({"body/*": "outputs"}, "Did you mean 'output'"),
    ],
)
def test_bad_taps(taps, words):
    model, _ = zoo.build("batch_norm")
    with pytest.raises(ValueError, match=words):
        g.capture(model, taps)


def test_a_module_that_is_not_called():
    model, x = evaluated("batch_norm")
    with pytest.raises(ValueError, match="'body' isn't called"):
        g.capture(model, "body")(x)
    with pytest.raises(ValueError, match="isn't tapped"):
        g.capture(model, "body/0", add={"body/1": jnp.zeros(())})


def test_the_program_says_whether_one_layer_reads_anothers_very_output():
    class Two(nnx.Module):
        def __init__(self, between, rngs):
            self.between = between
            self.conv, self.norm = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            x = self.conv(x)
            return self.norm(jax.nn.relu(x) if self.between else x)

    example = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    for between in (False, True):
        model = Two(between, nnx.Rngs(0))
        jaxpr, seen = g.captured_program(model, {"conv": "output", "norm": "both"}, example)
        read, written = seen["norm"]
        assert (read is seen["conv"]) is not between
        assert written in jaxpr.outvars
    with pytest.raises(ValueError, match="matches nothing"):
        g.captured_program(model, {"dense": "output"}, example)
