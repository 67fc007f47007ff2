"""A whole run on real digits: counts, zeros, resume, completeness, errors before any work."""

from __future__ import annotations

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import data, ops, pipeline, pruning, training
from cnnjax.pipeline.forms import Tuned
from cnnjax.pipeline.stages import Prune, Train

HIDDEN = (24, 16)
SIZES = [(64, 24), (24, 16), (16, 10)]


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    data.info("digits", folder)
    return folder


def make(digits_dir, stages, *, seeds=(0,)):
    config = pipeline.config_dict(
        "demo",
        model=pipeline.ModelSpec("plain_mlp", {"hidden": HIDDEN}),
        data=pipeline.DataConfig(
            "digits", data_dir=str(digits_dir), batch_size=64, eval_batch_size=355, workers=0
        ),
        stages=stages,
        seeds=seeds,
    )
    config.data_parallel = False
    return config


def recipe(epochs, **changes):
    schedule = training.ScheduleConfig("cosine", base=1e-2)
    return pipeline.Recipe(epochs=epochs, schedule=schedule, steps_per_call=11, **changes)


def default_stages():
    return {
        "dense": Train(recipe(6.0)),
        "pruned": Prune(recipe(1.0), sparsity=0.8, cuts=3, final_epochs=2.0),
    }


@pytest.fixture(scope="module")
def finished(digits_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = make(digits_dir, default_stages())
    return config, workdir, pipeline.run(config, workdir, progress=False)


def arrays(workdir, stage, name="arrays"):
    with np.load(workdir / "seed0" / stage / "network" / f"{name}.npz") as file:
        return dict(file)


def forward(p, x):
    x = x.reshape(len(x), -1).astype(np.float64)
    for layer in ("denses/0", "denses/1"):
        x = np.maximum(x @ p[f"{layer}/kernel"] + p[f"{layer}/bias"], 0)
    return x @ p["head/kernel"] + p["head/bias"]


@pytest.mark.method("magnitude_prune_retrain")
def test_report_equals_independent_counts(finished, digits_dir):
    _, workdir, report = finished
    images, labels = data.arrays("digits", "test", digits_dir)
    dense, pruned = report["runs"][0]["stages"]
    total = sum(i * o + o for i, o in SIZES)
    weights = sum(i * o for i, o in SIZES)
    for record in (dense, pruned):
        p = arrays(workdir, record["name"])
        assert record["params"] == total
        assert record["bytes"] == 4 * total
        assert record["macs"] == weights
        assert record["nonzeros"] == sum(np.count_nonzero(v) for v in p.values())
        kernels = [v for k, v in p.items() if k.endswith("kernel")]
        assert record["effective_macs"] == sum(np.count_nonzero(k) for k in kernels)
        hits = forward(p, images / 255.0).argmax(1) == labels
        assert record["accuracy"] == pytest.approx(hits.mean(), abs=1e-12)
        assert record["error"] == pytest.approx(1 - hits.mean(), abs=1e-12)
    assert dense["accuracy"] > 0.85
    assert pruned["accuracy"] > 0.7
    kept = weights - pruning.prune_count(0.8, weights)
    assert pruned["nonzeros"] <= kept + total - weights
    assert sum(np.count_nonzero(k) for k in kernels) == kept
    assert json.loads((workdir / "report.json").read_text()) == report


@pytest.mark.method("magnitude_prune_retrain")
def test_removed_weights_are_zero_bits(finished):
    _, workdir, _ = finished
    p, packed = arrays(workdir, "pruned"), arrays(workdir, "pruned", "mask")
    for path, value in p.items():
        keep = np.unpackbits(packed[path], count=value.size).astype(bool).reshape(value.shape)
        assert value[~keep].tobytes() == bytes(4 * int((~keep).sum()))
        if path.endswith("bias"):
            assert keep.all()


def test_curve_has_a_point_for_every_cut(finished):
    _, workdir, report = finished
    curve = report["runs"][0]["stages"][1]["curve"]
    weights = sum(i * o for i, o in SIZES)
    targets = pruning.schedules.steps(0.8, 3)
    for point, target in zip(curve, targets, strict=True):
        assert point["kept"] == weights - pruning.prune_count(target, weights)
        assert 0.1 < point["accuracy_before_retraining"] <= 1.0
        assert 0.5 < point["accuracy"] <= 1.0
    assert curve[-1]["accuracy"] == report["runs"][0]["stages"][1]["accuracy"]
    assert (workdir / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (workdir / "report.txt").read_text()
    assert "non-zero MACs" in text
    assert f"{curve[-1]['nonzeros']:,}" in text


def test_running_again_says_that_it_is_complete(finished, capsys, monkeypatch):
    config, workdir, report = finished
    monkeypatch.setattr(Train, "run", None)
    monkeypatch.setattr(Prune, "run", None)
    assert pipeline.run(config, workdir) == report
    assert "This run is complete" in capsys.readouterr().out


def test_another_config_in_the_same_folder_is_refused(finished):
    config, workdir, _ = finished
    other = copy.deepcopy(config)
    other.stages.pruned.sparsity = 0.7
    with pytest.raises(ValueError, match=r"stages.pruned.sparsity is 0.7, was 0.8"):
        pipeline.run(other, workdir, progress=False)


def test_an_interrupted_run_resumes_to_the_same_bytes(finished, tmp_path, monkeypatch):
    config, workdir, report = finished
    real = pipeline.Context.record

    def dies(self, name, value):
        real(self, name, value)
        if name == "cut_001" and "accuracy" in value:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Context, "record", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, tmp_path, progress=False)
    assert not (tmp_path / "report.json").exists()
    assert (tmp_path / "seed0" / "dense" / "done.json").exists()
    monkeypatch.setattr(pipeline.Context, "record", real)
    # the dense stage is not trained again
    monkeypatch.setattr(Train, "run", None)
    again = pipeline.run(config, tmp_path, progress=False)
    for stage in ("dense", "pruned"):
        a, b = arrays(tmp_path, stage), arrays(workdir, stage)
        assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}

    def figures(result):
        stages = copy.deepcopy(result["runs"][0]["stages"])
        return [{k: v for k, v in s.items() if k != "seconds"} for s in stages]

    assert figures(again) == figures(report)


def test_gradual_with_averages_and_a_masked_finish(digits_dir, tmp_path):
    config = make(
        digits_dir,
        {
            "pruned": Prune(
                recipe(4.0, ema_decay=0.9), method="gradual", sparsity=0.6, every=5, end=0.5
            ),
            "polished": Train(recipe(1.0, ema_decay=0.9)),
        },
        seeds=(0, 1),
    )
    report = pipeline.run(config, tmp_path, progress=False)
    weights = sum(i * o for i, o in SIZES)
    for run in report["runs"]:
        for stage in run["stages"]:
            folder = tmp_path / f"seed{run['seed']}" / stage["name"] / "network"
            with np.load(folder / "arrays.npz") as file:
                kernels = [v for k, v in file.items() if k.endswith("kernel")]
            # the moving averages are what is returned: their zeros are exact too
            assert sum(np.count_nonzero(k) for k in kernels) == weights - pruning.prune_count(
                0.6, weights
            )
    summary = report["summary"][0]["accuracy"]
    values = [run["stages"][0]["accuracy"] for run in report["runs"]]
    assert summary == {"mean": np.mean(values), "min": min(values), "max": max(values)}
    assert (
        values[0] != values[1]
        or report["runs"][0]["stages"][0]["loss"] != (report["runs"][1]["stages"][0]["loss"])
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.name": "plane_mlp"}, "unknown model 'plane_mlp'. Did you mean 'plain_mlp'"),
        ({"data.name": "digitz"}, "unknown data set 'digitz'. Did you mean 'digits'"),
        ({"stages.pruned.sparsity": "1.2"}, "got 1.2"),
        ({"stages.pruned.include": "('hed/*',)"}, "stages.pruned: include pattern 'hed/*' matches"),
        ({"stages.pruned.recipe.optimizer.name": "adamm"}, "Did you mean 'adam'"),
    ],
)
def test_mistakes_are_refused_before_any_work(digits_dir, tmp_path, change, message):
    config = make(digits_dir, default_stages())
    pipeline.apply_overrides(config, list(change.items()))
    with pytest.raises(ValueError) as error:
        pipeline.run(config, tmp_path / "run", progress=False)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_any_evaluation_batch_on_eight_devices(digits_dir, tmp_path, monkeypatch):
    """500 images do not divide over 8 devices: rows of weight 0 fill the batch up."""
    config = make(digits_dir, {"dense": Train(recipe(1.0))})
    config.data_parallel, config.data.eval_batch_size = True, 500
    report = pipeline.run(config, tmp_path / "run", progress=False)
    images, labels = data.arrays("digits", "test", digits_dir)
    for record in report["runs"][0]["stages"]:
        p = arrays(tmp_path / "run", record["name"])
        hits = forward(p, images / 255.0).argmax(1) == labels
        assert record["accuracy"] == pytest.approx(hits.mean(), abs=1e-12)
    # a process reads its share of every batch: seen before any work
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match=r"data.batch_size is 64; .*number of processes, 3"):
        pipeline.run(config, tmp_path / "other", progress=False)
    config.data.batch_size, config.data.eval_batch_size, config.tune_forms = 66, 501, True
    with pytest.raises(ValueError, match="tune_forms: processes could measure different forms"):
        pipeline.run(config, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_unwritable_workdir(digits_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="work folder cannot be written"):
        pipeline.run(make(digits_dir, default_stages()), tmp_path / "file" / "run", progress=False)


def test_a_missing_data_set_says_how_to_prepare_it(digits_dir, tmp_path):
    config = make(digits_dir, default_stages())
    config.data.name = "mnist"
    config.data.data_dir = str(tmp_path / "none")
    with pytest.raises(data.DatasetNotPreparedError, match=r"prepare_data.py mnist"):
        pipeline.run(config, tmp_path / "run", progress=False)


def test_settings_of_a_recipe_reach_the_training(digits_dir, tmp_path):
    changes = {"accumulate": 2, "remat": "full", "compute_dtype": "bfloat16", "tensorboard": True}
    schedule = training.ScheduleConfig("cosine", base=1e-2)
    plain = pipeline.Recipe(epochs=2.0, schedule=schedule, **changes)
    config = make(digits_dir, {"dense": Train(plain)})
    pipeline.run(config, tmp_path, progress=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["runs"][0]["stages"][0]["accuracy"] > 0.5
    assert list(tmp_path.rglob("events.out.tfevents*"))
    with pytest.raises(ValueError, match="remat must be one of"):
        pipeline.Recipe(remat="half")


class Small(nnx.Module):
    """1x1 and depthwise."""

    def __init__(self, rngs):
        self.widen = ops.Conv(1, 8, (1, 1), rngs=rngs)
        self.depthwise = ops.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.depthwise(self.widen(x))).mean((1, 2)))


def test_a_step_measures_its_forms_once(tmp_path, monkeypatch):
    calls, real = [], ops.tune

    def tune(*args, **options):
        calls.append(1)
        return real(*args, timer=lambda c, _: 0.5 if c.form == "native" else 1.0, **options)

    monkeypatch.setattr(ops, "tune", tune)
    x, kernel = jnp.ones((8, 6, 6, 3)), jnp.ones((3, 3, 1, 3))
    fn = jax.jit(ops.depthwise)
    tuned = Tuned(fn, tmp_path / "forms.json", training.data_mesh())
    np.testing.assert_allclose(tuned(x, kernel), tuned(x, kernel))
    assert calls == [1]
    np.testing.assert_allclose(tuned(x, kernel), fn(x, kernel), rtol=1e-5)
    assert fn._cache_size() == 2
    assert set(ops.FormTable.load(tmp_path / "forms.json").forms.values()) == {"native"}


@pytest.mark.slow
def test_forms_are_measured_before_the_first_step(digits_dir, tmp_path, monkeypatch):
    chosen = pipeline.DataConfig("digits", data_dir=str(digits_dir), batch_size=64, workers=0)
    batches, real = [], ops.tune

    def timer(candidate, repeats):
        batches.append(candidate.case.x[0])
        return 0.5 if candidate.form == "native" else 1.0

    monkeypatch.setattr(ops, "tune", lambda *a, **k: real(*a, timer=timer, rounds=1, **k))

    def train(name, forms):
        context = pipeline.Context(
            data_config=chosen,
            seed=0,
            name="dense",
            folder=tmp_path / name,
            mesh=training.data_mesh(),
            progress=False,
            forms=forms,
        )
        (tmp_path / name).mkdir()
        model = context.train(Small(nnx.Rngs(0)), pipeline.Recipe(), steps=2).model()
        return jax.tree.leaves(nnx.state(model, nnx.Param))

    plain = train("plain", None)
    assert not batches
    file = tmp_path / "forms.json"
    tuned = train("tuned", file)
    # a device's share of training's 64 images and of evaluation's 504
    assert set(batches) == {8, 63}
    found = ops.FormTable.load(file)
    assert set(found.forms.values()) == {"native"}
    assert {part for part, _ in found.forms} == {"forward", "input_grad", "kernel_grad"}
    batches.clear()
    again = train("again", file)
    assert not batches
    for a, b, c in zip(plain, tuned, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(b, c)
