"""The table of students side by side: accuracies, differences, throughput."""

from __future__ import annotations

from cnnjax import report


def record(name, seeds, reduced, **errors):
    def stage(key, values):
        error = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        return {"name": key, "error": error, "seconds": {"mean": 60.0}}

    stages = [stage(key, values) for key, values in errors.items()]
    own = [
        {key: {"error": values[i]} for key, values in errors.items()} | {"seed": seed}
        for i, seed in enumerate(seeds)
    ]
    return {"name": name, "seeds": seeds, "reduced": reduced, "stages": stages, "per_seed": own}


def test_rows_columns_and_differences():
    digits = record("digits", [0, 1], False, alone=[0.1, 0.2], kd=[0.1, 0.1], hint_kd=[0.2, 0.3])
    images = record("images", [0], True, alone=[0.5], kd=[0.4], fitnet=[0.6], other=[0.0])
    pruning = record("pruning", [0], False, dense=[0.1], kd=[0.1], dkd=[0.1])
    speeds = {"pair": {"images_per_second": {"alone": 1.0, "kd": 0.5}}}
    lines = report.transfer_table([digits, pruning, images], speeds).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "student", "digits (2 seeds)", "images (1 seed, reduced)", "images/s, pair"
    ]  # fmt: skip
    rows = {row[0]: row[1:] for row in cells[2:]}
    assert rows["student alone"] == ["85.00 (80.00-90.00)", "50.00", "1.00"]
    assert rows["KD"] == ["90.00, +5.00 (1 of 2)", "60.00, +10.00", "0.50"]
    # one row for both names of the way, which no speed was measured of
    assert rows["FitNet: hint, then KD"] == [
        "75.00 (70.00-80.00), -10.00 (0 of 2)", "40.00, -10.00", ""
    ]  # fmt: skip
    assert rows["DKD"] == ["", "", ""]
    assert report.transfer_table([pruning]) == ""


def test_images_per_second_of_the_runs_and_minutes():
    digits = record("digits", [0, 1], False, alone=[0.1, 0.2], kd=[0.1, 0.1], hint_kd=[0.2, 0.3])
    assert report.throughput_table([digits]) == ""  # a run that kept none
    for seed, (a, b) in zip(digits["per_seed"], ((1000.0, 10.0), (3000.0, 20.0))):
        seed["alone"]["images_per_second"] = a
        seed["hint_kd"] |= {"images_per_second": b, "first_images_per_second": 7.0}
    lines = report.throughput_table([digits]).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["student", "digits (2 seeds)"]
    rows = {row[0]: row[1] for row in cells[2:]}
    assert rows["student alone"] == "2,000"
    assert rows["FitNet: hint, then KD"] == "15 / 7"
    assert rows["KD"] == rows["DKD"] == ""
    assert rows["minutes a seed, all stages"] == "3.0"


def test_cached_targets_against_a_teacher_on_the_fly():
    speeds = {
        "small": {"cached_over_online": {"kd_memory": 1.5, "attention_disk": 1.25}},
        "large": {"cached_over_online": {"kd_memory": 2.0}},
    }
    lines = report.cache_table(speeds).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["cached over on the fly", "small", "large"]
    assert cells[2:] == [
        ["KD, targets: memory", "1.50", "2.00"],
        ["attention transfer, targets: disk", "1.25", ""],
    ]
    assert report.cache_table({}) == ""
