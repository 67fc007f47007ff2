"""Linen: read, shrink with both proofs, and train the small model."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import graph as g
from cnnjax import pruning
from cnnjax.pruning.linen import shrink_linen


class Block(nn.Module):
    features: int
    strides: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x, train):
        norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)  # noqa: E731
        y = nn.Conv(self.features, (3, 3), (self.strides,) * 2, use_bias=False, name="conv1")(x)
        y = nn.relu(norm()(y))
        y = nn.Conv(
            self.features, (3, 3), feature_group_count=self.groups, use_bias=False, name="conv2"
        )(y)
        y = norm()(y)
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.features, (1, 1), (self.strides,) * 2, name="proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    groups: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = Block(8, name="a")(x, train)
        x = Block(16, 2, self.groups, name="b")(x, train)
        x = nn.Conv(16, (3, 3), feature_group_count=16, name="depth")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


X = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def setup(groups):
    model = ResNet(groups)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.2, 1.0, a.shape) * rng.choice([-1, 1], a.shape)
                              if a.ndim > 1 else rng.uniform(0.5, 1.5, a.shape), a.dtype), shapes
    )  # fmt: skip
    return model, variables, g.trace_fn(model.apply, variables, X)


@pytest.mark.method("structured_surgery")
def test_shrink_and_train():
    model, variables, graph = setup(1)
    assert [x.name for x in graph.groups] == [
        "params/stem", "params/a/conv1", "params/b/conv1", "params/b/conv2",
    ]  # fmt: skip
    assert graph.bn_of("params/a/conv1") is not None
    scores = pruning.importance.l1(variables["params"])
    keep = pruning.select_channels(graph, {"params": scores}, ratio=0.5)
    small, cut = shrink_linen(model, variables, graph, keep)
    assert cut["params"]["b"]["conv1"]["kernel"].shape == (3, 3, 4, 8)
    # the original still is what it was
    assert model.apply(variables, jnp.ones(X.shape)).shape == (2, 5)

    tx = optax.sgd(0.01)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(X.shape), jnp.float32)
    y = jnp.array([0, 3])

    @jax.jit
    def step(params, stats, opt):
        def loss(params):
            logits, new = small.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), new["batch_stats"], opt, value

    params, stats = cut["params"], cut["batch_stats"]
    opt, losses = tx.init(params), []
    for _ in range(4):
        params, stats, opt, value = step(params, stats, opt)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), stats, cut["batch_stats"])
    assert all(v > 0 for v in jax.tree.leaves(moved))


@pytest.mark.method("structured_surgery")
def test_grouped():
    model, variables, graph = setup(4)
    alive = graph.alive()
    (c,) = graph.constraints
    for part in (*c.parts, *c.paired):
        alive[part[[0, 2]]] = False
    small, cut = shrink_linen(model, variables, graph, alive)
    assert cut["params"]["b"]["conv2"]["kernel"].shape == (3, 3, 2, 8)
    # by hand: the same numbers as the gated original
    kernel = np.array(variables["params"]["b"]["conv2"]["kernel"])
    kept = [0 + 1, 3]
    want = kernel[:, :, kept][..., [4 * q + i for q in range(4) for i in kept]]
    np.testing.assert_array_equal(cut["params"]["b"]["conv2"]["kernel"], want)


def test_a_hard_coded_shape_is_refused():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), name="c")(x)
            x = x * self.param("gain", nn.initializers.ones, (8,))
            return nn.Dense(3, name="d")(x.mean((1, 2)))

    model = Odd()
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    graph = g.trace_fn(model.apply, variables, X)
    alive = graph.alive()
    alive[:4] = False
    with pytest.raises(Exception, match="gain"):
        shrink_linen(model, variables, graph, alive)
