"""Every topology of the zoo through select and shrink, each time with both proofs."""

from __future__ import annotations

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import graph as G
from cnnjax import pruning, surgery
from cnnjax.pruning import importance

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "graph"))
import graph_zoo as zoo

REFUSED = {"hard_coded"}
# what selection and slicing do differently: groups, splits, ties, several axes
QUICK = (
    "plain_flatten", "residual_basic", "dense_blocks", "resnext", "shuffle1_g3", "shuffle1_g4",
    "shuffle2", "squeeze_excite", "attention", "maxout_inner", "c2f", "pixel_shuffle", "nchw",
)  # fmt: skip


@functools.cache
def traced(name):
    model, inputs = zoo.build(name)
    return model, inputs, G.trace(model, *inputs)


def proved(name, ratio, seed, scope="layer"):
    """Shrinks with random scores; the numeric check runs inside wherever it applies."""
    model, _, graph = traced(name)
    params = nnx.state(model, nnx.Param)
    scores = importance.random(params, jax.random.key(seed))
    if name == "raw_nchw":  # channels first: a score for every weight
        rng = np.random.default_rng(seed)
        scores = importance.l1(jax.tree.map(lambda a: rng.normal(size=a.shape), params))
    keep = pruning.select_channels(graph, scores, ratio=ratio, scope=scope, min_width=1,
                                   statistics=zoo.CASES[name].statistic)  # fmt: skip
    small = pruning.shrink(model, graph, keep)
    return keep, small


@pytest.mark.method("structured_surgery")
@pytest.mark.parametrize("name", QUICK)
def test_shrunk_equals_gated(name):
    keep, small = proved(name, 0.6, 0)
    assert keep.removed > 0.4 * len(keep.alive)
    model, inputs, _ = traced(name)
    assert cnnjax.profile(small, *inputs).macs < 0.75 * cnnjax.profile(model, *inputs).macs


@pytest.mark.slow
@pytest.mark.method("structured_surgery")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.6, 0.85])
@pytest.mark.parametrize("name", sorted(set(zoo.CASES) - REFUSED))
def test_shrunk_equals_gated_at_every_ratio(name, ratio, seed):
    keep, _ = proved(name, ratio, seed, "global" if seed == 2 else "layer")
    assert keep.removed > 0


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_hard_coded_positions_are_refused(name):
    with pytest.raises(G.LabelError, match=r"graph_zoo_channels\.py:\d+"):
        proved(name, 0.4, 0)


@pytest.mark.parametrize("name", ["shuffle1_g2", "shuffle1_g3", "shuffle1_g8", "shuffle2", "c2f"])
@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_scores_the_parts_stay_equal(name, seed):
    """The decision satisfies every constraint, and each cell loses its own lowest atoms."""
    _, _, graph = traced(name)
    rng = np.random.default_rng(seed)
    scores = {p: rng.normal(size=s[-1]) for p, s in graph.shapes.items() if len(s) > 1}
    scope = ("layer", "global", "isomorphic")[seed % 3]
    keep = pruning.select_channels(
        graph, scores, ratio=0.15 + 0.15 * seed, scope=scope, min_width=1
    )
    assert keep.removed > 0
    for c in graph.constraints:
        assert keep.alive[c.atoms].all() or c.holds(keep.alive)


@pytest.mark.parametrize(
    ("groups", "steps"),
    [
        (3, 250),
        *(
            pytest.param(g, n, marks=pytest.mark.slow)
            for g, n in ((1, 1800), (2, 440), (4, 165), (8, 55))
        ),
    ],
)
def test_shufflenet_v1_has_a_useful_number_of_steps(groups, steps):
    """Narrow ShuffleNets of the registry: bottlenecks shrink finely, the whole net by half."""
    name = f"shufflenet_v1_g{groups}"
    if name not in cnnjax.models.names():
        pytest.skip(f"{name} is not in the registry yet")
    model = cnnjax.models.abstract(name, num_classes=10)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    graph = G.trace(model, x)
    found = pruning.pools.pools(graph)
    covered = sum(p.size for p in found)
    assert covered == graph.num_atoms
    # the stream that runs through all stages: no step takes more than a fifth of it
    stream = max(found, key=lambda p: p.size)
    assert groups == 1 or max(np.diff(stream.gone)[:-1]) <= stream.size / 5
    assert sum(p.steps - 1 for p in found) >= steps
    scores = {p: np.random.default_rng(0).normal(size=s[-1])
              for p, s in graph.shapes.items() if len(s) > 1}  # fmt: skip
    keep = pruning.select_channels(graph, scores, macs=0.5)
    small = pruning.shrink(surgery.abstract(model), graph, keep)
    assert cnnjax.profile(small, x).macs <= 0.5 * cnnjax.profile(model, x).macs
