"""Running a model on labels reads the same graph as its jaxpr does."""

from __future__ import annotations

import gc

import graph_zoo as zoo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import graph as g
from cnnjax.graph import direct, tracing

# networks that cut their channels: what is done with the pieces is seen in the jaxpr alone
CUT = [
    "c2f",
    "chunk_concat",
    "film",
    "fusion",
    "halves_swapped_inline",
    "hard_coded",
    "partial_conv",
    "res2net",
    "shuffle2",
]


def both(monkeypatch, make):
    """The graph read directly (and that it was), and off the jaxpr."""
    found = []
    run = direct.run

    def watched(*args):
        found.append(run(*args))
        return found[-1]

    monkeypatch.setattr(direct, "run", watched)
    first = make()
    assert found, "no run"
    monkeypatch.setattr(tracing, "DIRECT", False)
    return first, make(), found[0] is not None


def assert_same(a, b):
    assert a.num_atoms == b.num_atoms
    assert dict(a.shapes) == dict(b.shapes)
    assert list(a.axes) == list(b.axes)
    for key, one in a.axes.items():
        other = b.axes[key]
        np.testing.assert_array_equal(one.labels, other.labels)
        assert (one.table is None) == (other.table is None)
        if one.table is not None:
            np.testing.assert_array_equal(one.table, other.table)
        assert (one.consumer, one.reason) == (other.consumer, other.reason)
    assert str(a) == str(b) or [str(x) for x in a.groups] == [str(x) for x in b.groups]
    assert [(x.name, x.members, x.statistic) for x in a.groups] == [
        (x.name, x.members, x.statistic) for x in b.groups
    ]
    assert [(c.kind, c.reason) for c in a.constraints] == [
        (c.kind, c.reason) for c in b.constraints
    ]
    assert [str(x) for x in a.layers] == [str(x) for x in b.layers]
    assert a.edges == b.edges
    np.testing.assert_allclose([x for x, _ in a.literals], [x for x, _ in b.literals], rtol=0)
    assert a.notes == b.notes


@pytest.mark.parametrize("name", sorted(zoo.CASES))
def test_same_graph_as_off_the_jaxpr(monkeypatch, name):
    shapes = zoo.CASES[name].inputs
    model, inputs = zoo.abstract(name), [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    first, second, used = both(monkeypatch, lambda: g.trace(model, *inputs))
    assert used == (name not in CUT)
    assert_same(first, second)


PARAMS = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in {"a": (3, 8), "b": (8, 4)}.items()}
X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


def test_control_flow_and_promotion(monkeypatch):
    def fn(p, x):
        x = jax.jit(jax.nn.gelu)(x @ p["a"])
        x, _ = jax.lax.scan(lambda c, t: (c * 0.5 + t, None), x, jnp.arange(3.0))
        x = jax.lax.cond(x.sum() > 0, lambda y: y * 2, lambda y: 1 - y, x)
        return (x.astype(jnp.bfloat16) + 1).astype(jnp.float32) @ p["b"]

    first, second, used = both(monkeypatch, lambda: g.trace_fn(fn, PARAMS, X))
    assert used
    assert_same(first, second)


def test_where_a_run_fails_the_jaxpr_is_read(monkeypatch):
    def fn(p, x):
        assert not isinstance(x, direct.Labelled)
        return jnp.tanh(x @ p["a"]) @ p["b"]

    first, second, used = both(monkeypatch, lambda: g.trace_fn(fn, PARAMS, X))
    assert not used
    assert_same(first, second)
    assert first.group_of("a").size == 8


def test_the_collector_is_as_before():

    with direct.no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
