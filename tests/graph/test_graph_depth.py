"""What a graph holds grows with the depth of the network, not with its square."""

from __future__ import annotations

import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import graph as g
from cnnjax.graph import ledger


def variable(*shape, kind=nnx.Param):
    return kind(jax.ShapeDtypeStruct(shape, jnp.float32))


class Unit(nnx.Module):
    """A 1x1 convolution and a normalization with stored statistics, by hand."""

    def __init__(self, c, o):
        self.kernel = variable(1, 1, c, o)
        self.scale, self.mean = variable(o), variable(o, kind=nnx.BatchStat)

    def __call__(self, x):
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, self.kernel[...], (1, 1), "SAME", dimension_numbers=dims
        )
        return (x - self.mean[...]) * self.scale[...]


class Residual(nnx.Module):
    def __init__(self, blocks):
        self.stem, self.head = Unit(3, 4), variable(4, 2)
        self.blocks = nnx.List([nnx.List([Unit(4, 4), Unit(4, 4)]) for _ in range(blocks)])

    def __call__(self, x):
        x = self.stem(x)
        for a, b in self.blocks:
            x = jax.nn.relu(x + b(jax.nn.relu(a(x))))
        return x.mean((1, 2)) @ self.head[...]


class Dense(nnx.Module):
    def __init__(self, blocks):
        self.blocks = nnx.List([Unit(2 * i + 3, 2) for i in range(blocks)])
        self.head = variable(2 * blocks + 3, 2)

    def __call__(self, x):
        for block in self.blocks:
            x = jnp.concatenate([x, block(x)], axis=-1)
        return x.mean((1, 2)) @ self.head[...]


X = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)


def size_of(thing):
    """Bytes of everything in it: containers, arrays, and the graph's own objects."""
    total, seen, todo = 0, set(), [thing]
    while todo:
        one = todo.pop()
        own = type(one).__module__.startswith("cnnjax.graph")
        if id(one) in seen or not (own or isinstance(one, PLAIN)):
            continue
        seen.add(id(one))
        total += one.nbytes if isinstance(one, np.ndarray) else sys.getsizeof(one)
        if not isinstance(one, np.ndarray | str | int | float):
            todo.extend(gc.get_referents(one))
    return total


PLAIN = (tuple, list, dict, set, frozenset, str, int, float, np.ndarray)


def test_adjacency_and_bytes_grow_linearly_with_depth():
    graphs = [g.trace(Residual(n), X) for n in (16, 32, 64)]
    few, more, most = (len(x.links) for x in graphs)
    assert most - more <= 2 * (more - few) + 8
    # written out, the pairs of a network twice as deep are four times as many
    few, more, most = (size_of(x) for x in graphs)
    assert most - more < 2.1 * (more - few)
    assert len(graphs[2].edges) > 3 * len(graphs[1].edges)


@pytest.mark.parametrize("make", [Residual, Dense])
def test_streams_stand_for_the_same_pairs(monkeypatch, make):
    deep = g.trace(make(14), X)
    assert any(min(pair) < 0 for pair in deep.links)
    monkeypatch.setattr(ledger, "WIDE", 10**9)
    plain = g.trace(make(14), X)
    assert all(min(pair) >= 0 for pair in plain.links)
    assert deep.edges == plain.edges == plain.links
    for path in ("blocks/3", "blocks/13") if make is Dense else ("blocks/3/1", "blocks/13/0"):
        for side in ("next_layers", "prev_layers"):
            one, other = (getattr(x, side)(path) for x in (deep, plain))
            assert [(y.path, y.kind, y.call) for y in one] == [
                (y.path, y.kind, y.call) for y in other
            ]
    assert [str(x) for x in deep.layers] == [str(x) for x in plain.layers]


def test_next_layers_are_the_readers_of_the_stream_and_nothing_behind_them():
    graph = g.trace(Residual(20), X)
    found = {(x.path, x.kind) for x in graph.next_layers("blocks/0/1")}
    # itself (its own normalization), the first layer of every later block, and the head
    later = {(f"blocks/{i}/0", "conv") for i in range(1, 20)}
    assert later <= found
    assert {("head", "dense")} <= found
    assert not any(path.endswith("/1") and path != "blocks/0/1" for path, _ in found)
