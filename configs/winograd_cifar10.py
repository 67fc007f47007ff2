"""Sparse Winograd on CIFAR-10: multiplications of a Winograd-ReLU VGG beside its spatial twin.

Liu, Pool, Han, Dally, ICLR 2018, arXiv 1802.06367 (10.4 times fewer multiplications on CIFAR-10 at
less than 0.1 % loss: a larger VGG, longer training, lossless images). Both networks have
the same widths, batch norm and pooling, are trained the same way from scratch, then pruned
gradually by global magnitude to each sparsity while training on. A multiplication counts when
weight and activation are both non-zero; the first convolution is ordinary in both and not counted.

    python configs/winograd_cifar10.py --data_dir DIR [--data cifar10_jpeg] [--epochs 20]

The defaults are the full run, for an accelerator. Reduced, minutes on a CPU core::

    ... --nets winograd --images 8000 --epochs 3 --widths 16 32 64      # then --nets spatial

Results: ``configs/results/winograd_cifar10.json``, written network by network. The reductions "at
equal accuracy" are interpolated along both curves. Expected: the Winograd net needs fewer
multiplications than the twin at equal accuracy, and both need far fewer than dense convolution.
"""

# [measured]
# reduced run, seeds 0; 1 CPU cores, 1 x cpu, jax 0.10.2
# winograd: weights removed % 0, accuracy % 47.14, reduction 4.50x
# winograd: weights removed % 60, accuracy % 52.01, reduction 9.40x
# winograd: weights removed % 80, accuracy % 52.30, reduction 16.41x
# winograd: weights removed % 90, accuracy % 40.85, reduction 29.38x
# spatial: weights removed % 0, accuracy % 37.15, reduction 2.22x
# spatial: weights removed % 60, accuracy % 47.44, reduction 4.35x
# spatial: weights removed % 80, accuracy % 48.60, reduction 7.10x
# spatial: weights removed % 90, accuracy % 41.69, reduction 11.70x
# winograd, at equal accuracy: accuracy % 48.60, reduction 19.81x
# spatial, at equal accuracy: accuracy % 48.60, reduction 7.10x
# winograd, at equal accuracy: accuracy % 47.60, reduction 20.84x
# spatial, at equal accuracy: accuracy % 47.60, reduction 7.63x
# winograd, at equal accuracy: accuracy % 46.60, reduction 21.93x
# spatial, at equal accuracy: accuracy % 46.60, reduction 8.20x
# winograd, at equal accuracy: accuracy % 44.60, reduction 24.28x
# spatial, at equal accuracy: accuracy % 44.60, reduction 9.48x
# [/measured]

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnnjax import coding, pruning, report, training
from cnnjax.coding import multiplications

RESULTS = pathlib.Path(__file__).parent / "results" / "winograd_cifar10.json"
WIDTHS = (32, 64, 128)  # two convolutions each
SPARSITIES = (0.6, 0.8, 0.9)
NETS = ("winograd", "spatial")


class SmallVGG(nnx.Module):
    """A convolution, then (norm, ReLU, convolution) blocks with pooling, then a dense layer."""

    def __init__(self, winograd: bool, widths: Sequence[int] = WIDTHS, *, rngs: nnx.Rngs):
        self.winograd = winograd
        channels = widths[0]
        self.first = nnx.Conv(3, channels, (3, 3), rngs=rngs)
        norms, convs, self.pool_after = [], [], []
        for width in widths:
            for _ in range(2):
                norms.append(nnx.BatchNorm(channels, rngs=rngs))
                if winograd:
                    convs.append(coding.WinogradReLU(channels, width, use_bias=False, rngs=rngs))
                else:
                    convs.append(nnx.Conv(channels, width, (3, 3), use_bias=False, rngs=rngs))
                channels = width
            self.pool_after.append(len(convs))
        self.pool_after = tuple(self.pool_after)
        self.norms, self.convs = nnx.List(norms), nnx.List(convs)
        self.last = nnx.BatchNorm(channels, rngs=rngs)
        self.dense = nnx.Linear(channels, 10, rngs=rngs)

    def features(self, x: Any) -> tuple[Any, list[Any]]:
        """Logits, and the input of every counted convolution."""
        inputs = []
        x = self.first(x)
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs)):
            x = norm(x)
            x = x if self.winograd else jax.nn.relu(x)
            inputs.append(x)
            x = conv(x)
            if i + 1 in self.pool_after:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = jax.nn.relu(self.last(x)).mean(axis=(1, 2))
        return self.dense(x), inputs

    def __call__(self, x: Any) -> Any:
        return self.features(x)[0]


def prepare(batch: Any, key: Any, train: bool) -> Any:
    """uint8 to about [-2, 2]; in training mirrored and shifted by up to 4 pixels."""
    x = (batch["image"].astype(jnp.float32) / 255 - 0.5) * 4
    if train:
        flip, row, column = jax.random.split(key, 3)
        x = jnp.where(jax.random.bernoulli(flip, 0.5, (len(x), 1, 1, 1)), x[:, :, ::-1], x)
        x = jnp.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
        at = [jax.random.randint(k, (), 0, 9) for k in (row, column)]
        x = jax.lax.dynamic_slice(x, (0, at[0], at[1], 0), (len(x), 32, 32, 3))
    return {**batch, "image": x}


def batches(arrays: Any, size: int, seed: int) -> Iterator[Any]:
    """Endless shuffled batches."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(arrays[1]))
        for at in range(0, len(order) - size + 1, size):
            pick = order[at : at + size]
            yield {"image": arrays[0][pick], "label": arrays[1][pick]}


def measure(network: Any, state: Any, data: Any, counted: int) -> dict[str, Any]:
    """Accuracy on the test set; multiplications per image, averaged over ``counted`` images."""
    model = network.model(state.params, state.stats)
    graphdef, arrays = nnx.split(model)

    @jax.jit
    def run(arrays: Any, x: Any) -> Any:
        return nnx.merge(graphdef, arrays).features(prepare({"image": x}, None, False)["image"])

    images, labels = data
    found = [np.argmax(run(arrays, images[i : i + 500])[0], -1) for i in range(0, len(images), 500)]
    _, inputs = run(arrays, images[:counted])
    total = direct = 0
    for x, conv in zip(inputs, model.convs):
        kernel = np.asarray(conv.kernel[...])
        direct += multiplications.direct(x.shape, kernel.shape[-1])
        count = multiplications.sparse_winograd if model.winograd else multiplications.sparse_direct
        total += count(x, kernel)
    return {
        "accuracy": 100 * float(np.mean(np.concatenate(found) == labels)),
        "multiplications": total / counted,
        "dense_direct": direct / counted,
        "reduction": direct / total,
    }


def curve(winograd: bool, args: argparse.Namespace, data: Any) -> list[dict[str, Any]]:
    """Dense training, then one point per sparsity."""
    model = SmallVGG(winograd, args.widths, rngs=nnx.Rngs(args.seed))
    per_epoch = len(data["train"][1]) // args.batch
    hooks = training.Hooks(prepare=prepare)
    params, rows, reached = None, [], 0.0
    for sparsity in (0.0, *SPARSITIES):
        epochs = args.epochs if not sparsity else args.epochs / 2
        steps = max(4, int(epochs * per_epoch))
        rate = optax.cosine_onecycle_schedule(steps, args.rate)
        optimizer: Any = optax.adam(rate)
        if sparsity:
            every = max(1, steps // 100)
            optimizer = pruning.gradual(
                optimizer,
                initial=reached,
                final=sparsity,
                begin=0,
                end=max(every, steps // 2 // every * every),
                every=every,
                include="convs/*/kernel",
            )
        network, state = training.create_state(model, optimizer, seed=args.seed, params=params)
        step = training.make_train_step(network, optimizer, hooks=hooks)
        feed = batches(data["train"], args.batch, args.seed)
        config = training.FitConfig(steps, log_every=0, progress=False)
        state = training.fit(step, state, feed, config).state
        model = training.state_to_model(network, state)
        reached = sparsity
        rows.append({"sparsity": sparsity, **measure(network, state, data["test"], args.counted)})
        print("winograd" if winograd else "spatial", json.dumps(rows[-1]), flush=True)
    return rows


def reduction_at(rows: list[dict[str, Any]], level: float) -> float | None:
    """The largest reduction with at least this accuracy, log-interpolated; None: never reached."""
    rows = sorted(rows, key=lambda r: r["reduction"], reverse=True)
    over = None
    for row in rows:
        if row["accuracy"] >= level:
            if over is None or over["accuracy"] == row["accuracy"]:
                return row["reduction"]
            part = (row["accuracy"] - level) / (row["accuracy"] - over["accuracy"])
            low, high = math.log(row["reduction"]), math.log(over["reduction"])
            return math.exp(low + part * (high - low))
        over = row
    return None


def write(args: argparse.Namespace, data: Any, name: str, rows: list[dict[str, Any]]) -> None:
    """Merges one network's curve into the result file."""
    settings = {
        "data": args.data,
        "seed": args.seed,
        "images": {s: len(v[1]) for s, v in data.items()},
        "epochs": args.epochs,
        "widths": list(args.widths),
        "batch": args.batch,
        "rate": args.rate,
    }
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    curves = old.get("curves", {}) if old.get("settings") == settings else {}
    curves[name] = rows
    out: dict[str, Any] = {
        "environment": report.environment(),
        "reduced": args.images is not None or args.epochs < 20 or tuple(args.widths) != WIDTHS,
        "settings": settings,
        "curves": curves,
    }
    if len(curves) == 2:
        top = min(max(r["accuracy"] for r in c) for c in curves.values())
        out["at_equal_accuracy"] = [
            {"accuracy": top - less, **{n: reduction_at(c, top - less) for n, c in curves.items()}}
            for less in (0.0, 1.0, 2.0, 4.0)
        ]
    report.write_result(out | table(out), args.out)


def table(out: dict[str, Any]) -> dict[str, Any]:
    """What ``scripts/update_results.py`` shows of the result."""
    s = out["settings"]
    rows = [
        [n, f"{100 * r['sparsity']:g}", f"{r['accuracy']:.2f}", f"{r['reduction']:.2f}x"]
        for n, c in out["curves"].items()
        for r in c
    ]
    for r in out.get("at_equal_accuracy", []):
        for n in out["curves"]:
            found = f"{r[n]:.2f}x" if r[n] else "not reached"
            rows.append([f"{n}, at equal accuracy", "", f"{r['accuracy']:.2f}", found])
    return {
        "format": report.TABLE,
        "name": "winograd_cifar10",
        "seeds": [s["seed"]],
        "note": "Winograd-ReLU network beside its spatial twin, "
        f"{'reduced' if out['reduced'] else 'full'} run on {s['data']}: "
        f"{s['images']['train']:,} training and {s['images']['test']:,} test images, "
        f"{s['epochs']:g} dense epochs and half of it for each sparsity, widths {s['widths']}, "
        f"seed {s['seed']}. The reduction is dense direct convolution over multiplications with "
        "both factors non-zero",
        "header": ["network", "weights removed %", "accuracy %", "reduction"],
        "rows": rows,
    }


def main() -> None:
    """Trains both networks and writes their curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="cifar10_jpeg")
    parser.add_argument("--data_dir", help="TFDS folder")
    parser.add_argument("--epochs", type=float, default=20, help="dense; half of it per sparsity")
    parser.add_argument("--nets", nargs="+", default=NETS, choices=NETS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counted", type=int, default=200, help="images for the counts")
    parser.add_argument("--images", type=int, help="only so many training and test images")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    from cnnjax import data as datalib

    data = {s: datalib.arrays(args.data, s, data_dir=args.data_dir) for s in ("train", "test")}
    data = {s: (x[: args.images], y[: args.images]) for s, (x, y) in data.items()}
    for name in args.nets:
        write(args, data, name, curve(name == "winograd", args, data))


if __name__ == "__main__":
    main()
