"""Optimizers and schedules against numpy transcriptions of their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import training
from cnnjax.training import OptimizerConfig, ScheduleConfig

W0 = {"a": {"kernel": np.array([1.0, -2.0, 0.5]), "bias": np.array([0.3, -0.1, 0.2])}}


def _grad(t):
    rng = np.random.default_rng(t)
    return jax.tree.map(lambda w: rng.normal(size=w.shape), W0)


def _run(config, rate=0.1, steps=4):
    tx = training.build_optimizer(config, rate)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), W0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(steps):
        grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), _grad(t))
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return jax.device_get(params)["a"]


def _reference(rule, decay=0.0, steps=4, decoupled=False, rate=0.1):
    """Runs ``rule(grad, memory, t) -> step`` per array, with weight decay on kernels."""
    out = {}
    for name, w in W0["a"].items():
        w, memory = w.copy(), {}
        lam = decay if name == "kernel" else 0.0
        for t in range(steps):
            g = _grad(t)["a"][name]
            if not decoupled:
                g = g + lam * w
            delta = rule(g, memory, t)
            w = w - delta - (rate * lam * w if decoupled else 0.0)
        out[name] = w
    return out


def _assert_same(ours, theirs):
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_decays_before_momentum(nesterov):
    def rule(g, memory, t):
        v = memory["v"] = 0.9 * memory.get("v", 0.0) + g
        return 0.1 * (g + 0.9 * v if nesterov else v)

    config = OptimizerConfig("sgd", momentum=0.9, nesterov=nesterov, weight_decay=0.05)
    _assert_same(_run(config), _reference(rule, 0.05))


def _adam_rule(g, memory, t):
    m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
    v = memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * g**2
    return 0.1 * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)


def test_adam_and_adamw():
    adam = OptimizerConfig("adam", weight_decay=0.05)
    _assert_same(_run(adam), _reference(_adam_rule, 0.05))
    adamw = OptimizerConfig("adamw", weight_decay=0.05)
    _assert_same(_run(adamw), _reference(_adam_rule, 0.05, decoupled=True))


def test_rmsprop_as_tensorflow_writes_it():
    # tf.raw_ops.ApplyRMSProp: ms starts at 1 in the reference MobileNet code; eps in the root;
    # mom = momentum * mom + lr * g / sqrt(ms + eps); w -= mom
    def rule(g, memory, t):
        ms = memory["ms"] = 0.9 * memory.get("ms", 1.0) + 0.1 * g**2
        mom = memory["mom"] = 0.9 * memory.get("mom", 0.0) + 0.1 * g / np.sqrt(ms + 1.0)
        return mom

    config = OptimizerConfig("rmsprop", decay=0.9, eps=1.0, momentum=0.9, weight_decay=0.05)
    _assert_same(_run(config), _reference(rule, 0.05))


def test_lars_scales_kernels_by_the_trust_ratio():
    # You et al. 2017 (1708.03888), eq. 5-6: local rate eta |w| / |g + lam w|, before momentum
    config = OptimizerConfig("lars", momentum=0.0, weight_decay=0.05)
    ours = _run(config, steps=1)
    w, g = W0["a"]["kernel"], _grad(0)["a"]["kernel"]
    g = g + 0.05 * w
    ratio = 0.001 * np.linalg.norm(w) / np.linalg.norm(g)
    np.testing.assert_allclose(ours["kernel"], w - 0.1 * ratio * g, rtol=1e-5)
    bias, g = W0["a"]["bias"], _grad(0)["a"]["bias"]
    np.testing.assert_allclose(ours["bias"], bias - 0.1 * g, rtol=1e-5)


def test_clipping():
    def by_norm(limit):
        g = _grad(0)["a"]
        norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
        return {k: W0["a"][k] - 0.1 * g[k] * min(1.0, limit / norm) for k in g}

    _assert_same(_run(OptimizerConfig(momentum=0.0, clip_norm=0.5), steps=1), by_norm(0.5))
    _assert_same(_run(OptimizerConfig(momentum=0.0, clip_norm=50.0), steps=1), by_norm(50.0))
    ours = _run(OptimizerConfig(momentum=0.0, clip_value=0.2), steps=1)
    _assert_same(
        ours, {k: W0["a"][k] - 0.1 * np.clip(g, -0.2, 0.2) for k, g in _grad(0)["a"].items()}
    )


def test_masks_and_frozen_parameters():
    config = OptimizerConfig(momentum=0.0, weight_decay=0.5, decay_exclude=("**/kernel",))
    ours = _run(config, steps=1)
    g = _grad(0)["a"]
    np.testing.assert_allclose(ours["kernel"], W0["a"]["kernel"] - 0.1 * g["kernel"], rtol=1e-5)
    bias = W0["a"]["bias"]
    np.testing.assert_allclose(ours["bias"], bias - 0.1 * (g["bias"] + 0.5 * bias), rtol=1e-5)
    ours = _run(OptimizerConfig(frozen=("a/bias",)))
    np.testing.assert_array_equal(ours["bias"], W0["a"]["bias"].astype(np.float32))
    assert not np.allclose(ours["kernel"], W0["a"]["kernel"])


def test_path_mask_strict_suggests():
    mask = training.path_mask("a/kernl", strict=True)
    with pytest.raises(ValueError, match="a/kernel"):
        mask(W0)
    assert training.path_mask("**/kernel")(W0) == {"a": {"kernel": True, "bias": False}}


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "polynomial", "step"])
def test_schedules_against_closed_forms(name):
    config = ScheduleConfig(
        name,
        base=0.4,
        warmup=2,
        final=0.1,
        power=2.0,
        boundaries=(5, 8) if name == "step" else (),
    )
    ours = training.build_schedule(config, total_steps=100, steps_per_epoch=10)
    for t in [0, 7, 19, 20, 21, 49, 50, 51, 79, 80, 99, 100, 130]:
        u = min(max((t - 20) / 80, 0.0), 1.0)
        factor = {
            "constant": 1.0,
            "cosine": 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * u)),
            "linear": 1 - 0.9 * u,
            "polynomial": 0.1 + 0.9 * (1 - u) ** 2,
            "step": 0.1 ** ((t >= 50) + (t >= 80)),
        }[name]
        if t < 20:
            factor = t / 20
        assert float(ours(t)) == pytest.approx(0.4 * factor, rel=1e-5, abs=1e-9)


def test_step_schedule_every_and_units():
    rate = training.build_schedule(
        ScheduleConfig("step", base=1.0, every=2.5, gamma=0.94), total_steps=100, steps_per_epoch=4
    )
    assert [float(rate(t)) for t in (9, 10, 20)] == pytest.approx([1.0, 0.94, 0.94**2])
    rate = training.build_schedule(
        ScheduleConfig("linear", base=1.0, unit="steps", warmup=4, warmup_start=0.5),
        total_steps=8,
    )
    assert [float(rate(t)) for t in (0, 2, 4, 6, 8)] == pytest.approx([0.5, 0.75, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ScheduleConfig("cosin"), "cosine"),
        (lambda: ScheduleConfig(unit="hours"), "epochs"),
        (lambda: ScheduleConfig("step"), "boundaries or every"),
        (lambda: ScheduleConfig("step", boundaries=(3, 2)), "rise"),
        (lambda: ScheduleConfig(warmup=-1), "negative"),
        (lambda: OptimizerConfig("sdg"), "sgd"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "weight_decay"),
        (lambda: OptimizerConfig(multi_steps=0), "multi_steps"),
        (
            lambda: training.build_schedule(ScheduleConfig(warmup=1), total_steps=10),
            "steps_per_epoch",
        ),
        (
            lambda: training.build_schedule(
                ScheduleConfig(warmup=20, unit="steps"), total_steps=10
            ),
            "outlasts",
        ),
        (lambda: training.build_schedule(ScheduleConfig(), total_steps=0), "total_steps"),
    ],
)
def test_bad_configurations(make, match):
    with pytest.raises(ValueError, match=match):
        make()
