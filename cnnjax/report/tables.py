"""Tables for the terminal and in Markdown, made from results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Sequence[Any]


def _cells(header: Row, rows: Sequence[Row]) -> list[list[str]]:
    table = [[str(c) for c in row] for row in (header, *rows)]
    for row in table:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header {len(header)}: {row}")
    return table


def text_table(header: Row, rows: Sequence[Row]) -> str:
    """Aligned columns for the terminal: the first to the left, numbers to the right.

    Raises:
      ValueError: a row of another length.
    """
    table = _cells(header, rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]

    def line(row: list[str]) -> str:
        rest = "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:]))
        return f"{row[0]:<{widths[0]}}{rest}".rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(table[0]), rule, *map(line, table[1:])])


def markdown_table(header: Row, rows: Sequence[Row]) -> str:
    """A Markdown table; pipes in cells are escaped.

    Raises:
      ValueError: a row of another length.
    """
    table = [[c.replace("|", "\\|") for c in row] for row in _cells(header, rows)]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "| --- |" + " ---: |" * (len(header) - 1))
    return "\n".join(lines)


def human(count: float | int) -> str:
    """A count with three or four significant digits: 266610 -> '266.6k'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(count) >= size:
            scale = 1e3 if unit == "k" else size
            return (
                f"{count / scale:.1f}{unit}"
                if count / scale >= 100
                else f"{count / scale:.2f}{unit}"
            )
    return f"{count:,.0f}"


def spread(values: Mapping[str, float], digits: int = 2, scale: float = 1.0) -> str:
    """``mean (min-max)`` of a summary; the mean alone if there is one value."""
    mean = f"{scale * values['mean']:.{digits}f}"
    if values["min"] == values["max"]:
        return mean
    return f"{mean} ({scale * values['min']:.{digits}f}-{scale * values['max']:.{digits}f})"


def run_table(result: Mapping[str, Any]) -> str:
    """A run's report for the terminal: one row per stage, means over the seeds."""
    first = result["summary"][0]["params"]["mean"]
    rows = []
    for s in result["summary"]:
        rows.append(
            (
                s["name"],
                spread(s["accuracy"], scale=100.0),
                human(s["params"]["mean"]),
                human(s["nonzeros"]["mean"]),
                f"{first / s['nonzeros']['mean']:.1f}x",
                human(s["bytes"]["mean"]),
                human(s["sparse_bytes"]["mean"]),
                human(s["macs"]["mean"]),
                human(s["effective_macs"]["mean"]),
                f"{s['seconds']['mean']:.1f}",
            )
        )
    header = (
        "stage",
        "accuracy %",
        "params",
        "non-zero",
        "ratio",
        "bytes",
        "bytes CSR",
        "MACs",
        "non-zero MACs",
        "seconds",
    )
    seeds = len(result["runs"])
    title = f"{result['name']}: {result['model']} on {result['data']}"
    title += f", {result['test_images']} test images" if result.get("test_images") else ""
    title += f", mean (min-max) of {seeds} seeds" if seeds > 1 else ""
    parts = [title, "", text_table(header, rows)]
    curve = next((s["curve"] for s in result["runs"][0]["stages"] if s["curve"]), None)
    if curve and all("sparsity" in p and "accuracy" in p for p in curve):
        steps = [
            (
                f"{100 * p['sparsity']:.2f}",
                f"{p['nonzeros']:,}",
                f"{100 * p['accuracy_before_retraining']:.2f}"
                if "accuracy_before_retraining" in p
                else "",
                f"{100 * p['accuracy']:.2f}",
            )
            for p in curve
        ]
        names = ("removed %", "non-zero", "accuracy % when cut", "after retraining")
        seed = f" (seed {result['runs'][0]['seed']})" if seeds > 1 else ""
        parts += ["", f"on the way{seed}", "", text_table(names, steps)]
    return "\n".join(parts)


_SURGERY = {
    "accuracy % before": ("accuracy_before", 100.0, ""),
    "shrunk": ("accuracy_after_shrinking", 100.0, ""),
    "recalibrated": ("accuracy_after_recalibration", 100.0, ""),
    "fine-tuned": ("accuracy_after_fine_tuning", 100.0, ""),
    "MACs left": ("macs_share", 1.0, "x"),
    "parameters left": ("params_share", 1.0, "x"),
    "measured speed-up": ("speed_up", 1.0, "x"),
}


def surgery_figures(result: Mapping[str, Any], stage: str) -> dict[str, str]:
    """What a stage that removes channels measured, mean (min-max) of the seeds; or nothing."""
    found = [seed[stage] for seed in result.get("per_seed", []) if stage in seed]
    if not found or not all("accuracy_after_shrinking" in one for one in found):
        return {}
    out = {}
    for name, (key, scale, unit) in _SURGERY.items():
        values = [one[key] for one in found if key in one]
        if values:
            mean = sum(values) / len(values)
            summary = {"mean": mean, "min": min(values), "max": max(values)}
            out[name] = spread(summary, scale=scale) + unit
    return out


def surgery_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown over the stages that removed channels: accuracy, cost left, measured speed-up."""
    rows = []
    for result in results:
        for s in result.get("stages", []):
            cut = surgery_figures(result, s["name"])
            if cut:
                name = f"{result['name']}: {s['name']}"
                rows.append((name, *(cut.get(key, "") for key in _SURGERY)))
    return markdown_table(("run", *_SURGERY), rows) if rows else ""


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown over result files: one row per stage, expected beside measured.

    Args:
      results: records of `cnnjax.report.result_record`; their ``expected`` maps a stage's name to
        ``{"error": fraction, "compression": ratio, "source": text}`` (all optional).
    """
    rows = []
    for result in results:
        for s in result["stages"]:
            expected = result.get("expected", {}).get(s["name"], {})
            published = f"{100 * expected['error']:.2f}" if "error" in expected else ""
            ratio = f"{expected['compression']:.0f}x" if "compression" in expected else ""
            rows.append(
                (
                    f"{result['name']}: {s['name']}",
                    spread(s["error"], scale=100.0),
                    published,
                    f"{s['compression']['mean']:.2f}x",
                    ratio,
                    f"{s['nonzeros']['mean']:,.0f}",
                    len(result["seeds"]),
                    "reduced" if result["reduced"] else "full",
                )
            )
        for row in result.get("branches", []):
            share = f"{1 / row['params_share']['mean']:.2f}x, {row['macs_share']['mean']:.2f} MACs"
            extent = "reduced" if result["reduced"] else "full"
            for key, when in (("error_first", "before"), ("error", "after")):
                rows.append(
                    (
                        f"{result['name']}: {row['branch']}, {when} fine-tuning",
                        spread(row[key], scale=100.0),
                        "",
                        share,
                        "",
                        "",
                        len(result["seeds"]),
                        extent,
                    )
                )
    header = (
        "run",
        "error % mean (min-max)",
        "published",
        "ratio",
        "published",
        "non-zeros",
        "seeds",
        "extent",
    )
    return markdown_table(header, rows)
