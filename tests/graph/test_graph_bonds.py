"""Channels that go together, several rows of them in one atom: which belong to one output."""

from __future__ import annotations

import graph_proof as proof
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import graph as g
from cnnjax.graph import bonds, ledger

X = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)


def conv(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def program(p, x):
    """Pairs of a maxout go together; a shuffle takes them apart in front of a depthwise kernel."""
    x = conv(x, p["conv"])
    n, h, w, c = x.shape
    pairs = x.reshape(n, h, w, -1, 2).max(-1)
    mixed = x.reshape(n, h, w, 2, -1).swapaxes(3, 4).reshape(x.shape)
    deep = conv(mixed, p["depth"], c)
    return jnp.tanh(pairs).mean((1, 2)) @ p["a"], jnp.tanh(deep).mean((1, 2)) @ p["b"]


def params():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 3, 8), "depth": (3, 3, 1, 8), "a": (4, 2), "b": (8, 2)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("gone", range(4))
def test_a_depthwise_kernel_follows_the_channels_that_it_reads(gone):
    tree = params()
    graph = g.trace_fn(program, tree, X)
    alive = graph.alive()
    alive[graph.axis("conv").labels[2 * gone]] = False
    small = proof.shrink_tree(program, tree, graph, alive)
    assert small["depth"].shape[-1] < 8
    image = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
    run = jax.jit(program)
    proof.assert_equal(run(small, image), run(proof.gate_tree(tree, graph, alive), image))


def events(rows, reason):
    return [ledger.Event(np.array(r), reason) for r in rows]


def mismatch(old, new, label, pools=((), ())):
    ident = np.arange(20)
    before = tuple(np.array(r) for r in old), tuple(np.array(r) for r in pools[0])
    book = ledger.Ledger(frozenset())
    book.bonds, book.pools = events(new, "a bond"), events(pools[1], "a pool")
    found = bonds.Bonds(*before, book, ident).mismatch(np.array(label), np.arange(20) != 13)
    return found and found.reason


def test_rows_of_the_shrunk_program_are_rows_of_the_original():
    old = [[[11, 12], [13, 14], [15, 16]]]
    label = np.zeros(20, int)
    label[[1, 2, 3, 4]] = 11, 12, 15, 16
    assert mismatch(old, [[[3, 4], [1, 2]]], label) is None
    assert mismatch(old, [[[1, 4], [3, 2]]], label) == "a bond"
    # more bonds than before: any row of the original will do
    assert mismatch(old, [[[1, 2]], [[3, 4]]], label) is None
    assert mismatch(old, [[[1, 2]], [[4, 3]]], label) == "a bond"


def test_pools_hold_no_channel_that_they_did_not_hold():
    label = np.zeros(20, int)
    label[[1, 2, 3]] = 11, 12, 15
    assert mismatch([], [], label, ([[11, 12, 13]], [[1, 2]])) is None
    assert mismatch([], [], label, ([[11, 12, 13]], [[1, 3]])) == "a pool"
    # 12 is still there
    assert mismatch([], [], label, ([[11, 12, 13]], [[1]])) == "a pool"


def test_a_slice_where_a_maxout_has_its_pairs():
    """Whole pairs may go; half of what is left is another half then."""

    def halved(p, x):
        x = conv(x, p["conv"])
        n, h, w, c = x.shape
        pairs = x.reshape(n, h, w, -1, 2).max(-1).mean((1, 2))
        gated = x * jax.nn.sigmoid(x[..., : c // 2].sum(-1, keepdims=True))
        return pairs @ p["a"], gated.mean((1, 2)) @ p["b"]

    tree = params()
    tree |= {"conv": tree["conv"][..., :4], "a": tree["a"][:2], "b": tree["b"][:4]}
    graph = g.trace_fn(halved, tree, X)
    assert any(len(c.parts) == 2 and "sliced" in c.reason for c in graph.constraints)
