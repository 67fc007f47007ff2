"""Every network of the zoo: shrunk equals gated, at several ratios, or it's refused with a line."""

from __future__ import annotations

import graph_proof as proof
import graph_zoo as zoo
import numpy as np
import pytest

from cnnjax import graph as g

REFUSED_WHOLE = {
    "eca": "a",
    "fixed_index": "a",
    "halves_swapped_inline": "a",
}  # networks of which a layer stays as it is
HARD_CODED = r"sliced 4:8 at .*graph_zoo_channels\.py:\d+ \(__call__\)"
RIGHT = [n for n, c in zoo.CASES.items() if "refused" not in c.tags]


def check(name: str, ratio: float, seed: int) -> None:
    model, inputs = zoo.build(name, seed)
    graph = g.trace(model, *inputs)
    alive = proof.decide(graph, ratio, seed)
    assert (~alive).any(), "nothing was pruned"
    small = proof.shrink(model, graph, alive)
    big = proof.gated(model, graph, alive)
    proof.assert_equal(proof.outputs(small, inputs), proof.outputs(big, inputs))


@pytest.mark.parametrize("name", RIGHT)
def test_shrunk_equals_gated(name):
    seed = RIGHT.index(name)
    check(name, (0.4, 0.6)[seed % 2], seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.85])  # a tenth of eight channels is none
@pytest.mark.parametrize("name", RIGHT)
def test_shrunk_equals_gated_at_many_ratios(name, ratio, seed):
    check(name, ratio, seed)


@pytest.mark.parametrize("name", sorted(REFUSED_WHOLE))
def test_what_stays_says_why(name):
    graph = g.trace(zoo.abstract(name), *zoo.build(name)[1])
    axis = graph.axis(f"{REFUSED_WHOLE[name]}/conv/kernel")
    assert not axis.prunable
    assert axis.source is not None
    assert "graph_zoo" in str(axis.source)


@pytest.mark.parametrize("name", list(zoo.CASES))
def test_statistics_are_flagged_where_channels_are_mixed(name):
    graph = g.trace(zoo.abstract(name), *zoo.build(name)[1])
    assert any(group.statistic for group in graph.groups) == zoo.CASES[name].statistic


@pytest.mark.parametrize("name", ["cbam", "layer_norm", "attention_scaled"])
def test_a_statistic_makes_shrunk_and_gated_differ(name):
    # the flag isn't empty: what is flagged does change the numbers
    model, inputs = zoo.build(name)
    graph = g.trace(model, *inputs)
    alive = graph.alive()
    group = next(x for x in graph.groups if x.statistic)
    alive[proof.decide(graph, 0.5, 0, statistics=True) == 0] = False
    alive[np.setdiff1d(np.arange(graph.num_atoms), group.atoms)] = True
    for c in graph.constraints:
        if not c.holds(alive):
            alive[:] = proof.decide(graph, 0.5, 0, statistics=True)
    small = proof.shrink(model, graph, alive)
    a, b = proof.outputs(small, inputs), proof.outputs(proof.gated(model, graph, alive), inputs)
    assert np.abs(a[0] - b[0]).max() > 1e-5


def test_hard_coded_slice_is_refused_with_its_line():
    model, inputs = zoo.build("hard_coded")
    graph = g.trace(model, *inputs)
    alive = proof.decide(graph, 0.5, 0)
    with pytest.raises(g.LabelError, match=HARD_CODED):
        proof.shrink(model, graph, alive)


def test_hard_coded_slice_that_runs_is_refused_with_its_line():
    # removing channels outside of the slice leaves every shape right and every number wrong
    model, inputs = zoo.build("hard_coded")
    graph = g.trace(model, *inputs)
    alive = graph.alive()
    labels = graph.axis("a/conv/kernel").labels
    alive[labels[[0, 1, 14, 15]]] = False
    with pytest.raises(g.LabelError, match=HARD_CODED):
        proof.shrink(model, graph, alive)


@pytest.mark.parametrize("name", RIGHT[::4])
def test_abstract_weights_give_the_same_graph(name):
    model, inputs = zoo.build(name)
    a, b = g.trace(model, *inputs), g.trace(zoo.abstract(name), *inputs)
    assert str(a) == str(b)
    assert all(np.array_equal(a.axes[k].labels, b.axes[k].labels) for k in a.axes)
