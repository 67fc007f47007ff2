"""Sparsity methods on LeNet-300-100 (266,610 parameters) and MNIST, beside published figures.

    python scripts/prepare_data.py mnist --from DIR
    python configs/mnist_methods_lenet_300_100.py surgery --seeds 0 1 2 --data_dir DIR

CPU, one core: dense 15 epochs about 20 s a seed, each method 1 to 3 minutes more (gates 4). Every
method and seed writes ``configs/results/mnist_methods_lenet_300_100.json`` when it is done, so that
a run may be cut off and resumed. Magnitude pruning at 12x stands in `mnist_lenet_300_100.py`.
Structured methods end in a really smaller network, whose error is the one reported. The error of
the dense network of the same seed is kept with every run. Data: 60,000 and 10,000 images, no
augmentation; no image of the test set was used to choose anything.
"""
# ruff: noqa: E501, RUF100

# [measured]
# full run, seeds 0; 2 CPU cores, 1 x cpu, jax 0.10.2
# surgery: dense 1.73, error 1.72, published 1.99, left 6.09x, published left 56x (Guo et al.
#   2016), seeds 1
# merging_50: dense 1.73, error 4.70, published , left 2.12x, published left , seeds 1
# merging_84: dense 1.73, error 34.97, published , left 6.90x, published left 85 % removed
#   (Srinivas & Babu 2015), seeds 1
# [/measured]

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnnjax import graph, models, pruning, report, training
from cnnjax import tree as treelib
from cnnjax.pruning import gates

RESULTS = pathlib.Path(__file__).parent / "results" / "mnist_methods_lenet_300_100.json"
KERNELS: tuple[str, ...] = ("fc1/kernel", "fc2/kernel", "fc3/kernel")
BATCH, CALL = 128, 26  # 18 calls of 26 steps an epoch


class Run:
    """One seed: the dense network, and what every method needs of it."""

    def __init__(self, data: dict[str, Any], seed: int, scale: float):
        self.data, self.seed, self.scale = data, seed, scale
        self.model = models.create("lenet_300_100", rngs=nnx.Rngs(seed))
        self.start = nnx.to_pure_dict(nnx.state(self.model, nnx.Param))
        self.dense = self.fit(self.cosine(15), self.start, 15).params
        self.dense_error = self.error(self.with_params(self.dense))

    def steps(self, epochs: float) -> int:
        return max(CALL, int(epochs * self.scale * (len(self.data["train"][1]) // BATCH)) // CALL * CALL)  # fmt: skip

    def cosine(self, epochs: float, rate: float = 1e-3) -> Any:
        return optax.adam(optax.cosine_decay_schedule(rate, self.steps(epochs)))

    def batches(self) -> Iterator[Any]:
        image, label = self.data["train"]
        rng = np.random.default_rng(self.seed)
        while True:
            order = rng.permutation(len(label))
            for at in range(0, len(order) - BATCH + 1, BATCH):
                pick = order[at : at + BATCH]
                yield {"image": image[pick], "label": label[pick]}

    def fit(
        self, optimizer: Any, start: Any, epochs: float, extra: Any = None, **hooks: Any
    ) -> Any:
        """The final state of a training run from ``start``."""
        hooks = {"prepare": prepare, **hooks}
        network, state = training.create_state(
            self.model, optimizer, seed=self.seed, params=start, extra=extra
        )
        step = training.make_train_step(
            network, optimizer, config=training.StepConfig(steps_per_call=CALL),
            hooks=training.Hooks(**hooks),
        )  # fmt: skip
        config = training.FitConfig(self.steps(epochs), log_every=0, progress=False)
        state = training.fit(step, state, self.batches(), config).state
        return jax.tree.map(jax.device_get, state)

    def with_params(self, params: Any) -> Any:
        graphdef, _, rest = nnx.split(self.model, nnx.Param, ...)
        state = nnx.state(self.model, nnx.Param)
        nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
        model = nnx.merge(graphdef, state, rest)
        model.eval()
        return model

    def error(self, model: Any) -> float:
        """Percent of the test images."""
        image, label = self.data["test"]
        run = nnx.jit(lambda m, x: m(x.astype(jnp.float32) / 255))
        wrong = [
            np.asarray(run(model, image[i : i + 1000])).argmax(-1) != label[i : i + 1000]
            for i in range(0, len(label), 1000)
        ]
        return 100 * float(np.concatenate(wrong).mean())

    def shrunk(self, params: Any) -> tuple[Any, tuple[int, ...]]:
        """Without dead neurons, and the widths: pixels that are read, hidden units."""
        model = self.with_params(params)
        found = graph.trace(model, jnp.zeros((1, 28, 28, 1)))
        keep = pruning.dead_channels(found, jax.tree.map(lambda w: np.asarray(w) != 0, params))
        small = pruning.shrink(model, found, keep)
        pixels = int((np.asarray(small.fc1.kernel[...]) != 0).any(axis=1).sum())
        return small, (pixels, int(small.fc2.kernel.shape[0]), int(small.fc3.kernel.shape[0]))


def prepare(batch: Any, key: Any, train: bool) -> Any:
    """uint8 images to [0, 1] on the device."""
    del key, train
    return {**batch, "image": batch["image"].astype(jnp.float32) / 255}


def sparse(run: Run, params: Any) -> dict[str, Any]:
    """Error and ratio of a network with zeros; biases count."""
    leaves = [np.asarray(w) for w in jax.tree.leaves(params)]
    nonzero = sum(int(np.count_nonzero(w)) for w in leaves)
    flat = treelib.flatten(params)
    return {
        "error": run.error(run.with_params(params)),
        "ratio": sum(w.size for w in leaves) / nonzero,
        "density": {p: float(np.mean(np.asarray(flat[p]) != 0)) for p in KERNELS},
    }


def structured(run: Run, params: Any) -> dict[str, Any]:
    """Error, widths and ratio of the shrunk network; weights of unread pixels don't count."""
    small, widths = run.shrunk(params)
    a, b, c = widths
    count = a * b + b + b * c + c + c * 10 + 10
    return {"error": run.error(small), "ratio": 266_610 / count, "widths": list(widths)}


def surgery(run: Run) -> dict[str, Any]:
    """Thresholds from the paper's own densities: c such that so many weights lie above b at first."""
    target = {"fc1/kernel": 0.018, "fc2/kernel": 0.018, "fc3/kernel": 0.055}
    flat, rate = treelib.flatten(run.dense), {}
    for path, density in target.items():
        beside = flat[path.replace("kernel", "bias")]
        size = np.abs(np.concatenate([np.ravel(flat[path]), np.ravel(beside)]))
        size = size[size > 0]
        cut = np.quantile(size, 1 - density) / 1.1  # b = 1.1 (mu + c sigma)
        rate[path] = float((cut - size.mean()) / size.std())
    steps = run.steps(40)
    optimizer = pruning.dynamic_network_surgery(
        run.cosine(40), rate, gamma=1e-4, stop=int(0.7 * steps), bias=True
    )
    hooks = pruning.surgery_hooks()
    state = run.fit(
        optimizer, run.dense, 40, extra={"mask": pruning.full_mask(run.dense)},
        reparam=hooks.reparam, post_update=hooks.post_update,
    )  # fmt: skip
    params = pruning.apply_mask(state.params, pruning.get_mask(state.opt_state))
    return sparse(run, params) | {"rate": rate}


def hard_concrete(run: Run) -> dict[str, Any]:
    """Gates on the inputs of all layers, lambda 0.1/N, 100 epochs (200 in the paper)."""
    spec = dict.fromkeys(KERNELS, "channel")
    start = gates.gated(
        run.start, spec, key=jax.random.key(run.seed), droprate={KERNELS[0]: 0.2}
    )  # fmt: skip
    state = run.fit(
        optax.adam(1e-3), start, 100,
        reparam=gates.reparam(spec), penalty=gates.penalty(spec, 0.1 / 60_000),
    )  # fmt: skip
    return structured(run, gates.fold(state.params, spec)[0])


def groups(run: Run, strength: float, channel: float = 0.0) -> dict[str, Any]:
    """Proximal steps on neurons (and input pixels), 40 epochs from scratch, then 10 without."""
    ops = [pruning.Prox("group_l2", strength, group="filter")]
    first = [*ops, pruning.Prox("group_l2", channel, group="channel")] if channel else ops
    spec = {"fc1/kernel": first, "fc2/kernel": ops}
    # one threshold for all coordinates of Adam's step; it falls with the learning rate
    schedule = optax.cosine_decay_schedule(1.0, run.steps(40))
    optimizer = pruning.forward_backward_splitting(run.cosine(40), spec, schedule)
    state = run.fit(optimizer, run.start, 40)
    params = run.fit(pruning.masked(run.cosine(10, 5e-4)), state.params, 10).params
    return structured(run, params)


def hard_thresholding(run: Run) -> dict[str, Any]:
    """8 % of every layer, 4 cycles of 4 full and 6 masked epochs from the dense network."""
    optimizer = pruning.iterative_hard_thresholding(
        run.cosine(40), {"fc3/kernel": 0.26, "**": 0.08}, dense_steps=run.steps(4),
        sparse_steps=run.steps(6), cycles=4,
    )  # fmt: skip
    return sparse(run, run.fit(optimizer, run.dense, 40).params)


def merging(run: Run, removed: float) -> dict[str, Any]:
    """Data-free: so large a part of both hidden layers is merged, nothing is trained."""
    params = run.dense
    for layer, reader, width in (("fc1", "fc2", 300), ("fc2", "fc3", 100)):
        params, _ = pruning.merge_neurons(params, layer, reader, int(removed * width))
    flat = {p: np.asarray(w) for p, w in treelib.flatten(params).items()}
    count = sum(w.size for w in flat.values())
    x = run.data["test"][0].reshape(-1, 784).astype(np.float32) / 255
    for i in (1, 2):
        x = np.maximum(x @ flat[f"fc{i}/kernel"] + flat[f"fc{i}/bias"], 0)
    z = x @ flat["fc3/kernel"] + flat["fc3/bias"]
    wrong = z.argmax(-1) != run.data["test"][1]
    return {"error": 100 * float(wrong.mean()), "ratio": 266_610 / count}


# name: (method, published error, published ratio or widths, source)
METHODS: dict[str, tuple[Callable[[Run], dict[str, Any]], str, str]] = {
    "surgery": (surgery, "1.99", "56x (Guo et al. 2016)"),
    "hard_concrete": (hard_concrete, "1.4", "219-214-100 (Louizos et al. 2018, 200 epochs)"),
    "hard_thresholding": (hard_thresholding, "", "about 4x, no loss (Jin et al. 2016)"),
    "neurons": (lambda r: groups(r, 2e-3), "", "fc1 -97.8 % (Zhou et al. 2016, another LeNet)"),
    "neurons_pixels": (lambda r: groups(r, 1e-3, 1e-3), "1.53", "434-174-78 of 784-500-300 (Wen et al. 2016)"),
    "merging_50": (lambda r: merging(r, 0.5), "", ""),
    "merging_84": (lambda r: merging(r, 0.84), "", "85 % removed (Srinivas & Babu 2015)"),
}  # fmt: skip


def main() -> None:
    """Runs methods over seeds; finished ones are kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("methods", nargs="+", choices=["all", *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_dir", help="TFDS folder with mnist prepared")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every training")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--validate", action="store_true",
                        help="measure on the last 10,000 training images, train on the others")  # fmt: skip
    args = parser.parse_args()
    from cnnjax import data as datalib

    splits = {"train": "train", "test": "test"}
    if args.validate:
        if args.out == RESULTS:
            parser.error("--validate needs --out: those figures are for choosing settings")
        splits = {"train": "train[:50000]", "test": "train[50000:]"}
    data = {s: datalib.arrays("mnist", t, data_dir=args.data_dir) for s, t in splits.items()}
    names = list(METHODS) if "all" in args.methods else args.methods
    for seed in args.seeds:
        run = Run(data, seed, args.scale)
        for name in names:
            began = time.process_time()
            found = {"method": name, "seed": seed, "dense_error": run.dense_error}
            found |= METHODS[name][0](run)
            print(json.dumps({**found, "cpu_seconds": time.process_time() - began}), flush=True)
            write(args.out, found, args.scale)


def write(path: pathlib.Path, found: dict[str, Any], scale: float) -> None:
    """Merges one run into the result file, atomically."""
    old = json.loads(path.read_text()) if path.exists() else {}
    runs = old.get("runs", []) if old.get("reduced") == (scale != 1.0) else []
    runs = [r for r in runs if (r["method"], r["seed"]) != (found["method"], found["seed"])]
    runs = sorted([*runs, found], key=lambda r: (list(METHODS).index(r["method"]), r["seed"]))
    rows = []
    for name, (_, error, source) in METHODS.items():
        own = [r for r in runs if r["method"] == name]
        if own:
            cells = [spread([r[k] for r in own]) for k in ("dense_error", "error", "ratio")]
            cells[2] += "x"
            if "widths" in own[0]:
                widths = np.mean([r["widths"] for r in own], axis=0)
                cells[2] += " (" + "-".join(f"{w:.0f}" for w in widths) + ")"
            rows.append([name, *cells[:2], error, cells[2], source, str(len(own))])
    record = {
        "format": report.TABLE,
        "name": path.stem,
        "note": "LeNet-300-100, MNIST, 60,000 and 10,000 images; error in percent, mean (min-max) "
        "of the seeds; ratio of all parameters, biases included; widths are pixels read and hidden "
        "units of the shrunk network",
        "seeds": sorted({r["seed"] for r in runs}),
        "reduced": scale != 1.0,
        "header": ["method", "dense", "error", "published", "left", "published left", "seeds"],
        "rows": rows,
        "runs": runs,
        "environment": report.environment(),
    }  # fmt: skip
    report.write_result(record, path)


def spread(values: list[float]) -> str:
    return report.spread(
        {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}
    )  # fmt: skip


if __name__ == "__main__":
    main()
