"""Distillation stages on real digits: students, caches, masks, resume, against numpy."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from cnnjax import data, distillation, models, pipeline, training
from cnnjax.distillation import DistillConfig
from cnnjax.pipeline.stages import (
    Channels,
    Distill,
    Factorize,
    KeepTeacher,
    LayerRule,
    Prune,
    RecallTeacher,
    Train,
)

HINTED = DistillConfig(
    hard=0.2, soft_weight=0.8, soft_weight_end=0.2, hint_weight=0.01,
    hints=(("denses/0", "denses/0"),), hint_activation="none",
)  # fmt: skip

HINTED_TWIN = DistillConfig(
    hard=0.2, soft_weight=0.8, hint_weight=0.01, hints=(("denses/0", "denses/0"),),
    hint_activation="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    data.info("digits", folder)
    return folder


def recipe(epochs):
    schedule = training.ScheduleConfig("cosine", base=1e-2)
    return pipeline.Recipe(epochs=epochs, schedule=schedule, steps_per_call=11)


def mlp(*hidden):
    return pipeline.ModelSpec("plain_mlp", {"hidden": hidden})


def make(digits_dir, stages):
    config = pipeline.config_dict(
        "demo",
        model=mlp(24),
        data=pipeline.DataConfig(
            "digits", data_dir=str(digits_dir), batch_size=64, eval_batch_size=355, workers=0
        ),
        stages=stages,
    )
    config.data_parallel = False
    return config


def arrays(workdir, stage):
    with np.load(workdir / "seed0" / stage / "network" / "arrays.npz") as file:
        return dict(file)


def logits(p, images):
    x = images.reshape(len(images), -1).astype(np.float64) / 255
    x = np.maximum(x @ p["denses/0/kernel"] + p["denses/0/bias"], 0)
    return x @ p["head/kernel"] + p["head/bias"]


def stages(cache):
    return {
        "teacher": Train(recipe(4.0)),
        "keep": KeepTeacher(),
        "kd": Distill(recipe(2.0), HINTED.stage_two(), mlp(10)),
        "hints": Distill(recipe(2.0), HINTED, mlp(10), first=recipe(1.0), cache=cache),
    }


@pytest.mark.method("teacher_student_pipeline")
@pytest.mark.method("hint_training")
def test_students_learn_and_caches_change_nothing(digits_dir, tmp_path):
    reports, config = {}, None
    for cache in ("none", "disk"):
        config = make(digits_dir, stages(cache))
        reports[cache] = pipeline.run(config, tmp_path / cache, progress=False)
    images, labels = data.arrays("digits", "test", digits_dir)
    teacher = logits(arrays(tmp_path / "none", "teacher"), images)
    records = {r["name"]: r for r in reports["none"]["runs"][0]["stages"]}
    assert records["keep"]["accuracy"] == records["teacher"]["accuracy"]
    for name in ("kd", "hints"):
        p = arrays(tmp_path / "none", name)
        assert {k: v.shape for k, v in p.items()} == {
            "denses/0/kernel": (64, 10), "denses/0/bias": (10,),
            "head/kernel": (10, 10), "head/bias": (10,),
        }  # fmt: skip
        z = logits(p, images)
        assert records[name]["accuracy"] == pytest.approx((z.argmax(-1) == labels).mean())
        agreement = (z.argmax(-1) == teacher.argmax(-1)).mean()
        assert records[name]["metrics"]["agreement"] == pytest.approx(agreement)
        assert records[name]["accuracy"] > 0.3
    online, cached = (arrays(tmp_path / c, "hints") for c in ("none", "disk"))
    for path, value in online.items():
        np.testing.assert_allclose(cached[path], value, atol=2e-4)
    assert (tmp_path / "disk" / "seed0" / "hints" / "targets_first" / "cache.json").exists()
    # interrupted before the report: the same again, nothing trained anew
    (tmp_path / "disk" / "report.json").unlink()
    again = pipeline.run(config, tmp_path / "disk", progress=False)
    assert again["runs"] == reports["disk"]["runs"]


@pytest.mark.method("teacher_student_pipeline")
def test_a_pruned_network_learns_from_its_unpruned_self(digits_dir, tmp_path):
    config = make(
        digits_dir,
        {
            "dense": Train(recipe(3.0)),
            "keep": KeepTeacher(),
            "two": KeepTeacher(add=True),
            "pruned": Prune(recipe(1.0), sparsity=0.8, cuts=1, final_epochs=1.0),
            "tuned": Distill(recipe(1.0), HINTED, combine="arithmetic"),
        },
    )
    report = pipeline.run(config, tmp_path, progress=False)
    records = {r["name"]: r for r in report["runs"][0]["stages"]}
    assert records["two"]["metrics"]["teachers"] == 2
    before, after = arrays(tmp_path, "pruned"), arrays(tmp_path, "tuned")
    for path in ("denses/0/kernel", "head/kernel"):
        np.testing.assert_array_equal(after[path][before[path] == 0], 0)
    assert any(not np.array_equal(before[p], after[p]) for p in before)


@pytest.mark.slow
@pytest.mark.method("teacher_student_pipeline")
@pytest.mark.method("teacher_ensemble")
def test_shrunk_and_factorized_teachers_are_students_of_the_whole_ones(digits_dir, tmp_path):
    """An ensemble from a config teaches what its first member became, after either compression."""
    short = recipe(0.5)
    config = make(
        digits_dir,
        {
            "teacher": Train(recipe(4.0)),
            "keep": KeepTeacher(),
            "second": Train(recipe(1.0)),
            "both": KeepTeacher(add=True),
            "back": RecallTeacher(),
            "cut": Channels(short, macs=0.5, speed_batch=0, recalibrate=0, round_to=1),
            "cut_tuned": Distill(recipe(2.0), HINTED_TWIN, cache="device"),
            "again": RecallTeacher(),
            "factors": Factorize(
                {"denses/0": LayerRule("svd_dense", "macs 0.4"), "**": LayerRule("keep")}
            ),
            "factors_tuned": Distill(recipe(2.0), DistillConfig(hard=0.2, soft_weight=0.8)),
        },
    )
    report = pipeline.run(config, tmp_path, progress=False)
    records = {r["name"]: r for r in report["runs"][0]["stages"]}
    assert records["both"]["metrics"]["teachers"] == 2
    for name in ("cut", "factors"):
        before, after = arrays(tmp_path, name), arrays(tmp_path, f"{name}_tuned")
        assert {p: a.shape for p, a in before.items()} == {p: a.shape for p, a in after.items()}
        assert any(not np.array_equal(before[p], after[p]) for p in before)
        assert records[f"{name}_tuned"]["macs"] < 0.7 * records["teacher"]["macs"]
        assert records[f"{name}_tuned"]["accuracy"] >= records[name]["accuracy"] - 0.02
        assert records[f"{name}_tuned"]["accuracy"] > 0.5
        assert records[f"{name}_tuned"]["metrics"]["agreement"] > 0.5


def test_refusals(digits_dir, tmp_path):
    config = make(digits_dir, {"alone": Distill(recipe(1.0))})
    with pytest.raises(ValueError, match="no teacher"):
        pipeline.run(config, tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="cache is 'tape'"):
        Distill(cache="tape")
    with pytest.raises(ValueError, match="first stage needs hints"):
        Distill(first=recipe(1.0))
    fewer = pipeline.ModelSpec("plain_mlp", {"hidden": (8,), "num_classes": 9})
    config = make(digits_dir, {"student": Distill(recipe(1.0), student=fewer)})
    with pytest.raises(ValueError, match="has 9 classes, the teacher 10"):
        pipeline.run(config, tmp_path / "b", progress=False)
    config.stages.student.loss.temperature = -1.0
    with pytest.raises(ValueError, match=r"stages.student.loss: temperature is -1"):
        pipeline.run(config, tmp_path / "c", progress=False)


def test_what_will_not_fit_is_refused_before_the_teacher_is_trained(digits_dir, tmp_path):
    convs = pipeline.ModelSpec("plain_cnn", {"widths": (4, 4), "hidden": (8,)})

    def refuse(student, loss, message, **stages):
        before = {"teacher": Train(recipe(1e6)), "keep": KeepTeacher(), **stages}
        config = make(digits_dir, {**before, "student": Distill(recipe(1.0), loss, student)})
        with pytest.raises(ValueError, match=r"stages.student: " + message):
            pipeline.run(config, tmp_path / "run", progress=False)
        assert not (tmp_path / "run" / "seed0").exists()

    hint = DistillConfig(hint_weight=1.0, hints=(("denses/1", "denses/0"),))
    refuse(mlp(10), hint, "student: .*'denses/1' matches nothing")
    refuse(
        mlp(10), hint, "student: .*'denses/1'", again=KeepTeacher(add=True), back=RecallTeacher()
    )
    rank = DistillConfig(hint_weight=1.0, hints=(("convs/0", "denses/0"),))
    refuse(convs, rank, "no adapter from 'convs/0'")
    fewer = pipeline.ModelSpec("plain_mlp", {"hidden": (8,), "num_classes": 9})
    refuse(fewer, DistillConfig(), "the student has 9 classes, the teacher 10")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("digits_distill", (1, 8, 8, 1)),
        ("cifar10_resnet56_to_resnet20_kd", (1, 32, 32, 3)),
        ("cifar10_fsp_transfer", (1, 32, 32, 3)),
        ("cifar10_gradient_attention_transfer", (1, 32, 32, 3)),
    ],
)
def test_configs_name_layers_that_exist(root, name, shape):
    run = pipeline.from_config(pipeline.load_config(root / "configs" / f"{name}.py"))
    image = jax.ShapeDtypeStruct(shape, np.float32)
    fields = {"num_classes": 10}
    teacher = models.abstract(run.model.name, **{**fields, **run.model.fields})
    for stage in run.stages.values():
        if isinstance(stage, Distill):
            spec = stage.student
            student = models.abstract(spec.name, **{**fields, **spec.fields})
            plan = distillation.plan_distillation(stage.loss, student, teacher, image)
            assert len(plan.pairs) == len(stage.loss.hints) + 2 * len(stage.loss.fsp)
            if "cifar" in name:  # the widths of both networks agree
                assert all(pair.equal for pair in plan.pairs)
