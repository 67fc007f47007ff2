"""Whole networks of the registry: half of the channels go, with both proofs and exact costs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnnjax
from cnnjax import graph as G
from cnnjax import pruning, surgery

# (name, fields, side of a small input)
SMALL = [
    ("lenet_5", {}, 32),
    ("lenet_5_caffe", {}, 28),
    ("resnet20_cifar", {}, 16),
]
LARGE = [
    ("vgg16_cifar", {}, 32),
    ("resnet56_cifar", {}, 16),
    ("resnet50", {"num_classes": 10}, 64),
    ("densenet121", {"num_classes": 10}, 64),
    ("mobilenet_v1", {"num_classes": 10}, 64),
    ("mobilenet_v2", {"num_classes": 10}, 64),
    ("shufflenet_v1_g3", {"num_classes": 10}, 64),
    ("resnext50_32x4d", {"num_classes": 10}, 64),
    ("googlenet", {"num_classes": 10}, 64),
    ("inception_v3", {"num_classes": 10}, 96),
    ("preact_resnet164", {}, 16),
    ("fractalnet_cifar", {}, 32),
    ("highway_10", {}, 28),
    ("maxout_nin", {}, 32),
]


@functools.cache
def build(name, fields, side):
    fields = dict(fields)
    model = cnnjax.models.abstract(name, **fields)
    rng = np.random.default_rng(0)

    def draw(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jax.random.key(0) if "key" in path else jnp.zeros(x.shape, x.dtype)
        if path.endswith(("var", "scale")):
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        fan = max(1, int(np.prod(x.shape[:-1]))) if len(x.shape) > 1 else 100
        return jnp.asarray(rng.standard_normal(x.shape) * np.sqrt(2 / fan), x.dtype)

    channels = cnnjax.models.input_shape(name, **fields)[-1]
    x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    model = surgery.map_leaves(model, draw)
    return model, x, G.trace(model, x)


def check(name, fields, side):
    if name not in cnnjax.models.names():
        pytest.skip(f"{name} is not in the registry yet")
    model, x, graph = build(name, tuple(fields.items()), side)
    rng = np.random.default_rng(1)
    scores = {p: rng.normal(size=s[-1]) for p, s in graph.shapes.items() if len(s) > 1}
    keep = pruning.select_channels(graph, scores, macs=0.5, min_width=1)
    small = pruning.shrink(model, graph, keep, check=True)
    found, full = cnnjax.profile(small, x), cnnjax.profile(model, x)
    costs = pruning.CostModel(graph)
    assert (found.macs, found.params) == (costs.macs(keep.alive), costs.params(keep.alive))
    assert found.macs <= 0.5 * full.macs
    assert found.macs > 0.35 * full.macs


@pytest.mark.method("structured_surgery")
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c[0])
def test_half_of_the_macs_go(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.method("structured_surgery")
@pytest.mark.parametrize("case", LARGE, ids=lambda c: c[0])
def test_half_of_the_macs_of_large_networks_go(case):
    check(*case)
