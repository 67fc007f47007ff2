"""Pruning methods inside real training on 8x8 digits, beside the figures of a calibration.

    python configs/pruning_digits.py all          # or entries by name; one CPU core, minutes

The expected ranges come from an independent implementation of each method on the same data (three
seeds; no paper has figures for it), see `configs/digits_lab.py` for data and networks. A row is
met if the mean of the seeds is not more than 0.7 point below the range ("reach"), or inside it
("about", and baselines: widths, zeros, what random or magnitude choices score); rows without a
verdict are only reported. Every entry writes
``configs/results/digits_pruning.json`` when it is done; `scripts/update_results.py` makes the table
in ``configs/results/README.md`` of it (too long for a header here).
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import digits_lab
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pruning_digits_cnn
import pruning_digits_small
from digits_lab import Lab, Row, assign, full, noise, replaced

from cnnjax import graph, pruning, training
from cnnjax.pruning import gates, importance, obs, penalties

RESULTS = pathlib.Path(__file__).parent / "results" / "digits_pruning.json"
NOTE = (
    "8x8 digits (scikit-learn), 1347 training and 450 test images, MLP 64-100-50-10 and CNN "
    "16-32-64-10; accuracy in percent, mean (min-max) of the seeds; expected: an independent "
    "calibration; one image is 0.22 point"
)
KERNELS: tuple[str, ...] = ("denses/0/kernel", "denses/1/kernel", "head/kernel")


def adam(rate: float = 1e-3) -> Any:
    return optax.adam(rate)


def masked_accuracy(lab: Lab, masks: list[Any]) -> list[float]:
    return [lab.accuracy("mlp", pruning.apply_mask(p, m)) for p, m in zip(lab.dense("mlp"), masks)]


def dense(lab: Lab) -> list[Row]:
    values = [lab.accuracy("mlp", p) for p in lab.dense("mlp")]
    cnn = [lab.accuracy("cnn", p) for p in lab.dense("cnn")]
    return [Row("MLP", (98.2, 98.7), values), Row("CNN", (98.7, 99.1), cnn)]


def sparse_objective(lab: Lab) -> list[Row]:
    """l1 in the loss against a proximal step, both 60 epochs from scratch."""
    strength, start, model = 3e-4, lab.initial("mlp"), lab.model("mlp")
    hooks = training.Hooks(penalty=lambda p, c: penalties.sparsity(p, strength))
    loss = [s.params for s in lab.fit(model, adam(), start, 60, hooks=hooks)]
    spec = {"**/kernel": pruning.Prox("l1", strength)}
    # one threshold for all coordinates: Adam's own steps would be another algorithm
    proximal = pruning.forward_backward_splitting(adam(), spec, 1.0)
    prox = [s.params for s in lab.fit(model, proximal, start, 60)]

    def zeros(p: Any) -> float:
        flat = [np.asarray(w) for w in jax.tree.leaves(p) if np.ndim(w) == 2]
        return 100 * sum(int((w == 0).sum()) for w in flat) / sum(w.size for w in flat)

    return [
        Row("l1 in the loss: exact zeros", (0, 0.5), [zeros(p) for p in loss], "about"),
        Row("l1 in the loss", None, [lab.accuracy("mlp", p) for p in loss], "figure"),
        Row("proximal step: exact zeros", (65, 67), [zeros(p) for p in prox], "about"),
        Row("proximal step", (96.7, 98.2), [lab.accuracy("mlp", p) for p in prox]),
    ]


def retrained(lab: Lab, masks: list[Any], epochs: float) -> list[Any]:
    starts = [pruning.apply_mask(p, m) for p, m in zip(lab.dense("mlp"), masks)]
    fitted = lab.fit(lab.model("mlp"), pruning.masked(adam()), starts, epochs)
    return [s.params for s in fitted]


def magnitude_prune_retrain(lab: Lab) -> list[Row]:
    rows = []
    for sparsity, low, high in ((0.8, 97.3, 97.6), (0.9, 93.1, 94.7), (0.95, 66, 80)):
        masks = [pruning.magnitude_mask(p, sparsity, scope="layer") for p in lab.dense("mlp")]
        random = [pruning.mask_from_scores(s, sparsity, scope="layer") for s in noise(lab)]
        own = [lab.accuracy("mlp", p) for p in retrained(lab, masks, 30)]
        other = [lab.accuracy("mlp", p) for p in retrained(lab, random, 30)]
        name = f"{100 * sparsity:g} %, 30 epochs"
        rows += [Row(name, (low, high), own), Row(f"{name}, random mask", None, other, "figure")]
        if sparsity < 0.95:
            better = [float(a > b) for a, b in zip(own, other)]
            rows.append(Row(f"{name}: above the random mask", None, better, "claim"))
    return rows


def iterative_hard_thresholding(lab: Lab) -> list[Row]:
    """3 cycles of 10 full and 20 masked epochs; the baseline gets the same 90 epochs."""
    optimizer = pruning.iterative_hard_thresholding(
        adam(), 0.1, dense_steps=lab.steps(10), sparse_steps=lab.steps(20), cycles=3
    )
    fitted = lab.fit(lab.model("mlp"), optimizer, lab.dense("mlp"), 90)
    own = [lab.accuracy("mlp", s.params) for s in fitted]
    masks = [pruning.magnitude_mask(p, 0.9, scope="layer") for p in lab.dense("mlp")]
    short, long = ([lab.accuracy("mlp", p) for p in retrained(lab, masks, e)] for e in (30, 90))
    won, mean = [float(a > b) for a, b in zip(own, short)], float(np.mean(own) > np.mean(long))
    return [
        Row("90 %, 3 cycles (90 epochs)", (95.1, 97.1), own),
        Row("90 %, magnitude + 30 epochs", (93.1, 94.7), short, "figure"),
        Row("above magnitude + 30 epochs", None, won, "claim"),
        Row("90 %, magnitude + 90 epochs", None, long, "figure"),
        Row("above magnitude at equal epochs", None, [mean], "mean"),
    ]


def shrunk(lab: Lab, params: Any) -> tuple[Any, tuple[int, ...]]:
    """The MLP without its dead neurons, and its hidden widths."""
    model = lab.build("mlp", params)
    found = graph.trace(model, jnp.zeros((1, 8, 8, 1)))
    keep = pruning.dead_channels(found, jax.tree.map(lambda w: np.asarray(w) != 0, params))
    small = pruning.shrink(model, found, keep)
    return small, tuple(int(d.kernel.shape[1]) for d in small.denses)


def forward_backward_splitting(lab: Lab) -> list[Row]:
    """Group operator on neurons (bias included), 80 epochs from scratch, then really smaller."""
    rows = []
    for strength, first, second, reach in (
        (1.2e-3, (86, 94), (40, 46), (98.4, 98.7)),
        (2e-3, None, None, None),
        (3e-3, None, None, None),
    ):
        spec = {"denses/*/kernel": pruning.Prox("group_l2", strength, group="filter")}
        optimizer = pruning.forward_backward_splitting(adam(), spec, 1.0)
        fitted = lab.fit(lab.model("mlp"), optimizer, lab.initial("mlp"), 80)
        small = [shrunk(lab, s.params) for s in fitted]
        own = [lab.accuracy_of(m) for m, _ in small]
        widths = [[float(w[i]) for _, w in small] for i in (0, 1)]
        name = f"threshold {strength:g}"
        kind = "figure" if reach is None else "about"
        rows += [
            Row(f"{name}: first width", first, widths[0], kind, ""),
            Row(f"{name}: second width", second, widths[1], kind, ""),
            Row(f"{name}: shrunk network", reach, own, "figure" if reach is None else "reach"),
        ]
    return rows


def hard_concrete_l0(lab: Lab) -> list[Row]:
    """Gates on all inputs of all layers, 200 epochs; the gates folded, the network shrunk."""
    spec = dict.fromkeys(KERNELS, "channel")
    rows, total = [], []
    expected = {0.1: ((46, 93, 49), 98.0), 0.3: ((45, 71, 47), 97.8), 1.0: ((31, 22, 47), 92.9)}
    for strength, (widths, accuracy) in expected.items():
        hooks = training.Hooks(
            reparam=gates.reparam(spec), penalty=gates.penalty(spec, strength / len(lab.y))
        )
        starts = [
            gates.gated(p, spec, key=jax.random.key(s), droprate={KERNELS[0]: 0.2})
            for s, p in zip(lab.seeds, lab.initial("mlp"))
        ]
        fitted = lab.fit(lab.model("mlp"), adam(), starts, 200, hooks=hooks)
        folded = [gates.fold(s.params, spec)[0] for s in fitted]
        active = [
            [int((gates.eval_gate(jnp.asarray(s.params["gates"][k])) > 0).sum()) for k in spec]
            for s in fitted
        ]
        small = [lab.accuracy_of(shrunk(lab, p)[0]) for p in folded]
        own = [lab.accuracy("mlp", p) for p in folded]
        same = [float(abs(a - b) < 0.23) for a, b in zip(own, small)]
        total.append([sum(a) for a in active])
        name = f"{strength:g}/N"
        rows.append(Row(f"{name}, shrunk", (accuracy, accuracy), small))
        rows.append(Row(f"{name}: shrunk as gated", None, same, "claim"))
        for i, part in enumerate(("inputs", "first", "second")):
            mean = [float(a[i]) for a in active]
            rows.append(Row(f"{name}: active {part}", (widths[i], widths[i]), mean, "figure", ""))
    falls = [float(a > b > c) for a, b, c in zip(*total)]
    return [*rows, Row("active units fall with lambda", None, falls, "claim")]


def obd_scores(lab: Lab, params: Any, kind: str) -> Any:
    logits = lab.network("mlp")[2]
    if kind == "gauss_newton":
        return importance.obd(params, lambda p, x: logits(p, x[None])[0], [lab.x], chunk=64)

    def loss(p: Any, example: Any) -> Any:
        z = logits(p, example[0][None])
        return optax.softmax_cross_entropy_with_integer_labels(z, example[1][None])[0]

    return importance.obd(params, loss, [(lab.x, lab.y)], kind="fisher", chunk=64)


def optimal_brain_damage(lab: Lab) -> list[Row]:
    """Per layer, no retraining, beside the surgeon's target of section 7 (ranking at 80 %)."""
    params = lab.dense("mlp")
    scores = {
        "Gauss-Newton": [obd_scores(lab, p, "gauss_newton") for p in params],
        "empirical Fisher": [obd_scores(lab, p, "fisher") for p in params],
        "magnitude": [importance.l1(p) for p in params],
        "random": noise(lab),
    }
    expected = {
        0.5: {"Gauss-Newton": (97.1, 97.8), "empirical Fisher": (96.2, 96.4),
              "magnitude": (86.9, 95.1), "random": (35, 55)},
        0.8: {"Gauss-Newton": (57, 69), "magnitude": (40, 49)},
    }  # fmt: skip
    rows = []
    for sparsity, ranges in expected.items():
        mean = {}
        for name, own in scores.items():
            masks = [full(pruning.mask_from_scores(s, sparsity, scope="layer"), p)
                     for s, p in zip(own, params)]  # fmt: skip
            values = masked_accuracy(lab, masks)
            mean[name] = float(np.mean(values))
            kind = (
                "reach"
                if name in ("Gauss-Newton", "empirical Fisher") and name in ranges
                else "figure"
            )
            rows.append(Row(f"{100 * sparsity:g} %, {name}", ranges.get(name), values, kind))
        order = mean["Gauss-Newton"] > mean["magnitude"] > mean["random"]
        rows.append(
            Row(f"{100 * sparsity:g} %: damage > magnitude > random", None, [float(order)], "mean")
        )
    return rows


def optimal_brain_surgeon(lab: Lab) -> list[Row]:
    """Layer by layer on the dense network's activations (float64), no retraining."""
    rows = []
    for sparsity, reach, base in ((0.8, (97.1, 98.4), (40, 49)), (0.9, (89.1, 92.9), (26, 30)),
                                  (0.95, (64.7, 75.6), (9, 29))):  # fmt: skip
        own, other = [], []
        for params in lab.dense("mlp"):
            h, layers = lab.x.reshape(-1, 64), {}
            for path in KERNELS:
                name = path.split("/")[:-1]
                layer = params[name[0]] if len(name) == 1 else params[name[0]][int(name[1])]
                w, b = (np.asarray(layer[k], np.float64) for k in ("kernel", "bias"))
                with jax.enable_x64(True):
                    new = obs.layer_obs(jnp.asarray(w), jnp.asarray(obs.second_moment(h)), sparsity,
                                        damping=1e-4)  # fmt: skip
                    layers[path] = np.asarray(new.w, np.float32)
                h = np.maximum(np.asarray(h) @ w + b, 0)
            own.append(lab.accuracy("mlp", replaced(params, layers)))
            mask = pruning.magnitude_mask(params, sparsity, scope="layer")
            other.append(lab.accuracy("mlp", pruning.apply_mask(params, mask)))
        name = f"{100 * sparsity:g} %"
        rows += [Row(name, reach, own), Row(f"{name}, magnitude", base, other, "figure")]
    return rows


def data_free_neuron_merging(lab: Lab) -> list[Row]:
    rows = []
    for count, reach, base in ((20, (98.0, 98.0), (95, 98)), (50, (90, 93), (68, 83)),
                               (70, (57, 84), (50, 57))):  # fmt: skip
        own, other = [], []
        for seed, params in zip(lab.seeds, lab.dense("mlp")):
            model = lab.build("mlp", params)
            found = graph.trace(model, jnp.zeros((1, 8, 8, 1)))
            merged, kept = pruning.merge_neurons(params, "denses/0", "denses/1", count)
            keep = pruning.Keep.of_positions(found, {"denses/0/kernel": kept})
            small = pruning.shrink(model, found, keep, check=False)
            assign(small, merged)
            own.append(lab.accuracy_of(small))
            stay = np.sort(np.random.default_rng(seed).permutation(100)[count:])
            keep = pruning.Keep.of_positions(found, {"denses/0/kernel": stay})
            other.append(lab.accuracy_of(pruning.shrink(model, found, keep, check=False)))
        rows += [Row(f"{count} of 100 merged", reach, own),
                 Row(f"{count} of 100 at random", base, other, "figure")]  # fmt: skip
        if count > 20:
            better = [float(a > b) for a, b in zip(own, other)]
            rows.append(Row(f"{count}: merging above random", None, better, "claim"))
    return rows


def dynamic_network_surgery(lab: Lab) -> list[Row]:
    """c = 1.3, gamma = 1e-3, 60 epochs, from trained and from untrained weights.

    The calibration does not say which; the paper starts from a trained network. c counts
    deviations of the weights at the start, so the density differs. The baseline is magnitude at
    the same density and epochs.
    """
    optimizer = pruning.dynamic_network_surgery(adam(), 1.3, gamma=1e-3, stop=lab.steps(50))
    rows = []
    for where, start in (("trained", lab.dense("mlp")), ("untrained", lab.initial("mlp"))):
        fitted = lab.fit(
            lab.model("mlp"),
            optimizer,
            start,
            60,
            hooks=pruning.surgery_hooks(),
            extra=lambda p: {"mask": pruning.full_mask(p)},
        )
        masks = [pruning.get_mask(s.opt_state) for s in fitted]
        own = [lab.accuracy("mlp", pruning.apply_mask(s.params, m)) for s, m in zip(fitted, masks)]
        alive = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(m)]).mean() for m in masks]
        gone = [100 * (1 - float(a)) for a in alive]
        same = [
            pruning.magnitude_mask(p, round(g / 100, 4), scope="global")
            for p, g in zip(lab.dense("mlp"), gone)
        ]
        other = [lab.accuracy("mlp", p) for p in retrained(lab, same, 60)]
        rows += [
            Row(f"from {where} weights", (96.0, 97.8), own),
            Row(f"from {where} weights: removed", (88, 88), gone, "about"),
            Row("magnitude at the same density and epochs", None, other, "figure"),
        ]
    return rows


ENTRIES: dict[str, Callable[[Lab], list[Row]]] = {
    f.__name__: f
    for f in (
        dense, sparse_objective, iterative_hard_thresholding, forward_backward_splitting,
        hard_concrete_l0, optimal_brain_damage, optimal_brain_surgeon, magnitude_prune_retrain,
        data_free_neuron_merging, dynamic_network_surgery,
    )
} | pruning_digits_cnn.ENTRIES | pruning_digits_small.ENTRIES  # fmt: skip


def main() -> None:
    """Runs the entries and merges them into the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("entries", nargs="+", choices=["all", *ENTRIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every training")
    parser.add_argument("--cache", help="folder of the dense networks")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    lab = Lab(args.seeds, args.scale, args.cache)
    for name in ENTRIES if "all" in args.entries else args.entries:
        began = time.process_time()
        rows = ENTRIES[name](lab)
        for row in rows:
            print(name, *row.cells(), sep=" | ", flush=True)
        print(f"{name}: {time.process_time() - began:.1f} s of CPU", flush=True)
        digits_lab.write(args.out, lab, {name: rows}, NOTE)


if __name__ == "__main__":
    main()
