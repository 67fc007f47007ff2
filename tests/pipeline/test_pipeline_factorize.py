"""The factorize stage on digits: a budget met, costs counted, resumed; settings checked."""

from __future__ import annotations

import json

import pytest

from cnnjax import factorization, pipeline
from cnnjax.pipeline.stages import CompactMaps, Factorize, LayerRule, Train
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
        ({"keep_faster": True}, "keep_faster needs speed_batch"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Factorize(**options)


def test_bad_widths():
    with pytest.raises(ValueError, match="widths is empty"):
        CompactMaps({})
    with pytest.raises(ValueError, match="images is 0"):
        CompactMaps(images=0)


def test_bad_rules():
    with pytest.raises(ValueError, match="unknown rule 'tuker2'"):
        LayerRule("tuker2")
    with pytest.raises(ValueError, match="'macs NUMBER'"):
        LayerRule("tucker2", "macs half")


def test_the_clock_decides_and_maps_become_codes(tmp_path, monkeypatch):
    asked = []
    real = factorization.keep_faster

    def keep_faster(model, decided, image, *, batch, key):
        def timer(before, after, x):  # the second convolution's factors are slower, the third's not
            shape = x[0].shape if isinstance(x, tuple) else x.shape
            asked.append(shape)
            return (1.0, 2.0) if shape[-1] == 8 else (1.0, 0.5)

        return real(model, decided, image, batch=batch, timer=timer, key=key)

    monkeypatch.setattr(factorization, "keep_faster", keep_faster)
    recipe = pipeline.Recipe(epochs=1.0, checkpoint_every=1.0)
    rules = {"convs/0": LayerRule("keep"), "convs/*": LayerRule("tucker2")}
    config = pipeline.config_dict(
        "clock_test",
        model=pipeline.ModelSpec("plain_cnn", {"widths": (8, 8, 16)}),
        data=pipeline.DataConfig("digits", batch_size=64, workers=0),
        stages={
            "dense": Train(recipe),
            "timed": Factorize({**rules, "denses/0": LayerRule("svd_dense", 8)},
                               recalibrate=0, keep_faster=True, speed_batch=4),
            "codes": CompactMaps({"convs/0": 4}, images=128, steps=5),
        },
    )  # fmt: skip
    config.data_parallel = False
    report = pipeline.run(config, tmp_path, progress=False)
    _, timed, codes = report["runs"][0]["stages"]
    layers = {p["path"]: p for p in timed["metrics"]["layers"]}
    assert "not faster on this device" in layers["convs/1"]["kept"]
    assert layers["convs/1"]["seconds"] == [1.0, 2.0]
    assert layers["denses/0"]["kept"] is None
    assert timed["metrics"]["layers_kept"] == 2
    assert timed["metrics"]["speed_batch"] == 4
    assert {shape[0] for shape in asked} == {4}
    assert list(codes["metrics"]["layers"][0]["channels"]) == [8, 4]
    assert codes["macs"] < timed["macs"]
    # what was decided by the clock is not decided again
    asked.clear()
    (tmp_path / "report.json").unlink()
    again = pipeline.run(config, tmp_path, progress=False)
    assert not asked
    assert json.dumps(again["runs"]) == json.dumps(report["runs"])
