"""Students of one teacher side by side: accuracy of every way of teaching, and its throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cnnjax.report.tables import markdown_table, spread

# name of the stage (other names of the same way) -> row
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "alone": ("student alone", ()),
    "kd": ("KD", ()),
    "fitnet": ("FitNet: hint, then KD", ("hint_kd",)),
    "attention": ("attention transfer", ()),
    "fsp": ("FSP, then labels", ()),
    "dkd": ("DKD", ()),
    "fisher_kd": ("Fisher pruning + KD", ()),
}


def transfer_table(
    results: Sequence[Mapping[str, Any]], speeds: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """A markdown table of the ways of teaching in several runs; empty if no run has any.

    Args:
      results: result records with a stage ``"alone"`` and at least one other of `WAYS`.
      speeds: ``{pair of networks: {"images_per_second": {way: relative to alone}}}`` of
        ``benchmarks/distill_step.py``.

    Returns:
      One row a way: accuracy in percent, mean (min-max) over the seeds, and the mean's difference
      to the student alone; then images per second relative to it.
    """
    runs = []
    for record in results:
        stages = {s["name"]: s for s in record["stages"]}
        found = {way: _stage(stages, way) for way in WAYS}
        if found["alone"] is not None and sum(s is not None for s in found.values()) > 2:
            runs.append((record, found))
    if not runs:
        return ""
    speeds = speeds or {}
    header = ["student"]
    for record, _ in runs:
        seeds, extent = len(record["seeds"]), ", reduced" if record["reduced"] else ""
        header.append(f"{record['name']} ({seeds} seed{'s' if seeds > 1 else ''}{extent})")
    header += [f"images/s, {pair}" for pair in speeds]
    rows = []
    for way, (title, _) in WAYS.items():
        cells = [title]
        for _, found in runs:
            cells.append(_accuracy(found[way], found["alone"], way))
        for pair in speeds.values():
            ratio = pair["images_per_second"].get(way)
            cells.append("" if ratio is None else f"{ratio:.2f}")
        rows.append(cells)
    return markdown_table(header, rows)


def _stage(stages: Mapping[str, Any], way: str) -> Any:
    return next((stages[name] for name in (way, *WAYS[way][1]) if name in stages), None)


def _accuracy(stage: Any, alone: Any, way: str) -> str:
    if stage is None:
        return ""
    error = stage["error"]
    values = {"mean": 1 - error["mean"], "min": 1 - error["max"], "max": 1 - error["min"]}
    text = spread(values, scale=100.0)
    if way != "alone":
        text += f", {100 * (alone['error']['mean'] - error['mean']):+.2f}"
    return text
