"""MPNIN's block-wise pre-training: what learns at each stage, what stays, what comes out."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from cnnjax import models, tree
from cnnjax.models import mpnin


def _data(steps: int):
    """Three classes that differ in colour."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        y = rng.integers(0, 3, 16)
        x = rng.standard_normal((16, 8, 8, 3)).astype(np.float32) * 0.3
        x[np.arange(16), :, :, y] += 1.0
        yield x, y


@pytest.fixture(scope="module")
def network():
    return models.create("mpnin", num_classes=3, rngs=nnx.Rngs(0))


def _leaves(model):
    state = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return {k: np.asarray(v) for k, v in tree.flatten(state).items()}


@pytest.mark.method("mpnin")
def test_a_stage_trains_its_block_and_nothing_else(network):
    stage = mpnin.BlockStage(nnx.clone(network), 1, rngs=nnx.Rngs(1))
    before = _leaves(stage)
    losses = mpnin.train_stage(stage, _data(2), optax.sgd(0.1, momentum=0.9))
    after = _leaves(stage)
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    assert losses.shape == (2,)
    # frozen: bit-identical parameters and batch statistics
    assert not [k for k in changed if k.startswith(("model/mlps/0/", "model/mlps/2/"))]
    inside = {k for k in before if k.startswith("model/mlps/1/")}
    assert {k for k in inside if k.endswith(("kernel", "mean", "var"))} <= changed
    assert {"head/kernel", "head/bias"} <= changed
    assert stage.head.kernel.shape == (1, 1, 192, 3)


@pytest.mark.method("mpnin")
def test_frozen_blocks_use_their_running_statistics(network):
    """The frozen part is a fixed function: its output does not depend on the rest of the batch."""
    stage = mpnin.BlockStage(nnx.clone(network), 2, rngs=nnx.Rngs(1))
    assert stage.head is None  # the last block has one map a class
    graphdef, state = nnx.split(stage)
    x = next(iter(_data(1)))[0]

    @jax.jit
    def frozen(state, x):
        model = nnx.merge(graphdef, state).model
        return model.step(1, model.step(0, x))

    whole, part = frozen(state, x), frozen(state, x[:8])
    np.testing.assert_allclose(whole[:8], part, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.method("mpnin")
def test_pretraining_learns_and_leaves_the_argument_alone(network):
    before = _leaves(network)
    model, history = mpnin.pretrain(
        network, lambda stage: _data(12), optax.sgd(0.05, momentum=0.9), rngs=nnx.Rngs(1)
    )
    assert [len(h) for h in history] == [12, 12, 12]
    assert all(np.mean(h[-3:]) < 0.7 * np.mean(h[:2]) for h in history)
    for k, v in _leaves(network).items():
        np.testing.assert_array_equal(v, before[k])
    assert set(_leaves(model)) == set(before)  # the temporary heads are gone
    assert not model.drops[0].deterministic
    model.eval()
    graphdef, state = nnx.split(model)
    x, y = next(iter(_data(1)))
    logits = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x)
    assert np.mean(np.argmax(logits, -1) == y) > 0.8


def test_bad_arguments(network):
    with pytest.raises(TypeError, match="takes a NiN, got Linear"):
        getattr(mpnin.pretrain, "__wrapped__", mpnin.pretrain)(
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)), lambda i: [], optax.sgd(0.1), rngs=nnx.Rngs(0)
        )
    with pytest.raises(ValueError, match=r"index must be in 0 \.\.\. 2, got 3"):
        mpnin.BlockStage(nnx.clone(network), 3, rngs=nnx.Rngs(1))
    stage = mpnin.BlockStage(nnx.clone(network), 0, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="got no batches"):
        mpnin.train_stage(stage, [], optax.sgd(0.1))
