"""Stochastic depth and dropout: rates, expectation, statistics, deterministic evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import models_a_oracle as oracle
import numpy as np
import pytest
from flax import nnx

from cnnjax import models
from cnnjax.models import depth, residual

pytestmark = pytest.mark.method("stochastic_depth")


@pytest.mark.parametrize(("count", "expected"), [(54, 40.25), (200 * 3 // 3, 149.75)])
def test_linear_decay_keeps_the_expected_number_of_blocks(count, expected):
    gates = depth.RandomDepth(count, 0.5, rngs=nnx.Rngs(0))
    assert sum(gates.keep) == pytest.approx(expected)
    assert gates.keep[-1] == 0.5
    assert depth.RandomDepth(3, 0.8, decay="uniform", rngs=nnx.Rngs(0)).keep == (0.8,) * 3


def test_gates_are_bernoulli_at_training_and_probabilities_at_evaluation():
    gates = depth.RandomDepth(4, 0.4, rngs=nnx.Rngs(1))
    gates.eval()
    np.testing.assert_allclose(gates(), gates.keep, rtol=1e-6)
    gates.train()
    graphdef, state = nnx.split(gates)

    @jax.jit
    def draw(state):
        def one(state, _):
            layer = nnx.merge(graphdef, state)
            out = layer()
            return nnx.state(layer), out

        return jax.lax.scan(one, state, length=4000)[1]

    draws = np.asarray(draw(state))
    assert set(np.unique(draws)) == {0.0, 1.0}
    spread = np.sqrt(np.array(gates.keep) * (1 - np.array(gates.keep)) / 4000)
    assert np.all(np.abs(draws.mean(0) - gates.keep) < 4.5 * spread)
    # blocks are dropped independently
    pairs = np.corrcoef(draws.T)[np.triu_indices(4, 1)]
    assert np.all(np.abs(pairs) < 0.08)


def test_expectation_at_training_is_the_evaluation_output_of_a_linear_unit():
    # F is linear at evaluation statistics, so E[b F] = p F holds exactly before the last ReLU
    block = oracle.fill(residual.BasicBlock(3, 3, rngs=nnx.Rngs(0)))
    block.eval()
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    keep = 0.3
    on = residual.gated_branch(block, x, jnp.float32(1.0))
    scaled = residual.gated_branch(block, x, jnp.float32(keep))
    off = residual.gated_branch(block, x, jnp.float32(0.0))
    np.testing.assert_allclose(scaled, keep * on + (1 - keep) * off, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(on, block.branch(x), rtol=1e-6)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_dropped_branch_leaves_output_gradient_and_statistics_alone(gate):
    block = oracle.fill(residual.BasicBlock(3, 3, rngs=nnx.Rngs(0)))
    block.train()
    graphdef, params, rest = nnx.split(block, nnx.Param, ...)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)

    @jax.jit
    def step(params, rest, gate):
        def loss(params):
            inner = nnx.merge(graphdef, params, rest, copy=True)
            y = inner(x, gate)
            return jnp.sum(y * y), (y, nnx.state(inner, nnx.BatchStat))

        return jax.grad(loss, has_aux=True)(params)

    grads, (y, stats) = step(params, rest, jnp.float32(gate))
    if gate:
        inner = nnx.merge(graphdef, params, rest, copy=True)
        np.testing.assert_allclose(y, inner(x), rtol=1e-4, atol=1e-5)
        assert np.any(np.asarray(grads["conv1"]["kernel"][...]))
        assert not np.array_equal(stats["bn1"]["mean"][...], rest["bn1"]["mean"][...])
    else:
        np.testing.assert_array_equal(y, np.maximum(x, 0))
        assert not any(np.any(g) for g in jax.tree.leaves(grads))
        for name in ("bn1", "bn2"):
            for which in ("mean", "var"):
                np.testing.assert_array_equal(stats[name][which][...], rest[name][which][...])


def test_a_network_is_random_at_training_and_deterministic_at_evaluation():
    fields = {"blocks_per_stage": 3, "widths": (4, 4), "scan": True, "num_classes": 3}
    model = oracle.fill(models.create("stochastic_depth_110", rngs=nnx.Rngs(0), **fields))
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    call = nnx.jit(lambda m, x: m(x))
    model.train()
    outs = [np.asarray(call(model, x)) for _ in range(6)]
    assert len({o.tobytes() for o in outs}) > 1
    model.eval()
    np.testing.assert_array_equal(call(model, x), call(model, x))


def test_dropout_zeroes_at_its_rate_and_keeps_the_mean():
    model = models.create(
        "wrn_16_2", rngs=nnx.Rngs(0), stages=(1,), widths=(4,), stem_width=4, dropout=0.3
    )
    drop = model.layer1[0].body.branches[0].dropout
    y = np.asarray(drop(jnp.ones((100, 100))))
    assert np.mean(y == 0) == pytest.approx(0.3, abs=0.02)
    assert y.mean() == pytest.approx(1.0, abs=0.03)
    model.eval()
    np.testing.assert_array_equal(drop(jnp.ones((2, 2))), 1.0)
