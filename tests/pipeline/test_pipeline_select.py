"""The select stage: every criterion at the same widths, refits, fresh weights, branches."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import graph, models, pipeline, pruning, tree
from cnnjax.pipeline.context import Context
from cnnjax.pipeline.registry import Carry
from cnnjax.pipeline.stages import Branches, Select, Slimming
from cnnjax.pipeline.stages import select as module
from cnnjax.pipeline.stages.masking import params_of
from cnnjax.training import OptimizerConfig, ScheduleConfig

DATA = pipeline.DataConfig("digits", batch_size=64, workers=0, test="test[:64]")
RATIO = {"convs/0": 0.5, "fc": 0.25}


@pytest.fixture(scope="module")
def network():
    model = models.create("plain_cnn", widths=(6, 6), hidden=(8,), rngs=nnx.Rngs(0))
    model.eval()
    return model, graph.trace(model, jnp.zeros((1, 8, 8, 1)))


@pytest.fixture
def context(tmp_path):
    return Context(data_config=DATA, seed=0, name="s", folder=tmp_path, progress=False)


@pytest.mark.parametrize(
    "name", [m for m in module.METHODS if m not in ("fisher_cost", "bn_scale")]
)
def test_every_method_leaves_the_widths_asked_for(network, context, name):
    model, found = network
    stage = Select(name, {found.groups[0].name: 0.5}, images=64)
    keep = stage._keep(model, found, stage._images(context) or [], context)
    widths = {n: int(m.sum()) for n, m in keep.groups}
    assert widths.pop(found.groups[0].name) == 3
    assert all(widths[g.name] == g.size for g in found.groups[1:])


def test_the_price_of_computation_meets_its_budget(network, context):
    model, found = network
    stage = Select("fisher_cost", macs=0.5, images=64)
    keep = stage._keep(model, found, stage._images(context), context)
    costs = pruning.CostModel(found)
    assert costs.macs(keep.alive) <= 0.5 * costs.macs(found.alive())


def test_scores_by_data_equal_their_definition(network, context):
    """APoZ counted by hand; the lasso of one reading layer as the library's function gives it."""
    model, found = network
    images = [b["image"] for b in Select("apoz", images=64)._images(context)]
    got = module.read_scores(model, found, images, "apoz")
    first = found.groups[0]
    maps = jax.nn.relu(model.convs[0](jnp.asarray(images[0])))
    # the second convolution reads them behind the ReLU
    share = np.mean(np.asarray(maps) > 0, axis=(0, 1, 2))
    np.testing.assert_allclose(got[first.atoms], share, atol=1e-6)
    scores = module.by_producer(found, got)
    np.testing.assert_allclose(scores[f"{first.name}/kernel"], got[first.atoms])


def test_loss_of_one_example(network):
    model, _ = network
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    z = np.asarray(model(jnp.asarray(x)), np.float64)
    loss = module.example_loss(model)
    for i, label in enumerate((0, 3, 9)):
        expected = np.log(np.sum(np.exp(z[i]))) - z[i, label]
        found = loss(params_of(model), {"image": jnp.asarray(x[i]), "label": label})
        np.testing.assert_allclose(found, expected, rtol=1e-5)


class Normed(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.fc = nnx.Linear(4, 10, rngs=rngs)

    def __call__(self, x):
        return self.fc(jnp.mean(jax.nn.relu(self.norm(self.conv(x))), axis=(1, 2)))


def test_scales_of_the_normalization_decide(context):
    model = Normed()
    model.eval()
    model.norm.scale[...] = jnp.asarray([0.1, -2.0, 0.5, 1.0])
    found = graph.trace(model, jnp.zeros((1, 8, 8, 1)))
    keep = Select("bn_scale", {"conv": 0.5})._keep(model, found, [], context)
    assert keep.groups[0][1].tolist() == [False, True, False, True]


def test_fresh_weights_are_others_and_statistics_forgotten():
    model = Normed()
    model.norm.mean[...] += 3.0
    model.norm.scale[...] *= 2.0
    new = module.restarted(model, jax.random.key(1))
    again = module.restarted(model, jax.random.key(1))
    for path, w in tree.flatten(params_of(new)).items():
        old = tree.flatten(params_of(model))[path]
        assert w.shape == old.shape
        np.testing.assert_array_equal(w, tree.flatten(params_of(again))[path])
        if path.endswith("kernel"):
            assert not np.allclose(w, old)
    assert float(jnp.max(jnp.abs(new.norm.mean[...]))) == 0
    assert new.norm.scale[...].tolist() == new.norm.var[...].tolist() == [1.0] * 4
    kernel = module.restarted(nnx.Linear(500, 300, rngs=nnx.Rngs(0)), jax.random.key(0)).kernel
    assert float(jnp.std(kernel[...])) == pytest.approx((2 / 500) ** 0.5, rel=0.05)


def test_slimming_adds_the_scales_to_the_loss():
    model = Normed()
    model.norm.scale[...] = jnp.asarray([0.1, -2.0, 0.5, 1.0])
    slope = jax.grad(Slimming(strength=0.01).penalty)(params_of(model))
    np.testing.assert_allclose(slope["norm"]["scale"], [0.01, -0.01, 0.01, 0.01], rtol=1e-6)
    assert float(jnp.max(jnp.abs(slope["conv"]["kernel"]))) == 0
    with pytest.raises(ValueError, match="chooses by bn_scale"):
        Slimming("l1")
    with pytest.raises(ValueError, match="strength is -1.0"):
        Slimming(strength=-1.0)
    with pytest.raises(ValueError, match="unknown normalize 'maen'"):
        Select(normalize="maen")
    with pytest.raises(ValueError, match="no branch 'lassso'. Did you mean 'lasso'"):
        Branches({"lasso": Select()}, only=("lassso",))


@pytest.mark.slow
def test_slimming_makes_scales_small_and_removes_the_smallest(tmp_path):
    """The scales that stay are smaller than after the same training without the penalty."""
    recipe = pipeline.Recipe(epochs=2.0, optimizer=OptimizerConfig("sgd", momentum=0.0))
    recipe = dataclasses.replace(recipe, schedule=ScheduleConfig(base=0.05))
    network = Carry(Normed())
    small, scale = {}, {}
    for strength in (0.0, 0.3):
        folder = tmp_path / f"{strength}"
        folder.mkdir()
        inner = Context(data_config=DATA, seed=0, name="s", folder=folder, progress=False)
        stage = Slimming(recipe=recipe, strength=strength, macs=0.6)
        small[strength] = stage.run(network, inner).network.model
        scale[strength] = np.asarray(small[strength].norm.scale[...])
    assert small[0.3].norm.scale.shape == (2,)
    # 42 steps of 0.3 * 0.05 take 0.63 at most; the loss pushes back
    assert 0.2 < scale[0.0].mean() - scale[0.3].mean() < 0.7


@pytest.mark.slow
def test_branches_of_a_run(tmp_path):
    """Dense, refitted and fresh branches share what came in; the refit lowers nothing to NaN."""
    recipe = pipeline.Recipe(epochs=0.1, optimizer=OptimizerConfig("adam"))
    first = "convs/0"
    config = pipeline.config_dict(
        "select_test",
        model=pipeline.ModelSpec("plain_cnn", {"widths": (6, 6), "hidden": (8,)}),
        data=DATA,
        stages={
            "methods": Branches(
                {
                    "dense": Select(),
                    "lasso": Select("lasso", {first: 0.5}, images=64, refit=True),
                    "scratch": Select("l1", {first: 0.5}, fresh=True),
                },
                recipe,
            )
        },
    )
    config.data_parallel = False
    report = pipeline.run(config, tmp_path, progress=False)
    curve = {p["branch"]: p for p in report["runs"][0]["stages"][0]["curve"]}
    assert curve["dense"]["macs_share"] == 1
    assert curve["lasso"]["macs_share"] == curve["scratch"]["macs_share"] < 1
    assert json.loads((tmp_path / "report.json").read_text())["summary"]


def test_a_mask_is_refused(network, context):
    model, _ = network
    mask = pruning.full_mask(params_of(model))
    with pytest.raises(ValueError, match="put this stage before masks"):
        Select("l1", RATIO).run(Carry(model, mask), context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "l3"}, "unknown method 'l3'"),
        ({"ratio": {"**": 1.0}}, "expected a share"),
        ({"ratio": {"**": 0.5}, "macs": 0.5}, "not both"),
        ({"method": "fisher_cost", "ratio": {"**": 0.5}}, "give macs"),
        ({"macs": -0.5}, "macs is -0.5"),
        ({"images": 0}, "images is 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Select(**options)
