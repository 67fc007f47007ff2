"""Taps, teachers, cached targets and the assembled loss, against numpy and separate forwards."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cnnjax import data, training
from cnnjax import distillation as D

CLASSES = 3


class Net(nnx.Module):
    """Two convolutions and a dense layer."""

    def __init__(self, width, classes=CLASSES, *, rngs):
        self.conv1 = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.conv2(x))
        return self.head(x.mean((1, 2)))


def net(width, seed=0, classes=CLASSES):
    """Random values without compiling an initializer."""
    abstract = nnx.eval_shape(lambda: Net(width, classes, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(abstract)
    state = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.5, a.dtype), state)
    return nnx.merge(graphdef, state)


X = np.random.default_rng(7).random((6, 8, 8, 1)).astype(np.float32)
Y = np.arange(6, dtype=np.int32) % CLASSES
EXAMPLE = jax.ShapeDtypeStruct(X.shape, X.dtype)


def forward(model, x):
    """Logits, first map after its ReLU and second before, in numpy: no code of the package."""
    p = {k: np.asarray(v, np.float64) for k, v in _leaves(model).items()}

    def conv(x, w, b, stride):
        pads = ((0, 0), (1, 1), (1, 1), (0, 0)) if stride == 1 else ((0, 0), (0, 1), (0, 1), (0, 0))
        x = np.pad(x, pads)
        out = (x.shape[1] - 3) // stride + 1
        cols = [
            x[:, i : i + out * stride : stride, j : j + out * stride : stride] @ w[i, j]
            for i in range(3)
            for j in range(3)
        ]
        return sum(cols) + b

    first = np.maximum(conv(x.astype(np.float64), p["conv1/kernel"], p["conv1/bias"], 1), 0)
    second = conv(first, p["conv2/kernel"], p["conv2/bias"], 2)
    return np.maximum(second, 0).mean((1, 2)) @ p["head/kernel"] + p["head/bias"], first, second


def _leaves(model):
    from cnnjax import tree

    return tree.flatten(nnx.to_pure_dict(nnx.state(model)))


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def context(step=0, constants=None):
    return training.Context(jnp.asarray(step), jax.random.key(0), None, None, constants)


def value_of(loss, model, batch, constants, step=0):
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state, batch, constants, step):
        m = nnx.merge(graphdef, state, copy=True)
        return loss(m, batch, context(step, constants))

    with jax.default_matmul_precision("highest"):
        return call(state, batch, constants, step)


FULL = D.DistillConfig(
    hard=0.3,
    soft_weight=0.7,
    soft_weight_end=0.1,
    temperature=3.0,
    hint_weight=0.5,
    hints=(("conv2", "conv2"),),
    hint_activation="none",
    attention_beta=2.0,
    attention=(("conv2:input", "conv2:input"),),
    fsp_weight=0.2,
    fsp=(("conv2:input", "conv2:input", "conv2:input", "conv2:input"),),
)


@pytest.mark.method("kd_soft_targets")
@pytest.mark.method("hint_training")
@pytest.mark.method("attention_transfer_activation")
@pytest.mark.method("fsp_matrix")
def test_assembled_loss_equals_numpy():
    student, teacher = net(4, 1), net(4, 2)
    plan = D.plan_distillation(FULL, student, teacher, EXAMPLE)
    assert plan.student_taps == ("conv2", "conv2:input")
    guide = D.Teacher(teacher)
    loss = D.distillation_loss(plan, guide, total_steps=11)
    batch = {"image": X, "label": Y}
    z, f1, f2 = forward(student, X)
    v, t1, t2 = forward(teacher, X)
    hard = -log_softmax(z)[np.arange(6), Y].mean()
    p = np.exp(log_softmax(v / 3))
    soft = 9 * (p * (log_softmax(v / 3) - log_softmax(z / 3))).sum(-1).mean()
    hint = 0.5 * ((f2 - t2) ** 2).sum((1, 2, 3)).mean()

    def unit(f):
        q = (f**2).sum(-1).reshape(6, -1)
        return q / np.linalg.norm(q, axis=-1, keepdims=True)

    attention = 0.5 * ((unit(f1) - unit(t1)) ** 2).mean()
    gram = lambda f: np.einsum("nhwi,nhwj->nij", f, f) / 64  # noqa: E731
    fsp = ((gram(f1) - gram(t1)) ** 2).sum((1, 2)).mean()
    for step, share in ((0, 0.7), (5, 0.4), (10, 0.1)):
        total, metrics = value_of(loss, student, batch, {"teacher": guide.constants}, step)
        expected = 0.3 * hard + share * soft + 0.5 * hint + 2.0 * attention + 0.2 * fsp
        assert float(total) == pytest.approx(expected, rel=2e-5)
    want = {"hard": hard, "soft": soft, "hint": hint, "attention": attention, "fsp": fsp}
    for name, number in want.items():
        assert float(metrics[name]) == pytest.approx(number, rel=5e-5), name
    assert float(metrics["accuracy"]) == pytest.approx((z.argmax(-1) == Y).mean())


def test_soft_weight_rises_from_nothing():
    student, teacher = net(4, 1), net(4, 2)
    config = D.DistillConfig(hard=1.0, soft="dkd", soft_weight=0.8, soft_warmup=0.25)
    guide = D.Teacher(teacher)
    loss = D.distillation_loss(config, guide, total_steps=40)
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (39, 1.0)):
        batch = {"image": X, "label": Y}
        total, terms = value_of(loss, student, batch, {"teacher": guide.constants}, step)
        expected = float(terms["hard"]) + share * 0.8 * float(terms["soft"])
        assert float(total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.method("teacher_student_pipeline")
def test_identical_networks_cost_nothing_and_teachers_carry_no_gradient():
    model = net(4, 3)
    config = dataclasses.replace(FULL, hard=0.0, soft_weight_end=None)
    plan = D.plan_distillation(config, model, model, EXAMPLE)
    guide = D.Teacher(model)
    loss = D.distillation_loss(plan, guide)
    batch = {"image": X, "label": Y}
    total, metrics = value_of(loss, model, batch, {"teacher": guide.constants})
    assert abs(float(total)) < 1e-6
    assert {"soft", "hint", "attention", "fsp"} <= set(metrics)
    student = net(4, 4)
    graphdef, state = nnx.split(student)

    @jax.jit
    def gradients(state, constants, labels):
        def f(state, constants):
            m = nnx.merge(graphdef, state, copy=True)
            ctx = context(0, {"teacher": constants})
            return loss(m, {"image": X, "label": labels}, ctx)[0]

        return jax.grad(f, argnums=(0, 1))(state, constants)

    own, theirs = gradients(state, guide.constants, Y)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(theirs))
    # without the hard term labels can't matter
    other, _ = gradients(state, guide.constants, Y[::-1].copy())
    assert any(np.asarray(g).any() for g in jax.tree.leaves(own))
    jax.tree.map(np.testing.assert_array_equal, own, other)


@pytest.mark.method("hint_training")
def test_first_stage_trains_up_to_the_guided_layer_and_drops_the_regressor():
    student, teacher = net(2, 1), net(4, 2)
    config = D.DistillConfig(
        hard=1.0, hint_weight=1.0, hints=(("conv1", "conv2"),), attention_beta=1.0,
        attention=(("conv1", "conv1"),),
    )  # fmt: skip
    first, second = config.stage_one(), config.stage_two()
    assert (first.hard, first.soft, first.attention_beta) == (0, "none", 0)
    assert (second.hint_weight, second.attention_beta, second.soft) == (0, 1, "kd")
    plan = D.plan_distillation(first, student, teacher, EXAMPLE)
    adapters = plan.adapters(nnx.Rngs(0))
    assert list(adapters) == ["conv1--conv2"]
    assert plan.adapters(nnx.Rngs(0))["conv1--conv2"].conv.kernel.shape == (5, 5, 2, 4)
    guide = D.Teacher(teacher)
    tx = optax.adam(1e-2)
    network, state = training.create_state(D.WithAdapters(student, adapters), tx)
    before = jax.device_get(state.params)
    step = training.make_train_step(
        network,
        tx,
        hooks=training.Hooks(loss=D.distillation_loss(plan, guide)),
        constants={"teacher": guide.constants},
    )
    losses = []
    for _ in range(30):
        state, metrics = step(state, {"image": X, "label": Y})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.75 * losses[0]
    after = jax.device_get(state.params)
    for name, moved in (("conv1", True), ("conv2", False), ("head", False)):
        same = np.array_equal(before["student"][name]["kernel"], after["student"][name]["kernel"])
        assert same != moved, name
    trained = training.state_to_model(network, state)
    np.testing.assert_allclose(trained.student(X), trained(X))
    assert sorted(_leaves(trained.student)) == sorted(_leaves(student))


@pytest.mark.method("teacher_ensemble")
def test_ensembles():
    a, b = net(4, 1), net(2, 2)
    v, w = forward(a, X)[0], forward(b, X)[0]

    def logits(*models, **options):
        guide = D.Teacher(models, **options)
        return np.asarray(jax.jit(lambda c, x: guide(c, x).logits)(guide.constants, X))

    np.testing.assert_allclose(logits(a), v, atol=1e-5)
    np.testing.assert_allclose(logits(a, a), v, atol=1e-5)
    np.testing.assert_allclose(logits(a, b), (v + w) / 2, atol=1e-5)
    np.testing.assert_allclose(logits(a, b, weights=(3.0, 1.0)), (3 * v + w) / 4, atol=1e-5)
    mean = (np.exp(log_softmax(v / 2)) + np.exp(log_softmax(w / 2))) / 2
    got = logits(a, b, mode="arithmetic", temperature=2.0)
    np.testing.assert_allclose(np.exp(log_softmax(got / 2)), mean, atol=1e-5)
    assert D.Teacher(a).fingerprint() == D.Teacher(net(4, 1)).fingerprint()
    assert D.Teacher(a).fingerprint() != D.Teacher(net(4, 2)).fingerprint()
    with pytest.raises(ValueError, match="at least one"):
        D.Teacher([])
    with pytest.raises(ValueError, match="2 weights for 1"):
        D.Teacher(a, weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="different numbers of classes"):
        D.Teacher([a, net(4, classes=4)]).classes(EXAMPLE)


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    data.info("digits", folder)
    return folder


@functools.cache
def ten():
    return net(4, 5, classes=10)


def stream(digits_dir, seed=1, **augment):
    return data.loader(
        "digits", "train", batch_size=32, train=True, seed=seed, workers=0,
        augment=data.Augment(**{"pad": 1, **augment}), data_dir=digits_dir,
    )  # fmt: skip


@pytest.mark.method("teacher_student_pipeline")
def test_cached_targets_belong_to_the_augmented_images(digits_dir, tmp_path):
    guide = D.Teacher(ten(), taps=("conv2",))
    cache = D.cache_stream(guide, stream(digits_dir), 3)
    cache.save(tmp_path / "targets")
    loaded = D.load_cache(tmp_path / "targets")
    assert cache.nbytes == loaded.nbytes == 3 * 32 * 10 * 4 + 3 * 32 * 4 * 4 * 4 * 4
    assert isinstance(loaded.logits, np.memmap)
    with D_stream(stream(digits_dir), loaded, guide) as batches:
        position = batches.get_state()
        student = net(4, 6, classes=10)
        config = D.DistillConfig(hint_weight=0.1, hints=(("conv2", "conv2"),))
        plan = D.plan_distillation(config, student, ten(), EXAMPLE)
        online = D.distillation_loss(plan, guide)
        offline = D.distillation_loss(plan)
        for _ in range(2):
            batch = next(batches)
            want = forward(ten(), batch["image"])
            np.testing.assert_allclose(batch["teacher_logits"], want[0], atol=1e-4)
            np.testing.assert_allclose(batch["teacher_feature/conv2"], want[2], atol=1e-4)
        plain = {k: batch[k] for k in ("image", "label")}
        a, _ = value_of(online, student, plain, {"teacher": guide.constants})
        b, _ = value_of(offline, student, batch, None)
        assert float(a) == pytest.approx(float(b), rel=1e-6)
        next(batches)
        with pytest.raises(ValueError, match="3 were cached"):
            next(batches)
        batches.set_state(position)  # resumes exactly
        np.testing.assert_array_equal(next(batches)["teacher_logits"], cache.logits[0])
    resident = cache.on_device()
    assert isinstance(resident.logits, jax.Array)
    with D_stream(stream(digits_dir), resident, guide) as batches:
        for number in range(3):
            batch = next(batches)
            for key, values in (
                ("teacher_logits", cache.logits),
                ("teacher_feature/conv2", cache.features["conv2"]),
            ):
                assert isinstance(batch[key], jax.Array)
                np.testing.assert_array_equal(batch[key], values[number])


class D_stream:
    """Closes the loader behind a cached stream."""

    def __init__(self, *args):
        self.stream = D.CachedStream(args[0], args[1], teacher=args[2])

    def __enter__(self):
        return self.stream

    def __exit__(self, *_):
        self.stream.close()


@pytest.mark.method("teacher_student_pipeline")
def test_caches_for_other_data_or_teachers_are_refused(digits_dir, tmp_path):
    guide = D.Teacher(ten())
    cache = D.cache_stream(guide, stream(digits_dir), 1)
    with pytest.raises(ValueError, match=r"other data: seed 1 \(here 2\)"):
        D.CachedStream(stream(digits_dir, seed=2), cache)
    with pytest.raises(ValueError, match="other data: first_batch"):
        D.CachedStream(stream(digits_dir, pad=2, size=8), cache)
    with pytest.raises(ValueError, match="another teacher"):
        D.CachedStream(stream(digits_dir), cache, teacher=D.Teacher(net(4, 9, classes=10)))
    changed = dataclasses.replace(cache, checks=cache.checks + 1)
    with pytest.raises(ValueError, match="batch 0 differs"):
        next(D.CachedStream(stream(digits_dir), changed))
    cache.save(tmp_path / "c")
    text = (tmp_path / "c" / "cache.json").read_text()
    (tmp_path / "c" / "cache.json").write_text(text.replace('"seed": 1', '"seed": 2'))
    with pytest.raises(ValueError, match="changed by hand"):
        D.load_cache(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="no target cache"):
        D.load_cache(tmp_path / "nothing")


@pytest.mark.method("teacher_student_pipeline")
def test_targets_by_example():
    guide = D.Teacher(net(4, 5))
    cache = D.cache_examples(guide, X, batch_size=4)
    numbers = np.array([4, 1])
    keys = D.lookup(cache, X[numbers], numbers)
    np.testing.assert_allclose(keys["teacher_logits"], forward(net(4, 5), X[[4, 1]])[0], atol=1e-5)
    with pytest.raises(ValueError, match="example 4 is another image"):
        D.lookup(cache, X[numbers][::-1], numbers)
    with pytest.raises(ValueError, match="cached 0..5"):
        D.lookup(cache, X[:1], np.array([6]))


def test_bad_input():
    student, teacher = net(2, 1), net(4, 2)
    with pytest.raises(ValueError, match="temperature is 0"):
        D.DistillConfig(temperature=0.0)
    with pytest.raises(ValueError, match="Did you mean 'dkd'"):
        D.DistillConfig(soft="dkdd")
    with pytest.raises(ValueError, match="give both or none"):
        D.DistillConfig(hint_weight=1.0)
    with pytest.raises(ValueError, match="nothing to learn"):
        D.DistillConfig(hard=0.0, soft="none")
    with pytest.raises(ValueError, match="names 4 layers"):
        D.DistillConfig(fsp_weight=1.0, fsp=(("a", "b"),))
    with pytest.raises(ValueError, match="soft_weight_end needs total_steps"):
        D.distillation_loss(D.DistillConfig(soft_weight_end=0.0))
    with pytest.raises(ValueError, match="soft_warmup needs total_steps"):
        D.distillation_loss(D.DistillConfig(soft_warmup=0.1))
    with pytest.raises(ValueError, match="soft_warmup is 20"):
        D.DistillConfig(soft_warmup=20.0)

    def hints(*pairs):
        return D.DistillConfig(hint_weight=1.0, hints=pairs)

    with pytest.raises(ValueError, match="student: module 'convs' matches nothing"):
        D.plan_distillation(hints(("convs", "conv1")), student, teacher, EXAMPLE)
    with pytest.raises(ValueError, match="teacher: tap 'conv\\*' matches 2 layers"):
        D.plan_distillation(hints(("conv1", "conv*")), student, teacher, EXAMPLE)
    with pytest.raises(ValueError, match="unknown side 'in'"):
        D.plan_distillation(hints(("conv1:in", "conv1")), student, teacher, EXAMPLE)
    with pytest.raises(ValueError, match="resolve the layers"):
        D.distillation_loss(hints(("conv1", "conv1")))
    plan = D.plan_distillation(hints(("conv2", "conv1")), student, teacher, EXAMPLE)
    with pytest.raises(ValueError, match="larger map to the smaller"):
        plan.adapters(nnx.Rngs(0))
    guide = D.Teacher(teacher)
    plan = D.plan_distillation(hints(("conv1", "conv1")), student, teacher, EXAMPLE)
    batch = {"image": X, "label": Y}
    with pytest.raises(ValueError, match="an adapter is needed"):
        value_of(D.distillation_loss(plan, guide), student, batch, {"teacher": guide.constants})
    with pytest.raises(ValueError, match="no teacher"):
        value_of(D.distillation_loss(D.DistillConfig()), student, batch, None)
    with pytest.raises(ValueError, match="drop_remainder"):
        value_of(D.distillation_loss(plan, guide), student, {**batch, "weight": np.ones(6)}, None)
    other = D.Teacher(net(4, 2, classes=4))
    with pytest.raises(ValueError, match="has 3 classes, the teacher 4"):
        D.check_classes(student, other, EXAMPLE)
    loss = D.distillation_loss(D.DistillConfig(), other)
    with pytest.raises(ValueError, match="same classes in the same order"):
        value_of(loss, student, batch, {"teacher": other.constants})
