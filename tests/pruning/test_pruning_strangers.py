"""Networks from outside of every list: right, or kept whole or refused with a reason; never wrong.

The numeric proof inside of `shrink` is not relied upon: outputs are compared here with those of the
original in which the removed channels are multiplied by zero where they're made and where they're
read.
"""

from __future__ import annotations

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pruning_strangers as strangers
import pytest
from flax import nnx

import cnnjax
from cnnjax import graph as G
from cnnjax import pruning

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "graph"))
import graph_proof as proof
import graph_zoo as zoo

X = (2, 8, 8, 3)
# number of inputs, and the groups that can be pruned
CASES = {
    "PyramidUNet": (1, ["down/0", "down/1", "down/2", "up/0", "up/1"]),
    "NeXt": (1, ["patch", *(f"blocks/layers/{i}/{m}" for i in (0, 1) for m in ("pw1", "fc1"))]),
    "Siamese": (2, ["tower/layers/0", "tower/layers/2", "tower/layers/5"]),
    "Detector": (1, ["c1", "c2", "l2", "tower"]),
    "AttentionPool": (1, ["stem", "key", "value", "queries"]),
    "LambdaDense": (1, ["stem", *(f"{m}/{i}" for i in range(3) for m in ("mids", "outs"))]),
    "GatedGhost": (1, ["primary", "mix", "squeeze"]),
    "Looped": (1, ["stem", "cells/a", "last/a"]),
    "TorchStyle": (1, ["w1"]),
    "Routed": (1, ["stem", "tail", "experts"]),
    "Sorted": (1, ["a"]),
    "QueryPool": (1, ["stem", "mid", "attend/key", "attend/key#2", "attend/out", "query"]),
    "Hourglass": (1, ["d1", "d2", "u2", "u1"]),
}
# what stays, and why
STAYS = {
    ("Sorted", "b/kernel"): "sort over channels",
    ("Routed", "router/kernel"): "argmax over channels",
    ("TorchStyle", "fc/kernel"): "the model's output",
}


@functools.cache
def built(name):
    model = zoo.fill(nnx.eval_shape(lambda: getattr(strangers, name)(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    inputs = tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in [X] * CASES[name][0])
    return model, inputs, G.trace(model, *inputs)


def small_of(name, ratio):
    model, _, graph = built(name)
    # a score for every weight: it fits kernels of any layout
    scores = jax.tree.map(jnp.abs, nnx.state(model, nnx.Param))
    keep = pruning.select_channels(graph, scores, ratio=ratio, min_width=1)
    return keep, pruning.shrink(model, graph, keep)


@pytest.mark.parametrize("ratio", [0.3, 0.7])
@pytest.mark.parametrize("name", list(CASES))
def test_shrunk_equals_gated(name, ratio):
    model, inputs, graph = built(name)
    keep, small = small_of(name, ratio)
    assert keep.removed > 0
    proof.assert_equal(
        proof.outputs(small, inputs), proof.outputs(proof.gated(model, graph, keep.alive), inputs)
    )
    before, after = cnnjax.profile(model, *inputs), cnnjax.profile(small, *inputs)
    assert after.params < before.params
    assert after.params == pruning.CostModel(graph).params(keep.alive)


@pytest.mark.parametrize("name", list(CASES))
def test_what_can_go_is_found(name):
    assert [group.name for group in built(name)[2].groups] == CASES[name][1]


@pytest.mark.parametrize(("name", "path"), list(STAYS))
def test_what_stays_says_why_and_where(name, path):
    axis = built(name)[2].axis(path)
    assert not axis.prunable
    assert STAYS[name, path] in axis.reason
    assert "output" in axis.reason or "pruning_strangers.py" in str(axis.source)


def test_a_norm_over_channels_is_named_before_its_group_is_pruned():
    model, _, graph = built("NeXt")
    group = graph.group_of("patch/kernel")
    assert group.statistic == "a mean over channels"
    assert "pruning_strangers.py" in str(group.statistic_source)
    scores = jax.tree.map(jnp.abs, nnx.state(model, nnx.Param))
    keep = pruning.select_channels(graph, scores, ratio=0.5)
    assert keep.alive[group.atoms].all()
    keep = pruning.select_channels(graph, scores, ratio=0.5, statistics=True)
    assert keep.alive[group.atoms].sum() == 4
    small = pruning.shrink(model, graph, keep)
    assert small(jnp.zeros(X)).shape == (2, 4)
    with pytest.raises(ValueError, match="check=True can't hold"):
        pruning.shrink(model, graph, keep, check=True)


def test_a_learnt_querys_scale_follows_its_heads_width():
    """The constant is 1/sqrt(width): half of the width would run, and attend otherwise."""
    model, _, graph = built("QueryPool")
    group = next(x for x in graph.groups if x.name == "attend/key")
    assert group.statistic
    assert group.size == 4
    keep = pruning.Keep.of(graph, np.isin(np.arange(graph.num_atoms), group.atoms[:2], invert=True))
    small = pruning.shrink(model, graph, keep)
    assert small(jnp.zeros(X)).shape == (2, 3)


def test_a_network_of_which_nothing_can_go_says_why():
    class Folded(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 4, (1, 1), rngs=rngs)
            self.head = nnx.Linear(4 * 64, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.sort(self.stem(x), -1).reshape(len(x), -1))

    model = nnx.eval_shape(lambda: Folded(nnx.Rngs(0)))
    graph = G.trace(model, jax.ShapeDtypeStruct(X, jnp.float32))
    with pytest.raises(ValueError, match="no channel of this network can be pruned, for example"):
        pruning.select_channels(graph, {"stem/kernel": jnp.ones((1, 1, 3, 4))}, ratio=0.5)
