"""Deep Compression of LeNet-300-100 and LeNet-5 on MNIST, measured as the size of a file.

Paper: Han, Mao, Dally, "Deep compression", ICLR 2016, arXiv 1510.00149: LeNet-300-100 1070 KB to
27 KB (40x) at 1.64 -> 1.58 % error, LeNet-5 1720 KB to 44 KB (39x) at 0.80 -> 0.74 %.

Command (CPU, 2 cores: about 3 minutes a seed for the first, 15 for the second)::

    python scripts/prepare_data.py mnist --from DIR
    python configs/deep_compression_mnist.py lenet_300_100 lenet_300_100_60x lenet_5_caffe

The dense network is trained first; the same network is then pruned gradually by global magnitude
while it trains on, its survivors are shared, the codebooks are tuned, everything is rounded to what
the file stores, and the error is that of the parameters *read back from the file*. ``--validate``
holds training images out, for choosing a recipe.

Expected: at least 40x and 39x at no more than +0.1 point over the dense network; the second recipe
is the goal beyond the paper, 60x. Pruning trains longer than the dense network did and learns from
its logits as well as from the labels (Hinton et al., arXiv 1503.02531). Results:
``configs/results/deep_compression_mnist.json``.
"""

# [measured]
# full run, seeds 0, 1, 2; 2 CPU cores, 1 x cpu, jax 0.10.2
# lenet_300_100: seeds 3, extent full, dense error % 1.76, error in the file % 1.77, change +0.01,
#   worst seed +0.07, file bytes 23,711, ratio 45.0x, published 40x
# lenet_300_100_60x: seeds 3, extent full, dense error % 1.76, error in the file % 1.83, change
#   +0.07, worst seed +0.14, file bytes 17,524, ratio 60.9x, published 40x
# lenet_5_caffe: seeds 3, extent full, dense error % 0.82, error in the file % 0.85, change +0.03,
#   worst seed +0.10, file bytes 16,631, ratio 103.7x, published 39x
# [/measured]

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnnjax import coding, models, pruning, report, training
from cnnjax import tree as treelib

RESULTS = pathlib.Path(__file__).parent / "results" / "deep_compression_mnist.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One network's run; lengths are in epochs of 60,000 images, batches of ``batch``."""

    model: str
    dense_epochs: int
    prune_epochs: int
    settle_epochs: int
    tune_epochs: int
    sparsity: float
    bits: tuple[tuple[str, int], ...]
    paper_ratio: float
    batch: int = 128
    rate: float = 1e-3
    tune_rate: float = 2e-4
    decay: float = 0.0
    distill: float = 0.0
    steps_per_call: int = 1  # XLA:CPU runs convolutions slowly inside a scan
    temperature: float = 4.0


_LENET_300_100 = Recipe(
    model="lenet_300_100",
    dense_epochs=15,
    prune_epochs=15,
    settle_epochs=24,
    tune_epochs=3,
    sparsity=0.908,
    bits=(("**", 3),),
    paper_ratio=40,
    distill=0.9,
    steps_per_call=26,
)
RECIPES = {
    "lenet_300_100": _LENET_300_100,
    "lenet_300_100_60x": dataclasses.replace(
        _LENET_300_100, prune_epochs=24, settle_epochs=36, tune_epochs=5, sparsity=0.938
    ),
    "lenet_5_caffe": Recipe(
        model="lenet_5_caffe",
        dense_epochs=5,
        prune_epochs=3,
        settle_epochs=4,
        tune_epochs=0.5,
        sparsity=0.97,
        bits=(("conv*/**", 4), ("**", 3)),
        paper_ratio=39,
        distill=0.9,
    ),
}


def batches(arrays: dict[str, np.ndarray], size: int, seed: int) -> Iterator[Any]:
    """Endless shuffled batches, a new permutation per epoch; ``arrays`` may grow a key."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(arrays["label"]))
        for at in range(0, len(order) - size + 1, size):
            pick = order[at : at + size]
            yield {name: array[pick] for name, array in arrays.items()}


def distilled(weight: float, temperature: float) -> Any:
    """Cross-entropy, and Hinton's loss to the dense network's logits in ``batch["teacher"]``."""
    plain = training.classification_loss()

    def loss(model: Any, batch: Any, context: Any) -> Any:
        logits = model(batch["image"])
        hard, metrics = plain(lambda _: logits, batch, context)
        target = jax.nn.softmax(batch["teacher"] / temperature)
        soft = -jnp.sum(target * jax.nn.log_softmax(logits / temperature), axis=-1).mean()
        return (1 - weight) * hard + weight * temperature**2 * soft, metrics

    return loss


def prepare(batch: Any, key: Any, train: bool) -> Any:
    """uint8 images to [0, 1] on the device."""
    del key, train
    return {**batch, "image": batch["image"].astype(jnp.float32) / 255}


def run(recipe: Recipe, seed: int, data: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
    """One seed: dense error, pruned error, file size and error of the network in the file."""
    began = time.monotonic()
    arrays = dict(zip(("image", "label"), data["train"]))
    per_epoch = len(arrays["label"]) // recipe.batch
    call = recipe.steps_per_call

    def length(epochs: float) -> int:
        return max(call, int(epochs * scale * per_epoch) // call * call)

    hooks = training.Hooks(prepare=prepare)
    config = training.StepConfig(steps_per_call=call)
    model = models.create(recipe.model, rngs=nnx.Rngs(seed))

    def fit(network: Any, state: Any, optimizer: Any, steps: int, use: Any) -> Any:
        step = training.make_train_step(network, optimizer, config=config, hooks=use)
        fitted = training.FitConfig(steps, log_every=0, progress=False)
        feed = batches(arrays, recipe.batch, seed)
        return training.fit(step, state, feed, fitted).state

    def error(params: Any) -> float:
        found = np.argmax(predict(params, data["test"][0]), axis=-1)
        return 100 * float(np.mean(found != data["test"][1]))

    steps = length(recipe.dense_epochs)
    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.rate, steps))
    network, state = training.create_state(model, optimizer, seed=seed)
    stats = state.stats

    @jax.jit
    def logits(params: Any, x: Any) -> Any:
        return network.model(params, stats)(x.astype(jnp.float32) / 255)

    def predict(params: Any, x: np.ndarray) -> np.ndarray:
        return np.concatenate([logits(params, x[i : i + 1000]) for i in range(0, len(x), 1000)])

    stats = jax.tree.map(jnp.copy, stats)
    state = fit(network, state, optimizer, steps, hooks)
    dense = jax.tree.map(np.asarray, state.params)
    out: dict[str, Any] = {"seed": seed, "dense_error": error(dense)}
    if recipe.distill:
        arrays["teacher"] = predict(dense, arrays["image"])
        hooks = dataclasses.replace(hooks, loss=distilled(recipe.distill, recipe.temperature))

    ramp, settle = length(recipe.prune_epochs), length(recipe.settle_epochs)
    every = max(1, ramp // 100)
    ramp = ramp // every * every
    rate = optax.join_schedules(
        [optax.constant_schedule(recipe.rate), optax.cosine_decay_schedule(recipe.rate, settle)],
        [ramp],
    )
    optimizer = pruning.gradual(
        optax.adamw(rate, weight_decay=recipe.decay),
        final=recipe.sparsity,
        begin=0,
        end=ramp,
        every=every,
        include="**/kernel",
    )
    _, state = training.create_state(model, optimizer, seed=seed, params=dense)
    state = fit(network, state, optimizer, (ramp + settle) // call * call, hooks)
    pruned = jax.tree.map(np.asarray, state.params)
    out |= {
        "pruned_error": error(pruned),
        "density": {
            path: float(np.mean(leaf != 0))
            for path, leaf in treelib.flatten(pruned).items()
            if leaf.ndim > 1
        },
    }

    def tune(coded: Any) -> Any:
        out["shared_error_untuned"] = error(coding.expand(coded))
        steps = length(recipe.tune_epochs)
        optimizer = optax.adam(optax.cosine_decay_schedule(recipe.tune_rate, steps))
        books = coding.codebooks(coded)
        _, state = training.create_state(model, optimizer, seed=seed, params=books)
        state = fit(network, state, optimizer, steps, coding.codebook_hooks(coded, hooks))
        return coding.with_codebooks(coded, jax.tree.map(np.asarray, state.params))

    options = coding.DeepCompression(
        bits=recipe.bits, centroid_dtype="float16", other_dtype="float16"
    )
    blob = coding.compress(pruned, options, finetune=tune, metadata={"model": recipe.model})
    out["file_error"] = error(coding.decompress(blob))
    report = coding.report(blob)
    print(report, flush=True)
    out |= {
        "file_bytes": len(blob),
        "ratio": report.ratio,
        "error_change": out["file_error"] - out["dense_error"],
        "sizes": report.as_dict(),
        "seconds": time.monotonic() - began,
    }
    return out


def main() -> None:
    """Runs the recipes and merges their results into the result file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("models", nargs="+", choices=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_dir", help="TFDS folder with mnist prepared")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every stage")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=JSON", help="try a recipe")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="hold out the last 10,000 training images and measure on them; for choosing a recipe",
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    from cnnjax import data as datalib

    data = {s: datalib.arrays("mnist", s, data_dir=args.data_dir) for s in ("train", "test")}
    if args.validate:
        images, labels = data["train"]
        data = {"train": (images[:-10_000], labels[:-10_000])}
        data["test"] = (images[-10_000:], labels[-10_000:])
    for name in args.models:
        recipe = RECIPES[name]
        changes = dict(item.split("=", 1) for item in args.set)
        recipe = dataclasses.replace(recipe, **{k: json.loads(v) for k, v in changes.items()})
        for seed in args.seeds:
            found = run(recipe, seed, data, args.scale)
            short = {k: v for k, v in found.items() if k != "sizes"}
            print(name, json.dumps(short), flush=True)
            write(args.out, name, recipe, found, args.scale)


def write(
    path: pathlib.Path, name: str, recipe: Recipe, found: dict[str, Any], scale: float
) -> None:
    """Merges one run into the JSON file, atomically; seeds of the same recipe stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else {}
    plain = json.loads(json.dumps(dataclasses.asdict(recipe)))
    before = old.get(name, {})
    same = before.get("recipe") == plain and before.get("full") == (scale == 1.0)
    runs = [r for r in before.get("runs", []) if same and r["seed"] != found["seed"]]
    runs = sorted([*runs, found], key=lambda r: r["seed"])
    old[name] = {
        "data": "MNIST, 60,000 train and 10,000 test images",
        "hardware": f"{jax.devices()[0].platform}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "full": scale == 1.0,
        "recipe": plain,
        "mean": {
            key: float(np.mean([r[key] for r in runs]))
            for key in ("dense_error", "pruned_error", "file_error", "error_change", "ratio")
        },
        "worst": {
            "error_change": max(r["error_change"] for r in runs),
            "ratio": min(r["ratio"] for r in runs),
        },
        "runs": runs,
    }
    report.write_result(old | table(old), path)


def table(out: dict[str, Any]) -> dict[str, Any]:
    """What ``scripts/update_results.py`` shows of the result."""
    rows = []
    for name in (name for name in RECIPES if name in out):
        found = out[name]
        mean, worst, runs = found["mean"], found["worst"], found["runs"]
        rows.append(
            [
                name,
                len(runs),
                "full" if found["full"] else "reduced",
                f"{mean['dense_error']:.2f}",
                f"{mean['file_error']:.2f}",
                f"{mean['error_change']:+.2f}",
                f"{worst['error_change']:+.2f}",
                f"{sum(r['file_bytes'] for r in runs) / len(runs):,.0f}",
                f"{mean['ratio']:.1f}x",
                f"{found['recipe']['paper_ratio']:g}x",
            ]
        )
    return {
        "format": report.TABLE,
        "environment": report.environment(),
        "reduced": not all(out[name]["full"] for name in RECIPES if name in out),
        "name": "deep_compression_mnist",
        "seeds": sorted({r["seed"] for name in RECIPES if name in out for r in out[name]["runs"]}),
        "note": "MNIST; the error is that of the parameters read back from the file, its change is "
        "against the dense network of the same seed; the ratio is float32 parameters over the file",
        "header": ["network", "seeds", "extent", "dense error %", "error in the file %"]
        + ["change", "worst seed", "file bytes", "ratio", "published"],
        "rows": rows,
    }


if __name__ == "__main__":
    main()
