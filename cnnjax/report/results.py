"""Result files: JSON written by a run, and the figures that they put into a config's header."""

from __future__ import annotations

import json
import os
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnnjax import files
from cnnjax.report.floors import floor_line
from cnnjax.report.tables import human, spread, surgery_figures

FORMAT = "cnnjax run 1"
TABLE = "cnnjax table 1"  # of a script of its own: header and rows, not stages
BEGIN, END = "# [measured]", "# [/measured]"


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean, min and max over the seeds of every number of every stage, in the stages' order."""
    out = []
    for i, stage in enumerate(runs[0]["stages"]):
        same = [run["stages"][i] for run in runs]
        record: dict[str, Any] = {"name": stage["name"], "kind": stage["kind"]}
        for key, value in stage.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values = [float(s[key]) for s in same]
                record[key] = {
                    "mean": float(np.mean(values)),
                    "min": min(values),
                    "max": max(values),
                }
        out.append(record)
    return out


def result_record(
    report: Mapping[str, Any],
    *,
    reduced: bool = False,
) -> dict[str, Any]:
    """What is kept of a run's report: model, data, seeds, hardware kind, figures per stage.

    Args:
      report: of `cnnjax.pipeline.run`.
      reduced: whether the run was cut short against the config's own lengths.
    """
    return {
        "format": FORMAT,
        "name": report["name"],
        "note": report.get("note", ""),
        "model": report["model"],
        "data": report["data"],
        "test_images": report["test_images"],
        "seeds": [run["seed"] for run in report["runs"]],
        "reduced": reduced,
        "stages": report["summary"],
        "per_seed": [
            {
                s["name"]: {"error": s["error"], "nonzeros": s["nonzeros"], **_numbers(s)}
                for s in run["stages"]
            }
            | {"seed": run["seed"]}
            for run in report["runs"]
        ],
        "branches": _branches(report["runs"]),
        "expected": report["config"].get("expected", {}),
        "environment": report["environment"],
        # where files lay says nothing about the result
        "config": _without_places(
            {**report["config"], "data": {**report["config"]["data"], "data_dir": ""}}
        ),
    }


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's own single figures (its per-layer ones stay in the report)."""
    own = record.get("metrics") or {}
    return {k: v for k, v in own.items() if isinstance(v, int | float) and k not in record}


def _branches(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points of the runs' branches (see the stage ``branches``): mean, min and max over seeds."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        for stage in run["stages"]:
            for point in stage["curve"]:
                if "branch" in point:
                    found.setdefault((stage["name"], point["branch"]), []).append(point)
    out = []
    for (stage_name, branch), points in found.items():
        row: dict[str, Any] = {"stage": stage_name, "branch": branch}
        for key in ("macs_share", "params_share"):
            row[key] = _spread([float(p[key]) for p in points])
        row["error_first"] = _spread([1.0 - p["accuracy_first"] for p in points])
        row["error"] = _spread([1.0 - p["accuracy"] for p in points])
        out.append(row)
    return out


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}


def _without_places(value: Any) -> Any:
    """The same settings with absolute paths cut down to the file's name."""
    if isinstance(value, Mapping):
        return {k: _without_places(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(v) for v in value]
    if isinstance(value, str) and os.path.isabs(value):
        return os.path.basename(value)
    return value


def write_result(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a result file by one rename; its folder is made."""
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(file, json.dumps(record, indent=1, sort_keys=True) + "\n")


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A result file.

    Raises:
      ValueError: it is not one.
    """
    record = json.loads(pathlib.Path(path).read_text())
    found = record.get("format") if isinstance(record, dict) else None
    if found not in (FORMAT, TABLE):
        raise ValueError(f"{path} is not a run's result: its format is {found!r}, not {FORMAT!r}")
    return record


def header_lines(record: Mapping[str, Any]) -> list[str]:
    """The measured figures as comment lines."""
    env = record["environment"]
    seeds = ", ".join(map(str, record["seeds"]))
    extent = "reduced run" if record["reduced"] else "full run"
    lines = [
        f"# {extent}, seeds {seeds}; {env['cpu_cores']} CPU cores, {env['devices']} x "
        f"{env['device']}, jax {env['jax']}"
    ]
    if record["format"] == TABLE:
        names = record["header"][1:]
        for name, *cells in record["rows"]:
            text = f"{name}: " + ", ".join(f"{n} {c}" for n, c in zip(names, cells) if c != "")
            lines += textwrap.wrap(
                text, 98, initial_indent="# ", subsequent_indent="#   ", break_long_words=False
            )
        return lines
    for s in record["stages"]:
        published = record.get("expected", {}).get(s["name"], {})
        text = f"# {s['name']}: error {spread(s['error'], scale=100.0)} %"
        text += f", {human(s['nonzeros']['mean'])} non-zeros, {s['compression']['mean']:.2f}x"
        lines.append(text)
        cut = surgery_figures(record, s["name"])
        words = [f"{name} {value}" for name, value in cut.items()]
        for some in (words[:3], words[3:]):
            if some:
                lines.append("#   " + ", ".join(some))
        if "error" in published:
            source = published.get("source", "published")
            lines.append(f"#   published: {100 * published['error']:.2f} % ({source})")
        if floor := floor_line(record, s["name"]):
            lines.append(f"#   {floor}")
    for row in record.get("branches", []):
        first, last = (spread(row[key], scale=100.0) for key in ("error_first", "error"))
        lines.append(
            f"# {row['branch']}: {100 * row['macs_share']['mean']:.1f} % of the MACs, error "
            f"{first} % before fine-tuning, {last} % after"
        )
    # lint holds configs to 100 columns
    return [
        piece
        for line in lines
        for piece in textwrap.wrap(line, 100, subsequent_indent="#     ", break_long_words=False)
    ]


def update_header(
    config: str | os.PathLike[str], record: Mapping[str, Any], *, dry: bool = False
) -> bool:
    """Puts the figures of a result between the markers of a config file.

    Args:
      config: the file.
      record: a result.
      dry: change nothing.

    Returns:
      Whether the file changed, or would.

    Raises:
      ValueError: the file has no markers.
    """
    file = pathlib.Path(config)
    text = file.read_text()
    pattern = re.compile(rf"^{re.escape(BEGIN)}\n.*?^{re.escape(END)}$", re.S | re.M)
    if not pattern.search(text):
        raise ValueError(f"{config} has no lines {BEGIN!r} and {END!r} to write between")
    block = "\n".join([BEGIN, *header_lines(record), END])
    new = pattern.sub(lambda _: block, text, count=1)
    if new == text or dry:
        return new != text
    files.write_text(file, new)
    return True
