"""Branches of several runs in one result file."""

from __future__ import annotations

import copy

import pytest

from cnnjax import report


def record(branches, done, error=0.16):
    return {
        "name": "n", "model": "m", "data": "d", "seeds": [0], "reduced": True,
        "stages": [{"name": "dense", "error": {"mean": error}},
                   {"name": "methods", "error": {"mean": error}}],
        "branches": [{"stage": "methods", "branch": b, "error": e} for b, e in done.items()],
        "config": {
            "name": "n", "data": {"name": "d", "data_dir": "x"},
            "stages": {
                "dense": {"recipe": {"epochs": 3, "checkpoint_every": 1}},
                "methods": {"branches": branches, "recipe": {"epochs": 1}, "only": list(done)},
            },
        },
    }  # fmt: skip


OLD = record(
    {"l1": {"method": "l1"}, "slim": {"method": "scale"}, "odd": {"method": "odd"}},
    {"l1": 0.3, "slim": 0.4, "odd": 0.9},
)
NEW = record(
    {"l1": {"method": "l1", "more": 1}, "by_scale": {"method": "scale"},
     "slim": {"method": "scale", "strength": 1, "stage": "slimming"}},
    {"slim": 0.2},
)  # fmt: skip


def test_old_branches_stay_beside_new_ones_and_follow_their_settings():
    old = copy.deepcopy(OLD)
    old["config"]["stages"]["methods"]["branches"]["slim"]["stage"] = "select"
    new = copy.deepcopy(NEW)
    new["config"]["stages"]["methods"]["branches"]["by_scale"]["stage"] = "select"
    merged = report.merge_branches(old, new)
    assert {b["branch"]: b["error"] for b in merged["branches"]} == {
        "l1": 0.3, "by_scale": 0.4, "slim": 0.2,
    }  # fmt: skip
    methods = merged["config"]["stages"]["methods"]
    assert methods["only"] == []
    assert set(methods["branches"]) == {"l1", "by_scale", "slim"}
    again = report.merge_branches(merged, new)
    assert {b["branch"] for b in again["branches"]} == {"l1", "by_scale", "slim"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(seeds=[1]), r"seeds is \[1\] in the new run and \[0\]"),
        (
            lambda r: r["config"]["stages"]["dense"]["recipe"].update(epochs=4),
            "configured differently: stages.dense.recipe.epochs",
        ),
        (
            lambda r: r["stages"][0]["error"].update(mean=0.2),
            "error after dense is 0.2000 in the new run and 0.16 in the old one",
        ),
    ],
)
def test_runs_from_other_networks_are_refused(change, message):
    new = copy.deepcopy(NEW)
    change(new)
    with pytest.raises(ValueError, match=message):
        report.merge_branches(OLD, new)
    new = copy.deepcopy(NEW)
    new["config"]["stages"]["dense"]["recipe"]["checkpoint_every"] = 7  # says nothing
    report.merge_branches(OLD, new)
