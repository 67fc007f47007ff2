"""The table of students side by side: accuracies, differences, throughput."""

from __future__ import annotations

from cnnjax import report


def record(name, seeds, reduced, **errors):
    def stage(key, values):
        error = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        return {"name": key, "error": error}

    stages = [stage(key, values) for key, values in errors.items()]
    return {"name": name, "seeds": seeds, "reduced": reduced, "stages": stages}


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
    assert rows["KD"] == ["90.00, +5.00", "60.00, +10.00", "0.50"]
    # one row for both names of the way, which no speed was measured of
    assert rows["FitNet: hint, then KD"] == ["75.00 (70.00-80.00), -10.00", "40.00, -10.00", ""]
    assert rows["DKD"] == ["", "", ""]
    assert report.transfer_table([pruning]) == ""
