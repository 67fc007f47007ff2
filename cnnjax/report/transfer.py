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
      One row a way: accuracy in percent, mean (min-max) over the seeds, the mean's difference to
      the student alone and in how many seeds it is above it; then images per second relative to
      it.
    """
    runs = _runs(results)
    if not runs:
        return ""
    speeds = speeds or {}
    header = ["student", *_titles(runs), *(f"images/s, {pair}" for pair in speeds)]
    rows = []
    for way, (title, _) in WAYS.items():
        cells = [title]
        for record, found in runs:
            cells.append(_accuracy(found[way], found["alone"], way) + _wins(record, found, way))
        for pair in speeds.values():
            ratio = pair["images_per_second"].get(way)
            cells.append("" if ratio is None else f"{ratio:.2f}")
        rows.append(cells)
    return markdown_table(header, rows)


def throughput_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Images per second of every student's training in the runs themselves; empty if none has any.

    Args:
      results: result records, as for `transfer_table`.

    Returns:
      One row a way: images per second of the last interval of its training, mean over the seeds;
      where there is a first stage, its own behind a slash. The last row has the minutes of a seed,
      all stages.
    """
    runs = [(r, f) for r, f in _runs(results) if any(_speeds(r, f, way) for way in WAYS)]
    if not runs:
        return ""
    rows = [[t, *(_speeds(r, f, way) for r, f in runs)] for way, (t, _) in WAYS.items()]
    minutes = [sum(s["seconds"]["mean"] for s in r["stages"]) / 60 for r, _ in runs]
    rows.append(["minutes a seed, all stages", *(f"{m:.1f}" for m in minutes)])
    return markdown_table(["student", *_titles(runs)], rows)


def cache_table(speeds: Mapping[str, Mapping[str, Any]]) -> str:
    """Cached targets against a teacher on the fly: images per second, relative to the latter.

    Args:
      speeds: of ``benchmarks/distill_step.py``, with ``"cached_over_online"``; empty: no table.
    """
    names = list(dict.fromkeys(n for p in speeds.values() for n in p.get("cached_over_online", ())))
    if not names:
        return ""
    rows = []
    for name in names:
        way, _, place = name.rpartition("_")
        cells = [p["cached_over_online"].get(name) for p in speeds.values()]
        shown = ("" if c is None else f"{c:.2f}" for c in cells)
        rows.append([f"{WAYS[way][0]}, targets: {place}", *shown])
    return markdown_table(["cached over on the fly", *speeds], rows)


def _runs(results: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], dict[str, Any]]]:
    runs = []
    for record in results:
        stages = {s["name"]: s for s in record["stages"]}
        found = {way: _stage(stages, way) for way in WAYS}
        if found["alone"] is not None and sum(s is not None for s in found.values()) > 2:
            runs.append((record, found))
    return runs


def _titles(runs: Sequence[tuple[Mapping[str, Any], Any]]) -> list[str]:
    out = []
    for record, _ in runs:
        seeds, extent = len(record["seeds"]), ", reduced" if record["reduced"] else ""
        out.append(f"{record['name']} ({seeds} seed{'s' if seeds > 1 else ''}{extent})")
    return out


def _wins(record: Mapping[str, Any], found: Mapping[str, Any], way: str) -> str:
    """In how many seeds a way is above the student alone; empty for one seed."""
    seeds = record.get("per_seed", ())
    if way == "alone" or found[way] is None or len(seeds) < 2:
        return ""
    name = found[way]["name"]
    wins = sum(seed[name]["error"] < seed["alone"]["error"] for seed in seeds)
    return f" ({wins} of {len(seeds)})"


def _speeds(record: Mapping[str, Any], found: Mapping[str, Any], way: str) -> str:
    if found[way] is None:
        return ""
    seeds = [seed[found[way]["name"]] for seed in record.get("per_seed", ())]
    out = []
    for key in ("images_per_second", "first_images_per_second"):
        values = [s[key] for s in seeds if key in s]
        if values:
            out.append(f"{sum(values) / len(values):,.0f}")
    return " / ".join(out)


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
