"""Selection on data behind residual sums, concatenations and grouped convolutions.

The oracle is by construction: in each network some channels are made useless (nothing reads them,
or they are always silent), so that a right selection removes exactly those and the smaller network
computes the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import pruning
from cnnjax.graph import capture, trace
from cnnjax.pruning import importance

GONE = {"residual": (1, 4), "concat": (0, 5), "grouped": (1, 3, 5, 7)}
MAKER = {"residual": "a/kernel", "concat": "b/kernel", "grouped": "e/kernel"}
RATIO = {"residual": 2 / 8, "concat": 2 / 6, "grouped": 4 / 8}


class Mixed(nnx.Module):
    """a -> (b -> c) + a -> concat with b -> e -> grouped g -> dense."""

    def __init__(self, rngs: nnx.Rngs):
        self.a = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.b = nnx.Conv(8, 6, (3, 3), rngs=rngs)
        self.c = nnx.Conv(6, 8, (1, 1), rngs=rngs)
        self.e = nnx.Conv(14, 8, (3, 3), strides=2, rngs=rngs)
        self.g = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.fc = nnx.Linear(8 * 9, 3, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.a(x))
        h = jax.nn.relu(self.b(x))
        x = jax.nn.relu(x + self.c(h))
        x = jax.nn.relu(self.e(jnp.concatenate([x, h], axis=-1)))
        x = jax.nn.relu(self.g(x))
        return self.fc(x.reshape(x.shape[0], -1))


def change(model, path, fn):
    layer, name = path.split("/")
    leaf = getattr(getattr(model, layer), name)
    host = np.array(leaf[...])
    fn(host)
    leaf[...] = jnp.asarray(host)


def unread(model, where):
    """Zeroes everything that reads the channels of ``GONE[where]``."""
    rows = list(GONE[where])

    def zero(at):
        return lambda w: w.__setitem__((slice(None), slice(None), at), 0)

    if where == "residual":
        change(model, "b/kernel", zero(rows))
        change(model, "e/kernel", zero(rows))
    elif where == "concat":
        change(model, "c/kernel", zero(rows))
        change(model, "e/kernel", zero([8 + r for r in rows]))
    else:  # positions 1 and 3 of both conv-groups
        change(model, "g/kernel", zero([1, 3]))


def silent(model, where):
    """Makes the channels of ``GONE[where]`` negative for every image."""
    rows = list(GONE[where])
    change(model, MAKER[where].replace("kernel", "bias"), lambda b: b.__setitem__(rows, -100))
    if where == "residual":  # the sum's other side too
        change(model, "c/kernel", lambda w: w.__setitem__((..., rows), 0))
        change(model, "c/bias", lambda b: b.__setitem__(rows, 0))


@pytest.fixture
def net():
    model = Mixed(nnx.Rngs(0))
    for layer in ("a", "b", "c", "e", "g"):  # biases that are not zero
        change(model, f"{layer}/bias", lambda b: b.__iadd__(0.1 * np.arange(len(b))))
    model.eval()
    rng = np.random.default_rng(0)
    return model, [jnp.asarray(rng.normal(size=(12, 6, 6, 2)), jnp.float32) for _ in range(2)]


def check(model, graph, scores, where, batches):
    keep = pruning.select_channels(graph, scores, ratio={"**": RATIO[where]})
    small = pruning.shrink(model, graph, keep, check=False)
    maker = MAKER[where]
    atoms = graph.axis(maker, -1).labels
    removed = tuple(np.flatnonzero(~keep.alive[atoms]).tolist())
    assert removed == GONE[where]
    x = jnp.concatenate(batches)
    np.testing.assert_allclose(small(x), model(x), atol=2e-5)
    return small, keep


@pytest.mark.method("lasso_channel_pruning")
@pytest.mark.method("thinet")
@pytest.mark.parametrize("where", list(GONE))
@pytest.mark.parametrize("method", ["lasso", "thinet"])
def test_unread_channels_go_first(net, method, where):
    model, batches = net
    unread(model, where)
    graph = trace(model, batches[0][:1])
    scores = pruning.next_layer_scores(model, graph, batches, method=method, ratio=RATIO[where])
    small, keep = check(model, graph, {MAKER[where]: scores[MAKER[where]]}, where, batches)
    # nothing was lost, so least squares finds the same network again
    better = pruning.reconstruct(model, small, graph, keep, batches)
    x = jnp.concatenate(batches)
    np.testing.assert_allclose(better(x), model(x), atol=5e-3)


@pytest.mark.method("average_percentage_of_zeros")
@pytest.mark.parametrize("where", list(GONE))
@pytest.mark.parametrize("kind", ["apoz", "hrank"])
def test_silent_maps_go_first(net, kind, where):
    model, batches = net
    silent(model, where)
    graph = trace(model, batches[0][:1])
    layer = MAKER[where].split("/")[0]
    layers = [layer, "c"] if where == "residual" else [layer]

    def collect(state, batch):
        merged = nnx.merge(graphdef, state)
        _, found = capture(merged, dict.fromkeys(layers, "output"))(batch)
        return {f"{name}/kernel": jax.nn.relu(found[name]) for name in layers}

    graphdef, state = nnx.split(model)
    scores = importance.activation_scores(state, collect, batches, (kind,))[kind]
    flat = {f"{name}/kernel": scores[name]["kernel"] for name in layers}
    check(model, graph, flat, where, batches)
