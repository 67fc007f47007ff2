"""Stages of sparse training on real digits: exact zeros, the right counts, a really smaller net."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import data, graph, models, pipeline, pruning, training
from cnnjax.pipeline.context import Context
from cnnjax.pipeline.stages import (
    Gates,
    Penalized,
    Proximal,
    Prune,
    Regrow,
    ShrinkDead,
    Surgery,
    Threshold,
    Tickets,
    Train,
)

SIZES = [(64, 24), (24, 16), (16, 10)]


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    data.info("digits", folder)
    return folder


def run(digits_dir, workdir, stages):
    config = pipeline.config_dict(
        "demo",
        model=pipeline.ModelSpec("plain_mlp", {"hidden": (24, 16)}),
        data=pipeline.DataConfig(
            "digits", data_dir=str(digits_dir), batch_size=64, eval_batch_size=355, workers=0
        ),
        stages=stages,
        seeds=(0,),
    )
    config.data_parallel = False
    found = pipeline.run(config, workdir, progress=False)["runs"][0]["stages"]
    arrays = {}
    for name in stages:
        with np.load(workdir / "seed0" / name / "network" / "arrays.npz") as file:
            arrays[name] = dict(file)
    return found, arrays


def recipe(epochs, base=1e-2, name="cosine"):
    schedule = training.ScheduleConfig(name, base=base)
    return pipeline.Recipe(epochs=epochs, schedule=schedule, steps_per_call=11)


@pytest.mark.method("iterative_hard_thresholding")
def test_threshold_ends_with_exactly_k_weights_and_learns(digits_dir, tmp_path):
    stage = Threshold(recipe(4.0), keep=0.25, cycles=2, dense_epochs=1.0, sparse_epochs=1.0)
    (found,), arrays = run(digits_dir, tmp_path, {"threshold": stage})
    kernels = [w for p, w in arrays["threshold"].items() if p.endswith("kernel")]
    assert sorted(int((w != 0).sum()) for w in kernels) == sorted(
        int(a * b * 0.25) for a, b in SIZES
    )
    assert found["accuracy"] > 0.8
    assert found["metrics"]["steps"] == 22 * 7


@pytest.mark.method("dynamic_network_surgery")
def test_surgery_is_evaluated_and_saved_with_its_mask(digits_dir, tmp_path):
    stage = Surgery(recipe(6.0), rate=0.3, gamma=1e-3)
    (found,), arrays = run(digits_dir, tmp_path, {"surgery": stage})
    zeros = {p: (w == 0).mean() for p, w in arrays["surgery"].items() if p.endswith("kernel")}
    assert all(z > 0.2 for z in zeros.values())
    assert found["accuracy"] > 0.8
    # what training evaluated is what was saved
    np.testing.assert_allclose(found["loss"], found["metrics"]["loss"], rtol=1e-4)
    with np.load(tmp_path / "seed0" / "surgery" / "network" / "mask.npz") as file:
        packed = dict(file)
    for path, w in arrays["surgery"].items():
        mask = np.unpackbits(packed[path], count=w.size).astype(bool).reshape(w.shape)
        assert (w[~mask] == 0).all()


@pytest.mark.method("hard_concrete_l0")
@pytest.mark.method("forward_backward_splitting")
@pytest.mark.parametrize("kind", ["gates", "proximal"])
def test_structured_training_ends_in_a_smaller_network(digits_dir, tmp_path, kind):
    if kind == "gates":
        spec = {"denses/1/kernel": "channel", "head/kernel": "channel"}
        first = Gates(recipe(12.0, 2e-2, "constant"), gates=spec, strength=3e-3)
    else:
        first = Proximal(recipe(12.0), strength=2.0, include=("denses/*/kernel",))
    (trained, small), arrays = run(digits_dir, tmp_path, {kind: first, "small": ShrinkDead()})
    widths = [len(arrays["small"][f"denses/{i}/bias"]) for i in (0, 1)]
    assert widths[0] < 24 or widths[1] < 16
    assert trained["accuracy"] > 0.8
    np.testing.assert_allclose(small["accuracy"], trained["accuracy"], atol=1e-6)
    np.testing.assert_allclose(small["loss"], trained["loss"], rtol=1e-4)
    assert sum(w.size for w in arrays["small"].values()) < sum(
        w.size for w in arrays[kind].values()
    )
    if kind == "gates":
        assert trained["metrics"]["active"]["denses/1/kernel"] >= widths[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strength", "cut"),
    [
        pytest.param(
            "group", {"filter": 0.05}, 0.3, marks=pytest.mark.method("structured_sparsity_learning")
        ),
        pytest.param("hyperbolic", 0.1, 1.5, marks=pytest.mark.method("weight_decay_biases")),
        pytest.param("l1", 2e-3, 1e-2, marks=pytest.mark.method("sparse_objective")),
    ],
)
def test_penalties_from_a_config_then_a_cut_and_training_on(
    digits_dir, tmp_path, kind, strength, cut
):
    first = Penalized(recipe(12.0), kind, strength, cut=cut, include=("denses/*/kernel",))
    stages = {"penalized": first, "tuned": Train(recipe(3.0)), "small": ShrinkDead()}
    found, arrays = run(digits_dir, tmp_path, stages)
    w = arrays["penalized"]["denses/0/kernel"]
    assert (w == 0).any()
    # the cut is what the stage's own words say
    size = {"group": np.linalg.norm(w, axis=0), "hyperbolic": np.abs(w).sum(0), "l1": np.abs(w)}
    assert (size[kind][size[kind] > 0] > cut).all()
    np.testing.assert_array_equal(arrays["tuned"]["denses/0/kernel"] == 0, w == 0)
    assert found[1]["accuracy"] > 0.9
    np.testing.assert_allclose(found[2]["accuracy"], found[1]["accuracy"], atol=1e-6)
    if kind != "l1":
        assert len(arrays["small"]["denses/0/bias"]) == int((size[kind] > 0).sum()) < 24


@pytest.mark.parametrize("method", ["rigl", pytest.param("set", marks=pytest.mark.slow)])
def test_sparse_from_the_start_keeps_its_density_and_learns(digits_dir, tmp_path, method):
    stage = Regrow(recipe(8.0), density=0.3, method=method, every=20)
    (found,), arrays = run(digits_dir, tmp_path, {"regrow": stage})
    sizes = {p: w.size for p, w in arrays["regrow"].items() if p.endswith("kernel")}
    left = {p: int((arrays["regrow"][p] != 0).sum()) for p in sizes}
    assert sum(left.values()) <= round(0.3 * sum(sizes.values())) + len(sizes)
    assert sum(left.values()) > 0.27 * sum(sizes.values())  # a grown weight may still be 0
    assert found["accuracy"] > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("rewind", [0.0, 0.5])
def test_tickets_go_back_to_early_weights_and_train(digits_dir, tmp_path, monkeypatch, rewind):
    """Two cuts of a half; every round starts from the same weights, and the ticket learns."""
    starts = []
    train = Context.train

    def watch(self, model, recipe, **options):
        kernel = np.asarray(model.denses[0].kernel[...])
        starts.append((options["name"], kernel))
        return train(self, model, recipe, **options)

    monkeypatch.setattr(Context, "train", watch)
    stage = Tickets(recipe(4.0), sparsity=0.75, rounds=2, rewind_epochs=rewind)
    (found,), arrays = run(digits_dir, tmp_path, {"tickets": stage})
    if rewind:
        assert starts.pop(0)[0] == "early"
    assert [name for name, _ in starts] == ["round_0", "round_1", "ticket"]
    for _, kernel in starts:
        np.testing.assert_array_equal(kernel[kernel != 0], starts[0][1][kernel != 0])
    total = sum(a * b for a, b in SIZES)
    left = sum(int((w != 0).sum()) for p, w in arrays["tickets"].items() if p.endswith("kernel"))
    assert left == total - -(-total * 3 // 4)
    assert [round(p["sparsity"], 6) for p in found["curve"]] == [0.0, 0.5, 0.75]
    assert found["accuracy"] == found["curve"][-1]["accuracy"] > 0.85


def test_dead_channels_are_those_that_nothing_makes_or_nothing_reads():
    model = models.create("plain_cnn", rngs=nnx.Rngs(0), widths=(6, 5), hidden=(7,))
    model.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    found = graph.trace(model, x)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    mask["convs"][0]["kernel"][..., [1, 4]] = False
    mask["convs"][0]["bias"][[1]] = False  # 4 still emits its bias
    mask["convs"][1]["kernel"][:, :, 3] = False  # nobody reads 3
    mask["head"]["kernel"][2] = False
    keep = pruning.dead_channels(found, mask)
    alive = dict(keep.groups)
    np.testing.assert_array_equal(alive["convs/0"], [1, 0, 1, 0, 1, 1])
    assert alive["convs/1"].all()
    np.testing.assert_array_equal(alive["denses/0"], [1, 1, 0, 1, 1, 1, 1])
    graphdef, state = nnx.split(model)
    masked = nnx.merge(graphdef, state)
    nnx.update(masked, jax.tree.map(lambda w, m: w * m, params, mask))
    small = pruning.shrink(masked, found, keep)
    np.testing.assert_allclose(small(x), masked(x), atol=1e-5)
    with pytest.raises(KeyError, match="no variable"):
        pruning.dead_channels(found, {"conv": np.ones(3, bool)})


def test_bad_settings_are_refused_before_any_work():
    with pytest.raises(ValueError, match="cycles >= 1"):
        Threshold(cycles=0)
    with pytest.raises(ValueError, match="stop is a part"):
        Surgery(stop=0.0)
    with pytest.raises(ValueError, match="'filtre'"):
        Gates(gates={"head/kernel": "filtre"})
    with pytest.raises(ValueError, match="unknown operator"):
        Proximal(kind="l3")
    with pytest.raises(ValueError, match="'group_l1'.*Did you mean 'group'"):
        Penalized(kind="group_l1")
    with pytest.raises(ValueError, match="takes {granularity: weight}"):
        Penalized(kind="group", strength=0.1)
    with pytest.raises(ValueError, match="takes a number"):
        Penalized(kind="l1", strength={"filter": 0.1})
    with pytest.raises(ValueError, match="'rig'.*Did you mean 'rigl'"):
        Regrow(method="rig")
    with pytest.raises(ValueError, match="density must lie in"):
        Regrow(density=0.0)
    params = {"head": {"kernel": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match="'q' matches nothing"):
        Penalized(strength={"filter": 0.1}, include=("q",)).check(params)
    for options in ({"sparsity": {"head/*": 0.9}}, {"sparsity": 0.9, "scope": "layer"}):
        with pytest.raises(ValueError, match="0.9 would empty head/kernel .6 groups by 'weight'"):
            Prune(**options).check(params)
    Prune(sparsity={"head/*": 0.8}).check(params)
    with pytest.raises(ValueError, match="gates is empty"):
        Gates().check(params)
    with pytest.raises(KeyError, match="'fc/kernel'"):
        Gates(gates={"fc/kernel": "filter"}).check(params)
    with pytest.raises(ValueError, match="leaves 0"):
        Threshold(keep=0.01).check(params)
