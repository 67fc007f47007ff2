"""The pure step against hand-written loops, and everything that plugs into it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training_helpers import CLASSES, ArrayIterator, TinyConv, TinyMLP, arrays, digest

from cnnjax import ops, training
from cnnjax.training import Hooks, StepConfig


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


def test_dropout_follows_seed_and_step_only():
    tx = optax.sgd(0.1)

    def run(seed, steps):
        network, state = training.create_state(TinyConv(rngs=nnx.Rngs(1)), tx, seed=seed)
        step = training.make_train_step(network, tx)
        for _ in range(steps):
            state, metrics = step(state, _batch())
        return state, float(metrics["loss"])

    a, loss_a = run(0, 2)
    b, loss_b = run(0, 2)
    _, loss_c = run(1, 2)
    assert digest(a.params) == digest(b.params)
    assert loss_a == loss_b != loss_c
    # the same batch and parameters at another step draw another mask
    network, state = training.create_state(TinyConv(rngs=nnx.Rngs(1)), optax.sgd(0.0))
    step = training.make_train_step(network, optax.sgd(0.0))
    losses = []
    for _ in range(3):
        state, metrics = step(state, _batch())
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_equals_the_large_batch(weighted):
    # without BatchNorm and dropout, microbatches must add up to the whole batch
    tx = optax.sgd(0.1, momentum=0.9)
    batch = _batch(24)
    if weighted:
        batch["weight"] = np.r_[np.ones(13), np.zeros(11)].astype(np.float32)
    results = []
    for n in (1, 3):
        network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), tx)
        step = training.make_train_step(network, tx, config=StepConfig(accumulate=n))
        for _ in range(3):
            state, metrics = step(state, batch)
        results.append((state.params, metrics))
    _close(results[0], results[1], 2e-6)


def test_multi_steps_equals_the_large_batch():
    whole = _batch(32)
    halves = [{k: v[i::2] for k, v in whole.items()} for i in range(2)]
    config = training.OptimizerConfig(multi_steps=2, weight_decay=1e-2)
    out = []
    for cfg, batches in ((config, halves), (training.OptimizerConfig(weight_decay=1e-2), [whole])):
        tx = training.build_optimizer(cfg, 0.1)
        network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), tx)
        step = training.make_train_step(network, tx)
        for b in batches * 2:
            state, _ = step(state, b)
        out.append(state.params)
    _close(out[0], out[1])


def test_steps_per_call_equals_single_steps():
    tx = optax.sgd(0.1, momentum=0.9)
    data = ArrayIterator(arrays(), 16)
    batches = [next(data) for _ in range(4)]
    network, state = training.create_state(TinyConv(rngs=nnx.Rngs(0)), tx)
    step = training.make_train_step(network, tx)
    losses = []
    for b in batches:
        state, metrics = step(state, b)
        losses.append(metrics["loss"])
    network, many = training.create_state(TinyConv(rngs=nnx.Rngs(0)), tx)
    step = training.make_train_step(network, tx, config=StepConfig(steps_per_call=4))
    stacked = jax.tree.map(lambda *a: np.stack(a), *batches)
    many, metrics = step(many, stacked)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    _close(many.params, state.params, 1e-5)
    _close(many.stats, state.stats, 1e-5)


@pytest.mark.parametrize("mode", ["convs", "full"])
def test_remat_same_gradient_fewer_residuals(mode):
    from cnnjax.training.step import Context, make_loss

    network, params, stats = training.split_network(TinyConv(rngs=nnx.Rngs(0)))
    context = Context(jnp.zeros((), jnp.int32), jax.random.key(0), None, None)
    batch = _batch(8)

    def grads_and_residuals(remat):
        loss = make_loss(network, StepConfig(remat=remat), Hooks())

        def f(p):
            return loss(p, stats, batch, context)[0]

        saved = jax.eval_shape(lambda p: jax.vjp(f, p)[1], params)
        size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(saved))
        return jax.jit(jax.grad(f))(params), size

    plain, plain_size = grads_and_residuals("none")
    again, size = grads_and_residuals(mode)
    _close(plain, again, 1e-5)
    assert size < 0.7 * plain_size


def test_remat_of_convs_keeps_our_own_forms_too():
    from cnnjax.training.step import _remat

    kernels = [jnp.ones((3, 3, 1, 8)), jnp.ones((1, 1, 8, 8)), jnp.ones((3, 3, 8, 8))]
    x = jnp.ones((2, 2, 2, 8))

    def loss(kernels, x):
        x = jnp.sin(ops.conv(x, kernels[0], groups=8))
        x = jnp.sin(ops.conv(x, kernels[1]))
        return jnp.sin(ops.conv(x, kernels[2])).sum()

    def forwards(mode):
        text = str(jax.make_jaxpr(jax.grad(_remat(loss, mode)))(kernels, x))
        return [text.count(f"{name}[") for name in ops.FORWARD_PRIMITIVES]

    depthwise, _, pointwise, dense = forwards("convs")
    assert (depthwise, pointwise, dense) == (1, 1, 1)
    assert forwards("full")[0] == 2  # computed again


def test_ema_against_numpy():
    tx = optax.sgd(0.5)
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), tx, ema=True)
    config = StepConfig(ema_decay=0.3)
    step = training.make_train_step(network, tx, config=config)
    mean = jax.device_get(state.params)
    for t in range(4):
        state, _ = step(state, _batch(seed=t))
        decay = min(0.3, (1 + t) / (10 + t))
        mean = jax.tree.map(
            lambda m, p, d=decay: d * m + (1 - d) * np.asarray(p), mean, state.params
        )
    _close(state.ema["params"], mean)
    model = training.state_to_model(network, state, ema=True)
    np.testing.assert_allclose(model.first.kernel[...], mean["first"]["kernel"], rtol=1e-5)


def test_ema_needs_both_halves():
    tx = optax.sgd(0.5)
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), tx)
    step = training.make_train_step(network, tx, config=StepConfig(ema_decay=0.9))
    with pytest.raises(ValueError, match="ema=True"):
        step(state, _batch())
    with pytest.raises(ValueError, match="no moving averages"):
        training.averaged(state)


def test_bfloat16_compute_keeps_float32_state():
    tx = optax.sgd(0.1)
    seen = []

    def loss(model, batch, context):
        logits = model(batch["image"])
        seen.append((logits.dtype, batch["image"].dtype, context.params["conv"]["kernel"].dtype))
        return training.classification_loss()(model, batch, context)

    hooks = Hooks(loss=loss)
    out = {}
    for dtype in (None, "bfloat16"):
        network, state = training.create_state(TinyConv(rngs=nnx.Rngs(0), dropout=0.0), tx)
        step = training.make_train_step(
            network, tx, config=StepConfig(compute_dtype=dtype), hooks=hooks
        )
        state, metrics = step(state, _batch(64))
        out[dtype] = float(metrics["loss"])
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.params, state.stats)))
    assert seen[0] == (jnp.float32,) * 3
    assert seen[1] == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert out[None] != out["bfloat16"]
    assert out["bfloat16"] == pytest.approx(out[None], rel=0.02)


def test_auxiliary_classifiers():
    class Two(nnx.Module):
        def __init__(self):
            self.main = TinyMLP(rngs=nnx.Rngs(0))

        def __call__(self, x, *, aux=False):
            logits = self.main(x)
            return (logits, 2.0 * logits, logits) if aux else logits

    network, state = training.create_state(Two(), optax.sgd(0.1))
    batch = _batch()
    logits = np.asarray(training.state_to_model(network, state)(batch["image"]))
    plain, twice = (
        np.mean(training.softmax_cross_entropy(z, batch["label"])) for z in (logits, 2 * logits)
    )
    hooks = Hooks(loss=training.classification_loss(auxiliary=0.3))
    _, metrics = training.make_train_step(network, optax.sgd(0.1), hooks=hooks)(state, batch)
    np.testing.assert_allclose(metrics["loss"], 1.3 * plain + 0.3 * twice, rtol=1e-5)


def test_penalty_and_gradient_clipping():
    # oracle: with a zero loss, SGD on lam/2 |w|^2 shrinks every parameter by 1 - lr * lam
    tx = optax.sgd(0.1)

    def zero(model, batch, context):
        return 0.0 * jnp.sum(model(batch["image"])), {}

    def l2(params, context):
        return 0.5 * 0.2 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), tx)
    before = jax.device_get(state.params)
    step = training.make_train_step(network, tx, hooks=Hooks(loss=zero, penalty=l2))
    state, metrics = step(state, _batch())
    _close(state.params, jax.tree.map(lambda p: p * (1 - 0.1 * 0.2), before))
    assert metrics["loss"] == metrics["penalty"] > 0


def test_reparam_gates_with_extra_trainables_and_noise():
    # trained: {"net": ..., "gate": ...}; the network sees kernel * gate; noise from the key
    tx = optax.sgd(0.1)
    model = TinyMLP(rngs=nnx.Rngs(0))
    _, params, _ = training.split_network(model)
    trained = {"net": params, "gate": jnp.ones(8)}
    keys = []

    def reparam(p, context):
        keys.append(context.key is None)
        gate = p["gate"]
        if context.train:
            gate = gate + 0.1 * jax.random.normal(context.key, gate.shape)
        net = dict(p["net"])
        net["first"] = {**net["first"], "kernel": net["first"]["kernel"] * gate}
        return net

    hooks = Hooks(reparam=reparam)
    network, state = training.create_state(model, tx, params=trained)
    step = training.make_train_step(network, tx, hooks=hooks)
    state, _ = step(state, _batch())
    assert not np.allclose(state.params["gate"], 1.0)
    evaluation = training.make_eval_step(network, hooks=hooks)
    zero = state.replace(params={**state.params, "gate": jnp.zeros(8)})
    sums = evaluation(zero, _batch())
    bias_only = jax.nn.relu(state.params["net"]["first"]["bias"])
    second = state.params["net"]["second"]
    logits = np.tile(bias_only @ second["kernel"] + second["bias"], (16, 1))
    expected = training.softmax_cross_entropy(logits, _batch()["label"]).sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
    assert keys == [False, True]


def test_prepare_constants_and_post_update():
    tx = optax.sgd(0.1)
    teacher = TinyMLP(rngs=nnx.Rngs(3), hidden=5)
    teacher_net, teacher_params, teacher_stats = training.split_network(teacher)

    def prepare(batch, key, train):
        return {**batch, "image": batch["image"] / 255.0}

    def loss(model, batch, context):
        target = teacher_net.model(*context.constants)(batch["image"])
        return jnp.mean((model(batch["image"]) - target) ** 2), {}

    def post_update(state, context, metrics):
        params = jax.tree.map(lambda p, m: p * m, state.params, state.extra["mask"])
        return state.replace(
            params=params, extra={**state.extra, "count": state.extra["count"] + 1}
        )

    model = TinyMLP(rngs=nnx.Rngs(0))
    _, params, _ = training.split_network(model)
    mask = jax.tree.map(lambda p: jnp.arange(p.size).reshape(p.shape) % 2 == 0, params)
    extra = {"mask": mask, "count": jnp.zeros((), jnp.int32)}
    network, state = training.create_state(model, tx, extra=extra)
    step = training.make_train_step(
        network,
        tx,
        hooks=Hooks(loss=loss, prepare=prepare, post_update=post_update),
        constants=(teacher_params, teacher_stats),
    )
    batch = {**_batch(), "image": (_batch()["image"] * 255).astype(np.int16)}
    x = batch["image"] / np.float32(255)
    expected = np.mean((np.asarray(model(x)) - np.asarray(teacher(x))) ** 2)
    state, metrics = step(state, batch)
    state, _ = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    assert int(state.extra["count"]) == 2
    for p, m in zip(jax.tree.leaves(state.params), jax.tree.leaves(mask), strict=True):
        assert np.all(np.asarray(p)[~np.asarray(m)] == 0)
    # the teacher survives the donated steps
    assert np.all(np.isfinite(jax.tree.leaves(teacher_params)[0]))


def test_optimizer_gets_extra_arguments():
    def update(updates, state, params=None, *, value, key, extra, **_):
        del key
        return jax.tree.map(lambda p: -p * extra, params), state + value

    tx = optax.GradientTransformationExtraArgs(lambda p: jnp.zeros(()), update)
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), tx, extra=jnp.ones(()))
    step = training.make_train_step(network, tx)
    state, metrics = step(state, _batch())
    assert float(state.opt_state) == float(metrics["loss"])
    assert not any(np.any(p) for p in jax.tree.leaves(state.params))


def test_optimizer_state_that_keeps_parameters_can_be_donated():
    # such a state shares no buffer with the parameters, so both can be donated
    tx = optax.GradientTransformation(lambda p: p, lambda u, s, p=None: (u, s))
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), tx)
    step = training.make_train_step(network, tx)
    state, _ = step(state, _batch())
    state, _ = step(state, _batch())
    assert int(state.step) == 2


def test_modes_and_intermediate_values():
    class Sower(nnx.Module):
        def __init__(self):
            self.deterministic = False
            self.inner = TinyMLP(rngs=nnx.Rngs(0))

        def __call__(self, x):
            y = self.inner(x)
            self.seen = nnx.Intermediate(y)
            return y if self.deterministic else 2 * y

    model = Sower()
    network, params, stats = training.split_network(model)
    assert stats == {}
    x = _batch()["image"]
    train, test = (network.model(params, stats, train=t)(x) for t in (True, False))
    np.testing.assert_allclose(train, 2 * test, rtol=1e-6)
    assert model.deterministic is False
    tx = optax.sgd(0.1)
    network, state = training.create_state(model, tx)
    state, _ = training.make_train_step(network, tx)(state, _batch())
    assert state.stats == {}


def test_abstract_network():
    model = nnx.eval_shape(lambda: TinyConv(rngs=nnx.Rngs(0)))
    network, params, stats = training.split_network(model)
    assert params["conv"]["kernel"].shape == (3, 3, 1, CLASSES - 1)
    assert set(stats) == {"norm", "norm2"}
    assert len(jax.tree.leaves(network.rngs)) == 2


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"accumulate": 0}, "accumulate"),
        ({"steps_per_call": 0}, "steps_per_call"),
        ({"remat": "some"}, "convs"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"compute_dtype": "int8"}, "float type"),
    ],
)
def test_bad_step_config(fields, match):
    with pytest.raises(ValueError, match=match):
        StepConfig(**fields)


def test_bad_networks_and_batches():
    with pytest.raises(TypeError, match="Module"):
        training.split_network(object())
    with pytest.raises(ValueError, match="no parameters"):
        training.split_network(nnx.Dropout(0.1, rngs=nnx.Rngs(0)))
    tx = optax.sgd(0.1)
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), tx)
    step = training.make_train_step(network, tx, config=StepConfig(accumulate=5))
    with pytest.raises(ValueError, match="16 does not divide into 5"):
        step(state, _batch())
