"""Every term of a `DistillConfig`: zero for twins, gradients by finite differences, refusals."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import distillation as kt
from cnnjax import models, training, tree
from cnnjax.distillation import DistillConfig
from cnnjax.pipeline.stages import Distill

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
RNG = np.random.default_rng(3)
BATCH = {
    "image": jnp.asarray(RNG.standard_normal((6, 8, 8, 1)), jnp.float32),
    "label": jnp.asarray(RNG.integers(0, 10, 6)),
}
ONE, TWO, VECTOR = ("convs/0", "convs/0"), ("convs/1", "convs/1"), ("denses/0", "denses/0")
OFF = {"hard": 0.0, "soft": "none"}
TERMS = {
    "hint": DistillConfig(**OFF, hint_weight=1.0, hints=(TWO,), hint_activation="none"),
    "attention": DistillConfig(**OFF, attention_beta=1e2, attention=(ONE, TWO)),
    "attention_paper": DistillConfig(
        **OFF, attention_beta=1.0, attention=(TWO,), attention_form="paper"
    ),
    "fsp": DistillConfig(**OFF, fsp_weight=1.0, fsp=((ONE[0], TWO[0], ONE[1], TWO[1]),)),
    "gradient": DistillConfig(**OFF, gradient_beta=1e3),
    "contrastive": DistillConfig(**OFF, contrastive_weight=1.0, contrastive=(VECTOR,)),
    "contrastive_maps": DistillConfig(**OFF, contrastive_weight=1.0, contrastive=(TWO,)),
    "review": DistillConfig(**OFF, review_weight=1.0, review=(ONE, TWO)),
    "neurons": DistillConfig(**OFF, neuron_weight=1.0, neurons=(VECTOR,), neuron_count=3),
    "kd": DistillConfig(hard=0.3, soft="kd", soft_weight=0.7),
    "dkd": DistillConfig(hard=0.0, soft="dkd", soft_weight=1.0),
    "logits": DistillConfig(hard=0.0, soft="logits", soft_weight=1.0),
}


def network(seed, *, widths=(3, 4), hidden=(6,), classes=10):
    fields = {"widths": widths, "hidden": hidden, "activation": "softplus"}
    known = vars(models.config("plain_cnn"))
    fields = {k: v for k, v in fields.items() if k in known}
    return models.create(
        "plain_cnn", image_size=8, in_channels=1, num_classes=classes, rngs=nnx.Rngs(seed), **fields
    )


def setting(config, student, teacher_model):
    guide = kt.Teacher(teacher_model, temperature=config.temperature)
    plan = kt.plan_distillation(config, student, teacher_model, IMAGE)
    if plan.neurons:
        plan = plan.with_neurons([0, 2, 5], [1.0, 0.5, 2.0])
    adapters = plan.adapters(nnx.Rngs(9))
    whole = kt.WithAdapters(student, adapters) if adapters else student
    net, params, stats = training.split_network(whole)
    loss = kt.distillation_loss(plan, guide)
    context = types.SimpleNamespace(step=0, constants={"teacher": guide.constants})

    def value(params):
        return loss(net.model(params, stats), BATCH, context)

    return value, params


@pytest.mark.method("attention_transfer_activation")
@pytest.mark.method("attention_transfer_gradient")
@pytest.mark.method("fsp_matrix")
@pytest.mark.method("hint_training")
@pytest.mark.method("logit_regression")
@pytest.mark.parametrize(
    "name", ["hint", "attention", "attention_paper", "fsp", "gradient", "logits"]
)
def test_a_twin_has_nothing_to_learn(name):
    twin = network(1)
    value, params = setting(TERMS[name], twin, twin)
    got, grads = jax.jit(jax.value_and_grad(lambda p: value(p)[0]))(params)
    assert abs(float(got)) < 1e-6
    if name != "attention_paper":  # a norm has a kink at 0: rounding decides on its gradient
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-4


@pytest.mark.method("kd_soft_targets")
@pytest.mark.method("logit_regression")
@pytest.mark.method("hint_training")
@pytest.mark.method("attention_transfer_activation")
@pytest.mark.method("attention_transfer_gradient")
@pytest.mark.method("fsp_matrix")
@pytest.mark.method("neuron_mimic")
@pytest.mark.parametrize("name", list(TERMS))
def test_gradients_by_finite_differences(name):
    config = TERMS[name]
    value, params = setting(config, network(2, widths=(2, 3), hidden=(5,)), network(1))
    flat, treedef = jax.tree.flatten(params)
    # along random directions, in the middle of a smooth piece: kinks are rare at this size
    f = jax.jit(lambda p: value(p)[0])
    grads = jax.jit(jax.grad(f))(params)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        way = [jnp.asarray(rng.standard_normal(w.shape), jnp.float32) for w in flat]
        norm = np.sqrt(sum(float(jnp.vdot(w, w)) for w in way))
        way = [w / norm for w in way]
        h = 2e-3
        ends = [
            float(f(jax.tree.unflatten(treedef, [w + s * h * d for w, d in zip(flat, way)])))
            for s in (1, -1)
        ]
        want = (ends[0] - ends[1]) / (2 * h)
        got = float(sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), way)))
        scale = np.sqrt(sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(grads))) / 10
        assert scale > 0
        assert got == pytest.approx(want, rel=0.05, abs=0.1 * scale)
    metrics = value(params)[1]
    expected = name.split("_")[0]
    assert expected in metrics or "soft" in metrics


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="one pair of layers"):
        DistillConfig(**OFF, contrastive_weight=1.0, contrastive=(ONE, TWO))
    with pytest.raises(ValueError, match="review_weight = 1.0 and review = .*give both or none"):
        DistillConfig(review_weight=1.0)
    with pytest.raises(ValueError, match="neuron_count is 0"):
        DistillConfig(neuron_count=0)
    with pytest.raises(ValueError, match="contrastive_temperature|temperature is 0"):
        DistillConfig(contrastive_temperature=0.0)
    with pytest.raises(ValueError, match="first stage needs hints, fsp or neurons"):
        TERMS["attention"].stage_one()
    student, big = network(2, widths=(2, 3), hidden=(5,)), network(1)
    for name, message in (
        ("review", "'review' needs its adapter"),
        ("contrastive", "'contrastive' needs its adapter"),
        ("neurons", "no neurons are selected"),
        ("hint", "an adapter is needed"),
    ):
        plan = kt.plan_distillation(TERMS[name], student, big, IMAGE)
        guide = kt.Teacher(big)
        context = types.SimpleNamespace(step=0, constants={"teacher": guide.constants})
        with pytest.raises(ValueError, match=message):
            kt.distillation_loss(plan, guide)(student, BATCH, context)
    cached = {**BATCH, "teacher_logits": jnp.zeros((6, 10))}
    context = types.SimpleNamespace(step=0, constants=None)
    with pytest.raises(ValueError, match="the teacher must run in the step"):
        kt.distillation_loss(TERMS["gradient"])(student, cached, context)
    typo = DistillConfig(**OFF, review_weight=1.0, review=(("conv/0", "convs/0"),))
    with pytest.raises(ValueError, match=r"student: .*conv/0.*convs/0"):
        kt.plan_distillation(typo, student, big, IMAGE)
    maps = DistillConfig(**OFF, neuron_weight=1.0, neurons=(ONE,))
    with pytest.raises(ValueError, match="neurons are vectors"):
        kt.plan_distillation(maps, student, big, IMAGE).adapters(nnx.Rngs(0))
    with pytest.raises(ValueError, match="the plan has no term of neurons"):
        kt.Plan(DistillConfig()).with_neurons([0], [1.0])


def test_the_stage_refuses_what_synthetic_images_lack():
    soft = DistillConfig(hard=0.0, soft_weight=1.0)
    with pytest.raises(ValueError, match="'munged'.*Did you mean 'munge'"):
        Distill(loss=soft, synthetic="munged")
    with pytest.raises(ValueError, match="no labels: hard is 0.1"):
        Distill(synthetic="munge")
    with pytest.raises(ValueError, match="dkd needs labels"):
        Distill(loss=TERMS["dkd"], synthetic="munge")
    with pytest.raises(ValueError, match="take cache='none'"):
        Distill(loss=soft, synthetic="munge", cache="disk")


@pytest.mark.method("hint_training")
def test_two_stages_split_the_terms():
    both = DistillConfig(
        hard=0.5, soft_weight=0.5, hint_weight=1.0, hints=(TWO,), neuron_weight=1.0,
        neurons=(VECTOR,), attention_beta=1.0, attention=(ONE,), gradient_beta=1.0,
    )  # fmt: skip
    one, two = both.stage_one(), both.stage_two()
    assert (one.hard, one.soft, one.attention_beta, one.gradient_beta) == (0.0, "none", 0.0, 0.0)
    assert one.hints == (TWO,)
    assert one.neurons == (VECTOR,)
    assert (two.hint_weight, two.hints, two.neuron_weight, two.neurons) == (0.0, (), 0.0, ())
    assert (two.attention, two.gradient_beta, two.hard) == ((ONE,), 1.0, 0.5)


@pytest.mark.method("attention_transfer_gradient")
def test_input_gradients_are_taken_with_running_statistics():
    """In training mode an image's gradient would hold its neighbours' share of the batch's."""

    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 10, rngs=rngs)

        def __call__(self, x):
            return self.head(jax.nn.softplus(self.norm(self.conv(x))).mean((1, 2)))

    def make(seed):
        model = Normed(nnx.Rngs(seed))
        model.norm.mean[...] = jnp.asarray(np.random.default_rng(seed).normal(size=4), jnp.float32)
        return model

    student, teacher = make(1), make(2)
    guide = kt.Teacher(teacher)
    net, params, stats = training.split_network(student)
    loss = kt.distillation_loss(TERMS["gradient"], guide)
    context = types.SimpleNamespace(step=0, constants={"teacher": guide.constants})

    def numbers(model):
        p = training.split_network(model)[1:]
        p = {k: np.asarray(v, np.float64) for part in p for k, v in tree.flatten(part).items()}
        scale = p["norm/scale"] / np.sqrt(p["norm/var"] + 1e-5)
        return p, scale

    def by_hand(model, x, y):
        """One image at a time, the statistics constants: central differences in float64."""
        p, scale = numbers(model)

        def value(x):
            x = np.pad(x[..., 0], 1)
            z = sum(
                x[i : i + 8, j : j + 8, None] * p["conv/kernel"][i, j, 0]
                for i in range(3)
                for j in range(3)
            )
            z = (z + p["conv/bias"] - p["norm/mean"]) * scale + p["norm/bias"]
            z = np.log1p(np.exp(z)).mean((0, 1)) @ p["head/kernel"] + p["head/bias"]
            return np.log(np.exp(z).sum()) - z[y]

        x, out = np.asarray(x, np.float64), np.zeros(x.shape)
        for at in np.ndindex(*x.shape):
            step = np.zeros(x.shape)
            step[at] = 1e-5
            out[at] = (value(x + step) - value(x - step)) / 2e-5
        return out

    pairs = list(zip(BATCH["image"], np.asarray(BATCH["label"]), strict=True))
    ours, theirs = (np.stack([by_hand(m, x, y) for x, y in pairs]) for m in (student, teacher))
    want = 0.5 * np.mean((ours - theirs) ** 2)
    # the step's own model is in training mode, as in every run
    call = jax.jit(lambda p: loss(net.model(p, stats, train=True), BATCH, context)[1]["gradient"])
    np.testing.assert_allclose(call(params), want, rtol=1e-4)
