"""Random programs through selection: every decision can be applied, and is proved or refused."""

from __future__ import annotations

import pathlib
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import graph as G
from cnnjax import pruning
from cnnjax.tree import map_with_path

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "graph"))
import graph_proof as proof
from test_graph_random import SETTINGS, programs

SCOPES = st.sampled_from(("layer", "global", "isomorphic"))
RATIOS = st.sampled_from((0.1, 0.4, 0.6, 0.85))


def prove(program, ratio, seed, scope):
    x = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
    graph = G.trace_fn(program, program.params, x)
    rng = np.random.default_rng(seed)
    scores = {p: rng.normal(size=s[-1]) for p, s in graph.shapes.items() if p.endswith("kernel")}
    try:
        keep = pruning.select_channels(graph, scores, ratio=ratio, scope=scope, min_width=1)
    except ValueError as error:
        if "can be pruned" in str(error):
            return "nothing to prune"
        raise
    if keep.removed == 0:
        return "nothing to prune"
    try:
        how = pruning.cut(program, graph, keep, params=program.params)
    except G.LabelError:
        return "refused"
    image = rng.standard_normal(x.shape).astype(np.float32)
    small = map_with_path(how, program.params)
    big = proof.gate_tree(program.params, graph, keep.alive)
    proof.assert_equal(jax.jit(program)(small, image), jax.jit(program)(big, image))
    return "equal"


@settings(max_examples=8, derandomize=True, **SETTINGS)
@given(programs(), RATIOS, st.integers(0, 3), SCOPES)
def test_random_programs(program, ratio, seed, scope):
    prove(program, ratio, seed, scope)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_three_hundred_random_programs(part):
    """A hundred in each part."""
    seen: dict[str, int] = {}

    @hypothesis.seed(100 + part)
    @settings(max_examples=100, database=None, **SETTINGS)
    @given(programs(), RATIOS, st.integers(0, 5), SCOPES)
    def run(program, ratio, seed, scope):
        word = prove(program, ratio, seed, scope)
        seen[word] = seen.get(word, 0) + 1

    run()
    assert seen["equal"] >= 65, seen
