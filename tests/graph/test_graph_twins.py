"""Channels that one axis carries twice, met in another order later: proved equal or refused."""

from __future__ import annotations

import graph_proof as proof
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import graph as g

X = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)


def flipped(shift):
    """A sum that makes channels i and 7-i the same; another reader sees them rolled."""

    def program(p, x):
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        both, rolled = x + x[..., ::-1], jnp.roll(x * p["scale"], shift, -1)
        return jnp.tanh(both).mean((1, 2)) @ p["a"], jnp.tanh(rolled).mean((1, 2)) @ p["b"]

    return program


def rolled(by):
    """``x + roll(x, by)`` means something else at another width."""

    def program(p, x):
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x * p["scale"]
        return jnp.tanh(x + jnp.roll(x, by, -1)).mean((1, 2)) @ p["a"], x.mean((1, 2)) @ p["b"]

    return program


def params():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 3, 8), "scale": (8,), "a": (8, 3), "b": (8, 3)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def compare(program, alive_of):
    tree = params()
    graph = g.trace_fn(program, tree, X)
    alive = alive_of(graph)
    small = proof.shrink_tree(program, tree, graph, alive)
    assert small["conv"].shape[-1] < 8
    image = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
    run = jax.jit(program)
    proof.assert_equal(run(small, image), run(proof.gate_tree(tree, graph, alive), image))


@pytest.mark.parametrize("shift", [1, 3, -2])
@pytest.mark.parametrize("gone", [(0,), (2,), (1, 3)])
def test_twins_are_told_apart(shift, gone):
    def alive_of(graph):
        alive = np.ones(graph.num_atoms, bool)
        alive[graph.axes["conv", 3].labels[list(gone)]] = False
        return alive

    compare(flipped(shift), alive_of)


@pytest.mark.parametrize("by", [2, 4])
def test_a_sum_with_another_partner_is_refused(by):
    """Both identities and atoms agree here; only the pairs show the other function."""

    def alive_of(graph):
        alive = np.ones(graph.num_atoms, bool)
        alive[graph.axes["conv", 3].labels[1]] = False
        assert 0 < graph.axes["conv", 3].alive(alive).sum() < 8
        return alive

    with pytest.raises(g.LabelError, match="meets? other"):
        compare(rolled(by), alive_of)


def twice(move):
    """Every channel twice with other numbers, and then in another order."""

    def program(p, x):
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        both = jnp.concatenate([x, jax.nn.relu(x)], -1) * p["scale"]
        return move(both).mean((1, 2)) @ p["a"]

    return program


def twice_params():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 3, 8), "scale": (16,), "a": (16, 3)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


MOVES = {
    "roll": lambda x: jnp.roll(x, 3, -1),
    "roll by the width": lambda x: jnp.roll(x, 8, -1),
    "flip": lambda x: x[..., ::-1],
    "halves": lambda x: jnp.concatenate(jnp.split(x, 2, -1)[::-1], -1),
    "shuffle": lambda x: x.reshape(2, 4, 4, 4, -1).swapaxes(3, 4).reshape(x.shape),
    "index": lambda x: x[..., np.arange(x.shape[-1])[::-1]],
}


@pytest.mark.parametrize("name", MOVES)
def test_repeated_channels_that_are_rearranged_stay(name):
    graph = g.trace_fn(twice(MOVES[name]), twice_params(), X)
    assert not graph.groups
    assert any("carries channels twice" in str(fixed) for fixed in graph.fixed)


@pytest.mark.parametrize("gone", [(0,), (2, 7), (1, 3, 4, 6)])
def test_repeated_channels_in_their_order_may_go(gone):
    tree, program = twice_params(), twice(jnp.tanh)
    graph = g.trace_fn(program, tree, X)
    alive = np.ones(graph.num_atoms, bool)
    alive[list(gone)] = False
    small = proof.shrink_tree(program, tree, graph, alive)
    assert small["scale"].shape == (2 * (8 - len(gone)),)
    image = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
    run = jax.jit(program)
    proof.assert_equal(run(small, image), run(proof.gate_tree(tree, graph, alive), image))


@pytest.mark.parametrize("shift", [0, 3])
def test_twins_that_a_depthwise_convolution_reads_stay(shift):
    def program(p, x):
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        both = jnp.tanh(x + x[..., ::-1]).mean((1, 2)) @ p["a"]
        deep = jax.lax.conv_general_dilated(
            jnp.roll(x, shift, -1), p["depth"], (1, 1), "SAME", feature_group_count=8,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return both, deep.mean((1, 2)) @ p["b"]

    tree = params() | {"depth": np.ones((3, 3, 1, 8), np.float32)}
    graph = g.trace_fn(program, tree, X)
    assert not graph.groups
    assert any("the same as others" in str(fixed) for fixed in graph.fixed)


@pytest.mark.parametrize(
    ("gone", "words"), [([1], "meets other channels"), ([0, 2], "meet other partners")]
)
def test_which_of_two_twins_comes_first_is_seen(gone, words):
    """Every third channel is the same: of the four that are left of twelve, a roll by 3 joins each
    with its other neighbour."""

    def program(p, x):
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(x + jnp.roll(x, 3, -1)).mean((1, 2)) @ p["a"]

    shapes = {"conv": (3, 3, 3, 12), "a": (12, 2)}
    tree = {k: np.ones(s, np.float32) for k, s in shapes.items()}
    graph = g.trace_fn(program, tree, X)
    assert len(graph.alive()) == 3
    alive = graph.alive()
    alive[gone] = False
    with pytest.raises(g.LabelError, match=words):
        proof.shrink_tree(program, tree, graph, alive)


def test_half_a_sum_among_twins_stays():
    def program(p, x):
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x * jax.nn.sigmoid(x[..., ::-1].mean((1, 2), keepdims=True))
        return (x * jax.nn.sigmoid(x[..., :4].sum(-1, keepdims=True))).mean((1, 2)) @ p["a"]

    graph = g.trace_fn(program, params(), X)
    assert not graph.groups
    assert any("the same as others, in reduce_sum" in str(fixed) for fixed in graph.fixed)
