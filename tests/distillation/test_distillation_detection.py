"""The assembled loss of a student detector against numpy and against plain training."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from cnnjax import detection, models, training
from cnnjax import distillation as D
from cnnjax.data.memory import MemoryLoader
from cnnjax.data.scenes import SceneConfig, digit_scenes

pytestmark = pytest.mark.method("detection_distillation")
HINTS = (("conv:input", "conv:input"),)
FULL = D.DetectionDistillConfig(mu=0.3, nu=0.5, margin=0.1, hint_weight=0.7, hints=HINTS)
EXAMPLE = jax.ShapeDtypeStruct((1, 16, 16, 1), np.float32)


@functools.cache
def detector(widths=(4, 6), seed=0, classes=3, **options):
    settings = {"sizes": (5.0, 8.0), "image_size": (16, 16), "feature": "layer2", **options}
    fields = {"in_channels": 1, "widths": widths, "blocks_per_stage": 1}
    return models.make_detector(
        "resnet20_cifar", num_classes=classes, fields=fields, rngs=nnx.Rngs(seed), **settings
    )


@pytest.fixture(scope="module")
def batch():
    config = SceneConfig(size=16, objects=(1, 2), scale=(6.0, 9.0), classes=3, clutter=1)
    return digit_scenes("train", 4, config=config)


def setting(config, batch, teacher_widths=(6, 8), *, student=None):
    """``(value and gradient)`` of a loss, and everything it is made of."""
    student = student or detector()
    teacher = detector(teacher_widths, seed=1)
    plan = D.plan_detection(config, student, teacher, EXAMPLE)
    guide = D.Teacher(teacher, taps=plan.teacher_taps)
    adapters = plan.adapters(nnx.Rngs(2))
    whole = D.WithAdapters(student, adapters) if adapters else student
    network, params, stats = training.split_network(whole)
    loss = D.detection_distillation_loss(plan, guide)

    @jax.jit
    def run(params, constants, batch):
        def scalar(params, constants):
            model = network.model(params, stats, train=True)
            context = training.Context(0, jax.random.key(0), params, None, {"teacher": constants})
            return loss(model, batch, context)

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(params, constants)

    return run, (network, params, stats), guide, plan


def numpy_loss(config, raw, teacher_raw, batch, hint=None):
    """Every term from the definitions, in float64, the hard background mined by a sort."""
    raw, teacher_raw = np.asarray(raw, np.float64), np.asarray(teacher_raw, np.float64)
    anchors = detector().anchors((16, 16))
    targets = detection.assign_targets(anchors, batch["boxes"], batch["label"])
    labels, y = np.asarray(targets.labels), np.asarray(targets.deltas, np.float64)
    hard, soft, smooth, bound, active = [], [], [], [], []
    for n in range(len(raw)):
        logq, p = log_softmax(raw[n, :, :-4], -1), softmax(teacher_raw[n, :, :-4], -1)
        positive = np.flatnonzero(labels[n] > 0)
        background = np.flatnonzero(labels[n] == 0)
        worst = background[np.argsort(logq[background, 0], kind="stable")]
        chosen = [*positive, *worst[: 3 * max(len(positive), 1)]]
        w = np.array([config.background_weight, 1, 1, 1])
        for i in chosen:
            hard.append(-logq[i, labels[n, i]])
            soft.append(-np.sum(w * p[i] * logq[i]))
        for i in positive:
            d = np.abs(raw[n, i, -4:] - y[n, i])
            smooth.append(np.where(d < 1, 0.5 * d**2, d - 0.5).sum())
            theirs = ((teacher_raw[n, i, -4:] - y[n, i]) ** 2).sum()
            active.append((d**2).sum() + config.margin > theirs)
            bound.append((d**2).sum() * active[-1])
    out = {
        "classification": config.mu * np.mean(hard) + (1 - config.mu) * np.mean(soft),
        "regression": np.mean(smooth),
        "bound": np.mean(bound),
        "bound_active": np.mean(active),
    }
    total = out["classification"] + config.regression * (
        out["regression"] + config.nu * out["bound"]
    )
    if hint is not None:
        out["hint"] = hint
        total += config.hint_weight * hint
    return total, out


def test_all_terms_against_numpy(batch):
    run, (network, params, stats), guide, plan = setting(FULL, batch)
    ((value, metrics), (gradient, none)) = run(params, guide.constants, batch)

    @jax.jit
    def forward(params, images):
        model = network.model(params, stats, train=True)
        taps = D.features_of(model.student, plan.student_taps)
        raw, found = taps(images)
        teacher = guide(guide.constants, images)
        adapter = next(iter(params["adapters"].values()))["conv"]
        return raw, found["conv:input"], teacher.logits, teacher.features["conv:input"], adapter

    raw, ours, teacher_raw, theirs, conv = forward(params, batch["image"])
    kernel, bias = np.asarray(conv["kernel"], np.float64)[0, 0], np.asarray(conv["bias"])
    assert kernel.shape == (6, 8)
    hint = np.mean((np.asarray(ours, np.float64) @ kernel + bias - np.asarray(theirs)) ** 2)
    total, expected = numpy_loss(FULL, raw, teacher_raw, batch, hint)
    assert set(metrics) == set(expected)
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(value, total, rtol=2e-4)
    assert 0 < expected["bound_active"] < 1
    leaves = jax.tree.leaves(gradient)
    assert all(np.isfinite(g).all() for g in leaves)
    assert sum(float(jnp.abs(g).sum()) > 0 for g in leaves) > 0.8 * len(leaves)
    # the teacher's arrays get no gradient
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(none))


def test_without_a_teacher_it_is_plain_training(batch):
    """Its own losses against `cnnjax.detection`'s, which are optax's and the trainer's."""
    model = detector()
    network, params, stats = training.split_network(model)
    config = D.DetectionDistillConfig(mu=1.0, nu=0.0, regression=0.8)
    hooks = (
        D.detection_distillation_loss(config),
        detection.detection_loss(regression=0.8),
    )

    @jax.jit
    def both(params):
        def scalar(params, hook):
            context = training.Context(0, jax.random.key(0), params, None)
            return hook(network.model(params, stats, train=True), batch, context)[0]

        return [jax.value_and_grad(scalar)(params, hook) for hook in hooks]

    (a, ga), (b, gb) = both(params)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), ga, gb)


@pytest.mark.parametrize("term", ["soft", "bound", "hint"])
def test_each_term_can_be_switched_off(batch, term):
    off = {"soft": {"mu": 1.0}, "bound": {"nu": 0.0}, "hint": {"hint_weight": 0.0, "hints": ()}}
    config = dataclasses.replace(FULL, **off[term])
    plan = D.plan_detection(config, detector(), detector((6, 8), seed=1), EXAMPLE)
    assert bool(plan.adapters(nnx.Rngs(0))) == (term != "hint")
    assert config.taught
    run, (_, params, _), guide, _ = setting(config, batch)
    (_, metrics), _ = run(params, guide.constants, batch)
    assert ("bound" in metrics) == (term != "bound")
    assert ("hint" in metrics) == (term != "hint")


def test_images_without_objects_leave_finite_gradients(batch):
    run, (_, params, _), guide, _ = setting(FULL, batch)
    empty = {**batch, "label": np.zeros_like(batch["label"])}
    (value, metrics), (gradient, _) = run(params, guide.constants, empty)
    assert np.isfinite(value)
    assert metrics["regression"] == metrics["bound"] == metrics["bound_active"] == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_a_student_that_is_its_teacher(batch):
    """Identity adapters: no hint; not better than the bound asks: no bound, margin 0."""
    teacher = detector((6, 8), seed=1)
    config = dataclasses.replace(FULL, margin=0.0)
    plan = D.plan_detection(config, teacher, teacher, EXAMPLE)
    adapters = plan.adapters(nnx.Rngs(0))
    ((_, adapter),) = adapters.items()  # there is one although the shapes agree
    adapter.conv.kernel.set_value(jnp.eye(8)[None, None])
    guide = D.Teacher(teacher, taps=plan.teacher_taps)
    network, params, stats = training.split_network(D.WithAdapters(teacher, adapters))
    loss = D.detection_distillation_loss(plan, guide)

    @jax.jit
    def run(params):
        context = training.Context(0, None, params, None, {"teacher": guide.constants})
        return loss(network.model(params, stats), batch, context)[1]

    metrics = run(params)
    np.testing.assert_allclose(metrics["hint"], 0, atol=1e-10)
    assert metrics["bound"] == metrics["bound_active"] == 0


def test_cached_targets_give_the_same_loss(batch):
    run, (network, params, stats), guide, plan = setting(FULL, batch)
    (online, _), _ = run(params, guide.constants, batch)
    cache = D.cache_examples(guide, batch["image"])
    cached = {**batch, **D.lookup(cache, batch["image"], np.arange(4))}
    loss = D.detection_distillation_loss(plan)

    @jax.jit
    def offline(params, batch):
        context = training.Context(0, jax.random.key(0), params, None)
        return loss(network.model(params, stats, train=True), batch, context)[0]

    np.testing.assert_allclose(offline(params, cached), online, rtol=1e-5)
    stream = D.cache_stream(guide, MemoryLoader(batch, batch_size=2), 3)
    assert stream.logits.shape == (3, 2, 128, 8)
    with pytest.raises(ValueError, match="no teacher"):
        offline(params, batch)


def test_training_with_the_hooks_learns_from_the_teacher(batch):
    _, _, guide, plan = setting(FULL, batch)
    whole = D.WithAdapters(detector(), plan.adapters(nnx.Rngs(0)))
    optimizer = optax.adam(3e-3)
    network, state = training.create_state(whole, optimizer)
    step = training.make_train_step(
        network,
        optimizer,
        hooks=training.Hooks(loss=D.detection_distillation_loss(plan, guide)),
        constants={"teacher": guide.constants},
    )
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    trained = training.state_to_model(network, state).student
    assert trained(batch["image"]).shape == (4, 128, 8)


def test_what_does_not_fit_is_refused(batch):
    student = detector()
    with pytest.raises(ValueError, match="same classes and the same anchors"):
        D.plan_detection(FULL, student, detector(classes=4), EXAMPLE)
    with pytest.raises(ValueError, match="anchors are others"):
        D.plan_detection(FULL, student, detector(sizes=(5.0, 9.0)), EXAMPLE)
    with pytest.raises(ValueError, match="same classes and the same anchors"):
        D.plan_detection(FULL, student, detector(feature="layer1"), EXAMPLE)
    shallow = dataclasses.replace(FULL, hints=(("conv:input", "backbone/conv1"),))
    with pytest.raises(ValueError, match="one height and width"):
        D.plan_detection(shallow, student, student, EXAMPLE)
    nowhere = dataclasses.replace(FULL, hints=(("conv9", "conv"),))
    with pytest.raises(ValueError, match="student: .*conv9"):
        D.plan_detection(nowhere, student, student, EXAMPLE)
    with pytest.raises(ValueError, match="resolve the layers"):
        D.detection_distillation_loss(FULL)
    with pytest.raises(ValueError, match="mu is 1.5"):
        D.DetectionDistillConfig(mu=1.5)
    with pytest.raises(ValueError, match="nu is -1"):
        D.DetectionDistillConfig(nu=-1.0)
    with pytest.raises(ValueError, match="give both or none"):
        D.DetectionDistillConfig(hint_weight=1.0)
    with pytest.raises(ValueError, match="hint_form is 'l3'"):
        D.DetectionDistillConfig(hint_form="l3")
