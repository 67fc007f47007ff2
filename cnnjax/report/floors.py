"""Floors: accuracies stated before a run, beside what the run measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cnnjax.errors import did_you_mean
from cnnjax.report.tables import markdown_table


def check_floors(expected: Mapping[str, Any], stages: Sequence[str]) -> dict[str, float]:
    """The floors among a run's expected figures, by stage.

    Args:
      expected: ``{stage: {"floor": fraction of the test images right, ...}}``.
      stages: the run's stages.

    Raises:
      ValueError: a floor of an unknown stage, or one that is no fraction between 0 and 1.
    """
    floors = {}
    for stage, figures in expected.items():
        floor = figures.get("floor")
        if floor is None:
            continue
        if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0.0 < floor < 1.0:
            raise ValueError(
                f"expected.{stage}.floor is {floor!r}; a floor is the fraction of test images "
                "right, between 0 and 1"
            )
        if stage not in stages:
            raise ValueError(
                f"expected.{stage}.floor: the run has no such stage.{did_you_mean(stage, stages)}"
            )
        floors[stage] = float(floor)
    return floors


def floor_of(result: Mapping[str, Any], stage: str) -> tuple[float, float, bool] | None:
    """A stage's floor and the worst seed's accuracy, fractions, and whether it lies above.

    Args:
      result: record of `cnnjax.report.result_record`: ``expected`` as for `check_floors`, and the
        measured ``stages``.
      stage: name.

    Returns:
      ``(floor, measured, beaten)``, or None where no floor was stated.
    """
    errors = {s["name"]: s["error"]["max"] for s in result["stages"]}
    floor = check_floors(result.get("expected", {}), list(errors)).get(stage)
    if floor is None:
        return None
    return floor, 1.0 - errors[stage], 1.0 - errors[stage] > floor


def floor_line(result: Mapping[str, Any], stage: str) -> str:
    """One line of text about a stage's floor; empty where none was stated."""
    found = floor_of(result, stage)
    if found is None:
        return ""
    floor, measured, beaten = found
    verdict = "beaten" if beaten else "NOT beaten"
    return f"floor: {100 * floor:.2f} % right, measured {100 * measured:.2f} %: {verdict}"


def floors_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown over result files: stages with a floor; empty if there are none."""
    rows = []
    for result in results:
        for s in result["stages"]:
            found = floor_of(result, s["name"])
            if found is not None:
                floor, measured, beaten = found
                rows.append(
                    (
                        f"{result['name']}: {s['name']}",
                        f"{100 * floor:.2f}",
                        f"{100 * measured:.2f}",
                        "yes" if beaten else "no",
                        len(result["seeds"]),
                        "reduced" if result["reduced"] else "full",
                    )
                )
    if not rows:
        return ""
    header = ("run", "floor, accuracy %", "measured, worst seed", "beaten", "seeds", "extent")
    return markdown_table(header, rows)
