"""The factorize stage on digits: a budget met, costs counted, resumed; settings checked."""

from __future__ import annotations

import json

import pytest

from cnnjax import pipeline
from cnnjax.pipeline.stages import Factorize, LayerRule, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig


def test_a_budget_of_macs_then_training(tmp_path):
    recipe = pipeline.Recipe(
        epochs=2.0,
        optimizer=OptimizerConfig("adam"),
        schedule=ScheduleConfig("cosine", base=2e-3),
        checkpoint_every=2.0,
    )
    rules = {"convs/0": LayerRule("keep"), "convs/*": LayerRule("tucker2")}
    config = pipeline.config_dict(
        "factorize_test",
        model=pipeline.ModelSpec("plain_cnn"),
        data=pipeline.DataConfig("digits", batch_size=64, workers=0),
        stages={
            "dense": Train(recipe),
            "small": Factorize(rules, macs=0.7, recalibrate=0),
            "tuned": Train(recipe),
        },
    )
    config.data_parallel = False
    report = pipeline.run(config, tmp_path, progress=False)
    dense, small, tuned = report["runs"][0]["stages"]
    found = small["metrics"]
    assert 0.4 < found["macs_share"] <= 0.7
    assert small["macs"] == tuned["macs"] == round(found["macs_share"] * dense["macs"])
    assert [layer["path"] for layer in found["layers"]] == ["convs/1"]
    assert tuned["accuracy"] > 0.5
    # what comes after it resumes in the factorized structure
    (tmp_path / "report.json").unlink()
    again = pipeline.run(config, tmp_path, progress=False)
    assert json.dumps(again["runs"]) == json.dumps(report["runs"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 1.5}, "macs is 1.5"),
        ({"macs": 0.5, "params": 0.5}, "one budget"),
        ({"allocation": "best"}, "allocation is 'best'"),
        ({"rules": {}}, "rules is empty"),
        ({"recalibrate": -1}, "recalibrate is -1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Factorize(**options)


def test_bad_rules():
    with pytest.raises(ValueError, match="unknown rule 'tuker2'"):
        LayerRule("tuker2")
    with pytest.raises(ValueError, match="'macs NUMBER'"):
        LayerRule("tucker2", "macs half")
