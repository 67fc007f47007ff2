"""Expected against measured for every small reproduction of the pruning methods: one row a method.

    python configs/pruning_repro.py

Reads the result files named in the rows and runs nothing; the figures of each expectation stand in
the tables of those files. Writes ``configs/results/pruning_repro.json``;
`scripts/update_results.py` makes a table of it.
"""

# [measured]
# [/measured]

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from cnnjax import report

RESULTS = pathlib.Path(__file__).parent / "results"
# entries of digits_pruning.json under another name than their method's
ENTRIES = {"xor": "optimal_brain_surgeon"}
NOTE = (
    "rows: those of the file that state an expectation (claims, and figures of an independent "
    "calibration); met: how many hold. Coding methods have a table of their own"
)


def spread(values: list[float]) -> str:
    """Mean (min-max)."""
    mean = sum(values) / len(values)
    return report.spread({"mean": mean, "min": min(values), "max": max(values)})


def of_table(rows: list[list[Any]]) -> tuple[str, str]:
    """(how many expectations are met, which are not) of rows entry, expected, measured, met."""
    stated = [r for r in rows if r[3]]
    missed = [f"{r[0]}: {r[2]}, expected {r[1]}" for r in stated if r[3] == "no"]
    return f"{len(stated) - len(missed)} of {len(stated)}", "; ".join(missed)


def digits(record: dict[str, Any]) -> list[list[str]]:
    """A row for every method of `pruning_digits.py`."""
    found: dict[str, list[list[Any]]] = {}
    for row in record["rows"]:
        entry, name = row[0].split(": ", 1)
        method = ENTRIES.get(entry, entry)
        if method != "dense":
            found.setdefault(method, []).append([name, *row[1:]])
    out = []
    for method, rows in sorted(found.items()):
        met, missed = of_table(rows)
        if met == "0 of 0":
            met = "reported"
            missed = "; ".join(f"{r[0]}: {r[2]}" for r in rows)
        out.append([method, "digits", met, missed, "digits_pruning"])
    return out


def within(dense: list[float], after: list[float], limit: float) -> tuple[str, list[float]]:
    """(seeds that lose at most so many points, the losses)."""
    lost = [b - a for a, b in zip(dense, after)]
    return f"{sum(x <= limit for x in lost)} of {len(lost)} seeds", lost


def magnitude(record: dict[str, Any]) -> list[str]:
    """12x at 0.3 point of the dense network."""
    runs = record["per_seed"]
    errors = [[100 * r[s]["error"] for r in runs] for s in ("dense", "pruned")]
    met, lost = within(*errors, 0.3)
    ratio = next(s for s in record["stages"] if s["name"] == "pruned")["compression"]["mean"]
    said = f"{ratio:.1f}x, points lost {spread(lost)}; expected 12x, at most 0.3"
    return ["magnitude_prune_retrain", "LeNet-300-100, MNIST", met, said]


def greedy(record: dict[str, Any]) -> list[str]:
    """Densities found for an eighth of the memory, within 0.5 point of the dense network."""
    runs = [r for r in record["runs"] if r["method"] == "memory_bounded_greedy"]
    row = ["memory_bounded_l0", "LeNet-300-100, MNIST"]
    if not runs:
        return [*row, "not run", ""]
    met, lost = within([r["dense_error"] for r in runs], [r["error"] for r in runs], 0.5)
    memory = [8 / r["bits_to_budget"] for r in runs]
    said = f"memory {spread(memory)}x smaller, points lost {spread(lost)}; expected 8x, at most 0.5"
    if record["reduced"]:
        said += "; trainings shortened"
    return [*row, met, said]


def clock(record: dict[str, Any]) -> list[str]:
    """Half of the filters at 0.5 point; the structured remainder is the faster one."""
    met, missed = of_table(record["rows"])
    figures = {r[0]: r[2] for r in record["rows"]}
    kept = (
        "structured: points lost, at most 0.5", "structured: filters removed",
        "structured: time of the remainder", "l1: time of the remainder",
    )  # fmt: skip
    said = "; ".join([f"{k}: {figures[k]}" for k in kept] + ([missed] if missed else []))
    return ["structured_sparsity_learning", "LeNet-5, 10,000 of MNIST", met, said]


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    rows, seeds = [], []
    file = args.results / "digits_pruning.json"
    if file.exists():
        record = json.loads(file.read_text())
        rows, seeds = digits(record), record["seeds"]
    for make, stem, method, where in (
        (magnitude, "mnist_lenet_300_100", "magnitude_prune_retrain", "LeNet-300-100, MNIST"),
        (greedy, "mnist_methods_lenet_300_100", "memory_bounded_l0", "LeNet-300-100, MNIST"),
        (clock, "mnist_structured_clock", "structured_sparsity_learning", "LeNet-5, MNIST"),
    ):
        file = args.results / f"{stem}.json"
        if file.exists():
            rows.append([*make(json.loads(file.read_text())), stem])
        else:
            rows.append([method, where, "not run", "", stem])
    record = {
        "format": report.TABLE,
        "name": "pruning_repro",
        "note": NOTE,
        "seeds": seeds,
        "reduced": False,
        "header": ["method", "on", "met", "expectations that do not hold, or figures", "file"],
        "rows": rows,
        "environment": report.environment(),
    }
    report.write_result(record, args.results / "pruning_repro.json")
    for row in rows:
        print(*row, sep=" | ")


if __name__ == "__main__":
    main()
