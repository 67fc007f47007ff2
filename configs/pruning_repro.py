"""Expected against measured for every small reproduction of the pruning methods: one row a method.

    python configs/pruning_repro.py

Reads the result files named in the rows and runs nothing; the figures of each expectation stand in
the tables of those files. Writes ``configs/results/pruning_repro.json``;
`scripts/update_results.py` makes a table of it.
"""

# [measured]
# full run, seeds 0, 1, 2; 2 CPU cores, 1 x cpu, jax 0.10.2
# average_percentage_of_zeros: on digits, met reported, expectations that do not hold, or figures
#   rank correlation of APoZ: 0.17 (-0.15-0.33); rank correlation of l1: 0.14 (0.03-0.31); rank
#   correlation of Fisher: 0.82 (0.79-0.89), file digits_pruning
# data_free_neuron_merging: on digits, met 7 of 8, expectations that do not hold, or figures 70 of
#   100 at random: 63.04 (52.89-76.89) %, expected 50-57, file digits_pruning
# dropout: on digits, met 0 of 1, expectations that do not hold, or figures mean error with 0.5
#   not above: 0 of 1, expected holds, file digits_pruning
# dynamic_network_surgery: on digits, met 2 of 4, expectations that do not hold, or figures from
#   trained weights: removed: 81.09 (80.73-81.53) %, expected 88; from untrained weights: removed:
#   77.70 (77.32-78.24) %, expected 88, file digits_pruning
# evolutional_dropout: on digits, met reported, expectations that do not hold, or figures steps to
#   95 %, dropout 0.5: 112.00 (100.00-120.00); steps to 95 %, evolutional: 174.40 (156.00-200.00);
#   evolutional / standard: 1.57 (1.30-2.00) x, file digits_pruning
# fisher_pruning: on digits, met 1 of 1, file digits_pruning
# forward_backward_splitting: on digits, met 3 of 3, file digits_pruning
# group_wise_brain_damage: on digits, met 2 of 2, file digits_pruning
# hard_concrete_l0: on digits, met 12 of 16, expectations that do not hold, or figures 0.1/N:
#   active inputs: 52.00, expected 46; 0.3/N: active first: 94.00 (93.00-95.00), expected 71; 1/N:
#   active inputs: 39.67 (39.00-40.00), expected 31; 1/N: active first: 57.67 (55.00-60.00),
#   expected 22, file digits_pruning
# iterative_hard_thresholding: on digits, met 4 of 4, file digits_pruning
# l1_filter_pruning: on digits, met 4 of 4, file digits_pruning
# lasso_channel_pruning: on digits, met 4 of 4, file digits_pruning
# magnitude_prune_retrain: on digits, met 5 of 5, file digits_pruning
# optimal_brain_damage: on digits, met 5 of 8, expectations that do not hold, or figures 50 %,
#   Gauss-Newton: 96.30 (94.44-97.33) %, expected 97.1-97.8; 50 %, empirical Fisher: 93.48
#   (87.56-96.67) %, expected 96.2-96.4; 80 %, magnitude: 56.30 (40.67-71.33) %, expected 40-49,
#   file digits_pruning
# optimal_brain_surgeon: on digits, met 6 of 7, expectations that do not hold, or figures 80 %,
#   magnitude: 56.30 (40.67-71.33) %, expected 40-49, file digits_pruning
# particle_filter_pruning: on digits, met 1 of 1, file digits_pruning
# pruning_granularity: on digits, met 1 of 1, file digits_pruning
# random_mask_pruning: on digits, met 3 of 4, expectations that do not hold, or figures 4 of 16,
#   random: 54.89 (47.56-64.00) %, expected 56-72, file digits_pruning
# sparse_objective: on digits, met 2 of 3, expectations that do not hold, or figures proximal
#   step: exact zeros: 63.70 (61.04-66.82) %, expected 65-67, file digits_pruning
# structured_surgery: on digits, met 2 of 2, file digits_pruning
# thinet: on digits, met 4 of 4, file digits_pruning
# weight_decay_biases: on digits, met 1 of 2, expectations that do not hold, or figures and
#   converge less often: 0 of 1, expected holds, file digits_pruning
# magnitude_prune_retrain: on LeNet-300-100, MNIST, met 3 of 3 seeds, expectations that do not
#   hold, or figures 12.0x, points lost -0.22 (-0.23--0.21); expected 12x, at most 0.3, file
#   mnist_lenet_300_100
# memory_bounded_l0: on LeNet-300-100, MNIST, met 3 of 3 seeds, expectations that do not hold, or
#   figures memory 9.07 (8.25-10.72)x smaller, points lost 0.08 (-0.02-0.23); expected 8x, at most
#   0.5, file mnist_methods_lenet_300_100
# structured_sparsity_learning: on LeNet-5, 10,000 of MNIST, met 2 of 3, expectations that do not
#   hold, or figures structured: points lost, at most 0.5: 0.38 (0.34-0.43) points; structured:
#   filters removed: 50.95 (48.57-54.29) %; structured: time of the remainder: 0.51 (0.42-0.57) x;
#   l1: time of the remainder: 1.05 (0.97-1.11) x; half of the filters at least: 2 of 3, expected
#   holds, file mnist_structured_clock
# [/measured]

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from mnist_lab import spread

from cnnjax import report

RESULTS = pathlib.Path(__file__).parent / "results"
# entries of digits_pruning.json under another name than their method's
ENTRIES = {"xor": "optimal_brain_surgeon"}
NOTE = (
    "rows: those of the file that state an expectation (claims, and figures of an independent "
    "calibration); met: how many hold. Coding methods have a table of their own"
)


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
