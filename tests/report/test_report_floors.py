"""Floors stated before a run: compared in the report, in the config's header and in the table."""

from __future__ import annotations

import json
import pathlib

import pytest

from cnnjax import data, pipeline, report, training
from cnnjax.pipeline.stages import Train
from scripts import update_results


def record(error, floor, name="demo"):
    """Two seeds, the worse a tenth of a point above ``error``."""
    stage = {
        "name": "train",
        "kind": "Train",
        "error": {"mean": error, "min": error - 0.001, "max": error + 0.001},
        "nonzeros": {"mean": 10.0, "min": 10.0, "max": 10.0},
        "compression": {"mean": 1.0, "min": 1.0, "max": 1.0},
    }
    return {
        "format": report.FORMAT,
        "name": name,
        "seeds": [0, 1],
        "reduced": False,
        "stages": [stage],
        "expected": {"train": {"floor": floor, "source": "stated before the run"}},
        "environment": {"cpu_cores": 2, "devices": 1, "device": "cpu", "jax": "0"},
    }


@pytest.mark.parametrize(
    ("error", "beaten"), [(0.5, True), (0.5489, True), (0.549, False), (0.56, False)]
)
def test_the_worst_seed_must_lie_above_the_floor(error, beaten):
    one = record(error, 0.45)
    floor, measured, verdict = report.floor_of(one, "train")
    assert (floor, verdict) == (0.45, beaten)
    assert measured == pytest.approx(1 - error - 0.001)
    words = "measured 45.01 %: beaten" if error == 0.5489 else "beaten"
    assert report.floor_line(one, "train").endswith(words if beaten else "NOT beaten")


def test_no_floor_no_line():
    one = record(0.5, 0.45)
    one["expected"] = {"train": {"error": 0.1, "source": "the paper"}}
    assert report.floor_of(one, "train") is None
    assert report.floor_line(one, "train") == ""
    assert report.floors_table([one]) == ""


@pytest.mark.parametrize("floor", [45, 0.0, True, "0.45"])
def test_a_floor_is_a_fraction(floor):
    with pytest.raises(ValueError, match="between 0 and 1"):
        report.check_floors({"train": {"floor": floor}}, ["train"])


def test_a_floor_of_another_stage_is_refused():
    with pytest.raises(ValueError, match="no such stage. Did you mean 'train'"):
        report.check_floors({"trian": {"floor": 0.4}}, ["train"])


def test_the_script_writes_floor_and_verdict(tmp_path):
    folder = tmp_path / "configs"
    (folder / "results").mkdir(parents=True)
    for name, error in (("good", 0.5), ("bad", 0.6)):
        report.write_result(record(error, 0.45, name), folder / "results" / f"{name}.json")
        (folder / f"{name}.py").write_text("# [measured]\n# not run yet\n# [/measured]\n")
    assert update_results.main(["--configs", str(folder)]) == 0
    page = (folder / "results" / "README.md").read_text()
    assert "| good: train | 45.00 | 49.90 | yes | 2 | full |" in page
    assert "| bad: train | 45.00 | 39.90 | no | 2 | full |" in page
    header = (folder / "good.py").read_text()
    assert "#   floor: 45.00 % right, measured 49.90 %: beaten" in header
    assert "measured 39.90 %: NOT beaten" in (folder / "bad.py").read_text()


def test_a_run_reports_its_floor_and_refuses_a_bad_one_before_any_work(tmp_path):
    data.info("digits", tmp_path)
    schedule = training.ScheduleConfig("constant", base=1e-2)

    def config(floor):
        out = pipeline.config_dict(
            "demo",
            model=pipeline.ModelSpec("plain_mlp", {"hidden": (8,)}),
            data=pipeline.DataConfig("digits", data_dir=str(tmp_path), batch_size=64, workers=0),
            stages={"dense": Train(pipeline.Recipe(epochs=0.1, schedule=schedule))},
            expected={"dense": {"floor": floor, "source": "stated before the run"}},
        )
        out.data_parallel = False
        return out

    with pytest.raises(ValueError, match="expected.dense.floor is 99"):
        pipeline.run(config(99), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    result = pipeline.run(config(0.99), tmp_path / "run", progress=False)
    accuracy = result["summary"][0]["accuracy"]["mean"]
    text = (tmp_path / "run" / "report.txt").read_text()
    assert f"dense: floor: 99.00 % right, measured {100 * accuracy:.2f} %: NOT beaten" in text
    assert report.floor_of(report.result_record(result), "dense")[2] is False


def test_the_short_cifar_configs_state_floors():
    root = pathlib.Path(__file__).resolve().parents[2] / "configs"
    found = {}
    for file in sorted(root.glob("cifar10_short_*.py")):
        run = pipeline.from_config(pipeline.load_config(file))
        floors = report.check_floors(run.expected, list(run.stages))
        found[run.model.name] = floors["train"]
        result = root / "results" / f"{file.stem}.json"
        if result.exists():
            # the floor was not lowered after the fact
            stated = json.loads(result.read_text())["config"]["expected"]["train"]["floor"]
            assert stated == floors["train"]
    assert len(found) >= 3
    assert min(found.values()) > 0.2  # twice chance
