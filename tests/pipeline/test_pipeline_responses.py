"""Factorization with data on digits: reconstruction, layer by layer, constrained, branches."""

from __future__ import annotations

import pytest

from cnnjax import data, pipeline, report, training
from cnnjax.factorization import Reconstruction
from cnnjax.pipeline.stages import (
    Branches,
    Constrain,
    Factorize,
    LayerRule,
    Layerwise,
    Reconstruct,
    Train,
)

WIDTHS = {"widths": (8, 16), "hidden": (16,)}


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    data.info("digits", folder)
    return folder


def recipe(epochs, base=3e-3):
    schedule = training.ScheduleConfig("cosine", base=base)
    return pipeline.Recipe(epochs=epochs, schedule=schedule, checkpoint_every=epochs)


def config(digits_dir, stages):
    made = pipeline.config_dict(
        "responses",
        model=pipeline.ModelSpec("plain_cnn", WIDTHS),
        data=pipeline.DataConfig(
            "digits", data_dir=str(digits_dir), batch_size=64, eval_batch_size=355, workers=0
        ),
        stages=stages,
    )
    made.data_parallel = False
    return made


@pytest.mark.method("asymmetric_3d")
def test_branches_before_and_after_fine_tuning(digits_dir, tmp_path):
    convs = "convs/*"
    branches = Branches(
        {
            "weights": Factorize({convs: LayerRule("basis", 0.4)}, recalibrate=0),
            "responses": Reconstruct(
                {convs: LayerRule("basis", 0.4)},
                macs=0.0,
                images=256,
                fit=Reconstruction(rounds=5),
            ),
            "both": Reconstruct({convs: LayerRule("asymmetric_3d")}, macs=0.6, images=256),
        },
        recipe(1.0, 1e-3),
    )
    made = config(digits_dir, {"dense": Train(recipe(6.0)), "curves": branches})
    found = pipeline.run(made, tmp_path, progress=False)
    dense, curves = found["runs"][0]["stages"]
    points = {p["branch"]: p for p in curves["curve"]}
    assert list(points) == ["weights", "responses", "both"]
    assert curves["accuracy"] == dense["accuracy"]  # the network itself goes on
    # equal ranks: what was fitted to responses is better off
    assert points["weights"]["macs_share"] == points["responses"]["macs_share"]
    assert points["responses"]["accuracy_first"] > points["weights"]["accuracy_first"]
    assert points["both"]["macs_share"] < 0.75
    assert points["both"]["accuracy"] > 0.8
    record = report.result_record(found)
    assert [row["branch"] for row in record["branches"]] == list(points)
    assert "responses, before fine-tuning" in report.results_table([record])
    # a finished run says so and repeats nothing
    assert pipeline.run(made, tmp_path, progress=False) == found


@pytest.mark.method("iterative_layerwise_finetune")
def test_layerwise_fine_tunes_once_for_each_layer(digits_dir, tmp_path):
    stage = Layerwise(
        {"convs/*": LayerRule("cp", 6, {"restarts": 1, "iterations": 20, "always": True})},
        recipe(1.0),
    )
    made = config(digits_dir, {"dense": Train(recipe(4.0)), "cp": stage})
    found = pipeline.run(made, tmp_path, progress=False)["runs"][0]["stages"][1]
    assert [p["path"] for p in found["curve"]] == ["convs/0", "convs/1"]
    assert found["metrics"]["fine_tunings"] == 2
    assert all(not row["kept"] for row in found["metrics"]["layers"])
    assert found["accuracy"] > 0.5
    logs = sorted(p.name for p in (tmp_path / "seed0" / "cp").glob("layer*"))
    assert len([name for name in logs if name.startswith("layer000")]) >= 1


@pytest.mark.method("low_rank_constrained_training")
def test_constrained_layers_train_from_scratch(digits_dir, tmp_path):
    stage = Constrain({"convs/*": LayerRule("spatial", "macs 0.6")})
    made = config(digits_dir, {"small": stage, "trained": Train(recipe(6.0))})
    small, trained = pipeline.run(made, tmp_path, progress=False)["runs"][0]["stages"]
    assert small["metrics"]["macs_share"] < 0.75
    assert trained["accuracy"] > max(0.85, small["accuracy"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Branches({}), "branches is empty"),
        (lambda: Branches({"a/b": Train()}), "becomes a folder"),
        (lambda: Branches({"a": {"stage": "trian"}}), "unknown stage 'trian'"),
        (lambda: Reconstruct(macs=1.0), "macs is 1.0"),
        (lambda: Reconstruct(images=0), "images is 0"),
        (lambda: Layerwise(order="up"), "order is 'up'"),
        (lambda: Constrain(start="zeros"), "start is 'zeros'"),
        (lambda: Constrain({"**": LayerRule("cp")}), "'spatial' or 'keep'"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
