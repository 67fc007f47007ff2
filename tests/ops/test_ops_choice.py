"""The choice of forms against the file of measured ratios that it says it follows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cnnjax import ops
from cnnjax.ops import choice

SAME = {1: ((0, 0), (0, 0)), 3: ((1, 1), (1, 1)), 5: ((2, 2), (2, 2)), 7: ((3, 3), (3, 3))}


@pytest.fixture(scope="module")
def rows(root):
    record = json.loads((root / "benchmarks" / "results" / "conv_forms.json").read_text())
    assert record["backend"] == "cpu"
    assert not record["reduced"]
    return record["rows"]


def ratios(rows, kind, part=None, form=None):
    found = [r["native_over_form"] for r in rows if r["kind"] == kind and part in (None, r["part"])]
    assert len(found) > 3
    return np.array([v for r in found for f, v in r.items() if form in (None, f)])


def now(row):
    """What the rules choose today for a row of the file."""
    n, side = row["batch"], row["size"]
    if row["kind"] == "shuffle":
        case = ops.ShuffleCase((n, side, side, row["channels"]), row["groups"])
        return choice.choose_shuffle(case, platform="cpu")
    c_in, c_out = row["channels"]
    k = row["kernel"]
    spec = ops.ConvSpec((row["stride"],) * 2, SAME[k], (1, 1), row["groups"])
    case = ops.ConvCase(spec, (n, side, side, c_in), (k, k, c_in // row["groups"], c_out))
    assert case.kind == row["kind"]
    return ops.choose(case, row["part"], platform="cpu")


def test_the_file_was_measured_with_these_rules(rows):
    assert [r["chosen"] for r in rows] == [now(r) for r in rows]


def test_the_rules_pick_what_is_fast(rows):
    lost = np.array([r["chosen_over_best"] for r in rows])
    assert lost.max() < 2
    assert np.mean(lost > 1.1) < 0.15


def test_what_the_docstring_says_holds_in_the_file(rows):
    depthwise = ratios(rows, "depthwise")
    assert depthwise.min() > 1
    assert np.median(depthwise) > 10
    grouped = ratios(rows, "grouped", "kernel_grad")
    assert grouped.min() > 5
    assert grouped.max() > 100
    parts = [ratios(rows, "pointwise", p) for p in ("forward", "input_grad", "kernel_grad")]
    medians = [np.median(p) for p in parts]
    assert min(medians) > 1.05
    assert max(medians) == medians[2]
    cramped = [
        r["native_over_form"]["dot"]
        for r in rows
        if r["kind"] == "dense" and r["chosen"] == "dot" and r["part"] != "kernel_grad"
    ]
    assert len(cramped) > 3
    assert min(cramped) > 10
    slices = ratios(rows, "shuffle", form="stack")
    assert np.median(slices) > 1.2


@pytest.mark.parametrize("platform", ["gpu", "tpu", None])
def test_nothing_is_chosen_without_a_measurement(platform):
    spec = ops.ConvSpec((1, 1), SAME[3], (1, 1), 8)
    case = ops.ConvCase(spec, (1, 8, 8, 8), (3, 3, 1, 8))
    assert ops.choose(case, "forward", platform=platform) == "native"
    shuffled = ops.ShuffleCase((1, 8, 8, 24), 3)
    assert choice.choose_shuffle(shuffled, platform=platform) == "native"


def test_pools_follow_their_file(root):
    record = json.loads((root / "benchmarks" / "results" / "pool_forms.json").read_text())
    assert record["backend"] == "cpu"
    assert min(r["native_over_ours"] for r in record["rows"]) > 4
    assert max(r["native_over_ours"] for r in record["rows"]) > 12
    assert choice.choose_pool(platform="cpu") == "slices"
    assert {choice.choose_pool(platform=p) for p in ("gpu", "tpu", None)} == {"native"}
