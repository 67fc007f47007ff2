"""The pure step against hand-written loops, and everything that plugs into it."""

from __future__ import annotations

import jax
import numpy as np
import optax
from flax import nnx
from training_helpers import ArrayIterator, TinyConv, TinyMLP, arrays

from cnnjax import training


def _batch(n=16, seed=0):
    return {k: v[:n] for k, v in arrays(seed=seed).items()}


def _close(a, b, tol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b)


def test_step_equals_a_plain_nnx_loop():
    # oracle: the way the Flax documentation trains, on the module itself
    model = TinyConv(rngs=nnx.Rngs(0), dropout=0.0)
    tx = optax.sgd(0.1, momentum=0.9)
    network, state = training.create_state(model, tx)
    step = training.make_train_step(network, tx)
    reference = training.set_mode(model, train=True)
    optimizer = nnx.Optimizer(reference, tx, wrt=nnx.Param)

    def loss_fn(m, batch):
        logits = m(batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean()

    @nnx.jit
    def plain(m, opt, batch):
        loss, grads = nnx.value_and_grad(loss_fn)(m, batch)
        opt.update(m, grads)
        return loss

    data = ArrayIterator(arrays(), 16)
    for _ in range(4):
        batch = next(data)
        expected = plain(reference, optimizer, batch)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    _close(state.params, nnx.to_pure_dict(nnx.state(reference, nnx.Param)), 1e-5)
    _close(state.stats, nnx.to_pure_dict(nnx.state(reference, nnx.BatchStat)), 1e-5)
    assert int(state.step) == 4


def test_model_is_untouched_by_donation():
    model = TinyMLP(rngs=nnx.Rngs(0))
    before = np.array(model.first.kernel[...])
    tx = optax.sgd(0.1)
    network, state = training.create_state(model, tx)
    step = training.make_train_step(network, tx)
    state, _ = step(state, _batch())
    np.testing.assert_array_equal(model.first.kernel[...], before)
    trained = training.state_to_model(network, state)
    state, _ = step(state, _batch())
    assert np.all(np.isfinite(trained(_batch()["image"])))
    assert not np.array_equal(trained.first.kernel[...], before)
