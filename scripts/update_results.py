"""Writes the figures of result files into the headers of their configs, and a table of all.

    python scripts/update_results.py            # configs/results/*.json -> configs/*.py, a table
    python scripts/update_results.py --check    # exit 1 if something is out of date

Nobody types figures: a run writes its result file (``scripts/run.py --result=...``), this writes
what stands between the markers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TITLE = """# Measured results

Written by `scripts/update_results.py` from the JSON files beside it; each of those was written by
`python scripts/run.py --config=configs/NAME.py --result=configs/results/NAME.json`.
"Published" is what the paper named in the config reports.

"""

TAUGHT = """
## Students of one teacher side by side

Accuracy in percent of the last epoch, mean (min-max) over the seeds, the difference to the same
student without a teacher (and in how many seeds it is above it); images per second of the training
step relative to the student alone (`benchmarks/distill_step.py`; of FitNet and FSP the first
stage's step, of Fisher pruning the step while the network still has the teacher's size; `digits`
and `cifar` are the networks of those configs). With Fisher pruning the student is the teacher with
maps removed, so of another shape.

"""

RATES = """
Images per second of the training in the runs themselves, each on its own with whatever else the
machine did (behind a slash: of a first stage, or while maps are removed):

"""

CACHED = """
Images per second with targets cached ahead, relative to a teacher that runs in every step
(`benchmarks/distill_step.py`):

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--configs", type=pathlib.Path, default=ROOT / "configs")
    parser.add_argument("--check", action="store_true", help="change nothing, say what would")
    flags = parser.parse_args(argv)
    from cnnjax import files, report

    stale = []
    records, tables = [], []
    try:
        for file in sorted((flags.configs / "results").glob("*.json")):
            if json.loads(file.read_text()).get("format") not in (report.FORMAT, report.TABLE):
                continue  # of a benchmark, which writes its own page
            record = report.read_result(file)
            (tables if record["format"] == report.TABLE else records).append(record)
            config = flags.configs / f"{file.stem}.py"
            if not config.exists():
                continue
            if report.update_header(config, record, dry=flags.check):
                stale.append(str(config))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = flags.configs / "results" / "README.md"
    text = TITLE + report.results_table(records) + "\n"
    if floors := report.floors_table(records):
        text += "\nFloors stated in the configs before the runs, and whether they were beaten:\n\n"
        text += floors + "\n"
    if cut := report.surgery_table(records):
        text += "\nStages that remove channels or blocks, with the speed measured in the run:\n\n"
        text += cut + "\n"
    speeds = ROOT / "benchmarks" / "results" / "distill_step.json"
    pairs = json.loads(speeds.read_text())["pairs"] if speeds.exists() else {}
    if taught := report.transfer_table(records, pairs):
        text += TAUGHT + taught + "\n"
        if rates := report.throughput_table(records):
            text += RATES + rates + "\n"
        if cached := report.cache_table(pairs):
            text += CACHED + cached + "\n"
    for record in tables:
        table = report.markdown_table(record["header"], record["rows"])
        text += f"\n## {record['name']}\n\n{record['note']}.\n\n{table}\n"
    if (records or tables) and (not page.exists() or page.read_text() != text):
        stale.append(str(page))
        if not flags.check:
            files.write_text(page, text)
    for name in stale:
        print(("out of date: " if flags.check else "updated: ") + name)
    return int(flags.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
