"""Modules taken apart and put together as NNX does it, and what is left to NNX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import models, modules
from cnnjax.tree import flatten


class Odd(nnx.Module):
    """Lists, dicts, a shared layer, a bare array, random streams, static attributes."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(11)])
        self.named = nnx.Dict({"b": nnx.Linear(2, 3, rngs=rngs), "a": nnx.Linear(3, 2, rngs=rngs)})
        self.again = self.layers[3]
        self.kernel = self.layers[2].kernel
        self.table = nnx.data(jnp.arange(3.0))
        self.none = nnx.data(None)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.sizes = (2, 3)
        self.act = nnx.relu

    def __call__(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        return self.drop(self.norm(self.again(x @ self.kernel[...])))


def same(a, b):
    (one, left), (other, right) = nnx.split(a), nnx.split(b)
    assert one == other
    left, right = flatten(left), flatten(right)
    assert list(left) == list(right)
    for x, y in zip(left.values(), right.values()):
        assert (x is y) or np.array_equal(jax.random.key_data(x), jax.random.key_data(y))


@pytest.mark.parametrize("make", [
    lambda: Odd(nnx.Rngs(0)),
    lambda: models.abstract("resnet20_cifar"),
    lambda: models.abstract("shufflenet_v1_g3", num_classes=4),
], ids=["odd", "resnet20", "shufflenet"])  # fmt: skip
def test_as_nnx_does_it(make):
    model = make()
    taken = modules.take(model)
    assert taken is not None
    graphdef, state = nnx.split(model)
    want = flatten(state)
    assert list(taken.leaves) == list(want)
    assert all(a is b for a, b in zip(taken.leaves.values(), want.values()))
    same(taken.build(taken.leaves), nnx.merge(graphdef, state))
    same(
        taken.build(taken.leaves.values(), evaluate=True),
        nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False),
    )
    kinds = [type(v) for v in jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable))]
    assert [k for k in taken.kinds if k is not None] == [
        k for k in kinds if issubclass(k, nnx.Variable)
    ]


def test_copies_share_no_variable_and_keep_what_was_shared_within():
    model = Odd(nnx.Rngs(0))
    taken = modules.take(model)
    assert taken is not None
    copy = taken.build(dict(taken.leaves))
    assert copy.again is copy.layers[3]
    assert copy.kernel is copy.layers[2].kernel
    assert copy.kernel is not model.kernel
    copy.kernel[...] = jnp.zeros((2, 2))
    assert np.asarray(model.kernel[...]).any()
    copy.sizes = (5,)
    assert model.sizes == (2, 3)
    nodes = taken.build_nodes(taken.leaves)
    assert nodes["layers/10"] is nodes[""].layers[10]


def test_a_copy_made_inside_a_trace_can_be_changed_there():
    taken = modules.take(Odd(nnx.Rngs(0)))
    assert taken is not None

    @jax.jit
    def run(leaves):
        model = taken.build(leaves)
        model.norm.mean[...] = model.norm.mean[...] + 1
        return model.norm.mean[...]

    np.testing.assert_array_equal(run(list(taken.leaves.values())), np.ones(2))


class Box(nnx.Module):
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("make", [
    lambda: Box(nnx.data([nnx.Param(jnp.ones(2))])),
    lambda: Box(nnx.Param({"a": jnp.ones(2)})),
    lambda: Box(nnx.Param(jnp.ones(2), ref=True)),
], ids=["list", "tree", "reference"])  # fmt: skip
def test_what_is_left_to_nnx(make):
    assert modules.take(make()) is None


def test_a_network_left_to_nnx_is_read_and_rebuilt_all_the_same():
    from cnnjax import graph, surgery

    class Listed(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.data([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](jnp.tanh(self.layers[0](x)))

    model = Listed(nnx.Rngs(0))
    assert modules.take(model) is None
    assert graph.trace(model, jnp.ones((1, 3))).group_of("layers/0/kernel").size == 4
    copy = surgery.copy(model)
    assert list(surgery.leaves(copy)) == list(surgery.leaves(model))
    np.testing.assert_array_equal(copy(jnp.ones((1, 3))), model(jnp.ones((1, 3))))
