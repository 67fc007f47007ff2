"""Evaluation against numpy, padding, moving averages, and BatchNorm recalibration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training_helpers import CLASSES, ArrayIterator, TinyConv, TinyMLP, arrays

from cnnjax import training


def _log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_cross_entropy_forms_against_numpy():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(7, 5)).astype(np.float32) * 4
    y = rng.integers(0, 5, 7)
    logp = _log_softmax(z.astype(np.float64))
    onehot = np.eye(5)[y]
    for smoothing in (0.0, 0.1):
        target = (1 - smoothing) * onehot + smoothing / 5
        expected = -(target * logp).sum(-1)
        for labels in (y, onehot):
            ours = training.softmax_cross_entropy(z, np.asarray(labels), label_smoothing=smoothing)
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
    soft = rng.dirichlet(np.ones(5), 7)
    np.testing.assert_allclose(
        training.softmax_cross_entropy(z, soft), -(soft * logp).sum(-1), rtol=1e-5
    )
    with pytest.raises(ValueError, match="fit neither"):
        training.softmax_cross_entropy(z, np.zeros((7, 4)))
    with pytest.raises(ValueError, match="label_smoothing"):
        training.softmax_cross_entropy(z, y, label_smoothing=1.0)


def test_label_rank_ties_and_nan():
    z = np.array([[1, 1, 0.0], [3, 2, 1], [np.nan, 0, 1], [0, 0, 0], [np.inf, 0, 1]], np.float32)
    y = np.array([1, 0, 2, 0, 0])
    rank = np.asarray(training.label_rank(z, y))
    assert rank.tolist() == [1, 0, 3, 0, 0]
    # the same as arg-max wherever the row is a number
    rng = np.random.default_rng(0)
    z = rng.integers(0, 3, (50, 6)).astype(np.float32)
    y = rng.integers(0, 6, 50)
    rank = np.asarray(training.label_rank(z, y))
    np.testing.assert_array_equal(rank == 0, z.argmax(-1) == y)
    order = np.argsort(-z, axis=-1, kind="stable")
    np.testing.assert_array_equal(rank, [list(o).index(t) for o, t in zip(order, y, strict=True)])


def test_evaluate_is_exact_with_padding():
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), optax.sgd(0.1))
    data = arrays(37)
    step = training.make_eval_step(network)
    batches = [{k: v[i : i + 16] for k, v in data.items()} for i in (0, 16, 32)]
    padded = [training.pad_batch(b, 16) for b in batches]
    assert padded[2]["image"].shape == (16, 6, 6, 1)
    # what stands in the padding must not matter
    padded[2]["image"][5:] = np.inf
    ours = training.evaluate(step, state, padded)
    logits = np.asarray(training.state_to_model(network, state)(data["image"]), np.float64)
    loss = -_log_softmax(logits)[np.arange(37), data["label"]].mean()
    assert ours["count"] == 37
    assert ours["loss"] == pytest.approx(loss, rel=1e-5)
    assert ours["top1"] == (logits.argmax(-1) == data["label"]).sum() / 37
    assert ours["top5"] == 1.0
    with pytest.raises(ValueError, match="nothing to evaluate"):
        training.evaluate(step, state, [])
    with pytest.raises(ValueError, match="cannot be padded"):
        training.pad_batch(data, 16)


def test_evaluate_moving_averages_and_reset():
    tx = optax.sgd(0.1)
    network, state = training.create_state(TinyConv(rngs=nnx.Rngs(0)), tx, ema=True)
    shifted = jax.tree.map(lambda x: x * 1.5, state.ema)
    state = state.replace(ema=shifted)

    class Data(list):
        resets = 0

        def reset(self):
            self.resets += 1

    batches = Data([arrays(16)])
    ours = training.evaluate(training.make_eval_step(network, ema=True), state, batches)
    model = network.model(shifted["params"], shifted["stats"])
    logits = np.asarray(model(arrays(16)["image"]))
    loss = -_log_softmax(logits)[np.arange(16), arrays(16)["label"]].mean()
    assert ours["loss"] == pytest.approx(loss, rel=1e-5)
    assert batches.resets == 1


def test_predict_hook_and_bfloat16():
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), optax.sgd(0.1))
    batch = arrays(32)
    plain = training.make_eval_step(network)(state, batch)
    hook = training.make_eval_step(network, predict=lambda m, b: -m(b["image"]))(state, batch)
    assert hook["top1"] != plain["top1"]
    config = training.StepConfig(compute_dtype="bfloat16")
    half = training.make_eval_step(network, config=config)(state, batch)
    assert half["loss"] != plain["loss"]
    assert float(half["loss"]) == pytest.approx(float(plain["loss"]), rel=0.02)


@pytest.mark.method("bn_reestimate")
def test_recalibration_gives_the_statistics_of_the_data():
    model = TinyConv(rngs=nnx.Rngs(0), dropout=0.5)
    network, params, stats = training.split_network(model)
    data = arrays(48)["image"]
    sizes = (20, 20, 8)
    parts = np.split(data, np.cumsum(sizes)[:-1])
    ours = training.recalibrate_batchnorm(network, params, stats, parts)

    # oracle in numpy: first layer over all the data; second layer batch by batch, since its input
    # is normalized with the statistics of each batch
    def conv(x, w, b):
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        views = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        return np.einsum("nhwcij,ijco->nhwo", views, w) + b

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    first = conv(data.astype(np.float64), p["conv"]["kernel"], p["conv"]["bias"])
    np.testing.assert_allclose(ours["norm"]["mean"], first.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours["norm"]["var"], first.var((0, 1, 2)), rtol=1e-4)
    seconds = []
    for part in np.split(first, np.cumsum(sizes)[:-1]):
        z = (part - part.mean((0, 1, 2))) / np.sqrt(part.var((0, 1, 2)) + 1e-5)
        z = np.maximum(z * p["norm"]["scale"] + p["norm"]["bias"], 0)
        seconds.append(conv(z, p["conv2"]["kernel"], p["conv2"]["bias"]))
    second = np.concatenate(seconds)
    np.testing.assert_allclose(ours["norm2"]["mean"], second.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours["norm2"]["var"], second.var((0, 1, 2)), rtol=1e-4)
    assert float(stats["norm"]["mean"][0]) == 0.0


@pytest.mark.method("bn_reestimate")
def test_recalibration_forms_and_errors():
    network, params, stats = training.split_network(TinyConv(rngs=nnx.Rngs(0)))
    image = arrays(8)["image"]
    plain = training.recalibrate_batchnorm(network, params, stats, [image * 2])
    prepared = training.recalibrate_batchnorm(
        network,
        params,
        stats,
        [{"image": image}],
        prepare=lambda b, key, train: {"image": b["image"] * 2},
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, prepared)
    with pytest.raises(ValueError, match="at least one batch"):
        training.recalibrate_batchnorm(network, params, stats, [])
    mlp = training.split_network(TinyMLP(rngs=nnx.Rngs(0)))
    assert training.recalibrate_batchnorm(*mlp, [image]) == {}

    class Odd(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(1))
            self.seen = nnx.BatchStat(jnp.zeros(1))

        def __call__(self, x):
            return x * self.w[...]

    odd = training.split_network(Odd())
    with pytest.raises(ValueError, match="no numeric `momentum`|no numeric|momentum"):
        training.recalibrate_batchnorm(*odd, [image])


def test_training_learns():
    # 60 steps lift the accuracy far above the chance of 1 / 5
    tx = training.build_optimizer(training.OptimizerConfig("adam"), 0.01)
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0), hidden=16), tx)
    step = training.make_train_step(network, tx)
    data = ArrayIterator(arrays(480), 48)
    for _ in range(60):
        state, _ = step(state, next(data))
    result = training.evaluate(training.make_eval_step(network), state, [arrays(480, seed=5)])
    assert result["top1"] > 0.6 > 2 / CLASSES
