"""ResNet-56 on CIFAR-10, pruned, shared and coded: size of the file against accuracy, a curve.

Weights: a trained ResNet-56 with PyTorch's names, see ``cnnjax.models.load_pretrained``. Data:
``cifar10_jpeg``, on which these weights reach 83.20 %. After Han, Mao, Dally, ICLR 2016, arXiv
1510.00149; the paper has no residual network.

For each sparsity the network of the sparsity before is cut by global magnitude and retrained; its
survivors are shared with several codebook widths, the codebooks are tuned, and the accuracy is that
of the network *in the file*, which holds everything: codes, codebooks, biases, normalization
(running statistics absorbed into it). "before" is the same without any training: the published
weights cut and shared, only the running statistics are measured anew. Sparsity 0 is retrained like
the others, because these weights come from lossless images and gain from the copy alone.

    python configs/deep_compression_resnet56.py --weights cifar10_resnet56.npz --data_dir DIR

The defaults are the full run, for an accelerator. Reduced, on a CPU core, about 6 minutes for each
sparsity (each can be run on its own, in order: the networks are kept in ``--work``)::

    ... --sparsities 0.6 0.8 0.9 --bits 5 3 --train_images 5000 --epochs 1 --tune_epochs 0.15
        --test_images 2000 --recalibrate 1000

Results: ``configs/results/deep_compression_resnet56.json``.
"""

# [measured]
# reduced run, seeds 0; 1 CPU cores, 1 x cpu, jax 0.10.2
# ResNet-56, 60 %, 5 bits: sparsity % 60, bits 5, file before 298,725, accuracy before % 84.85,
#   float32 retrained % 87.55, file after 297,340, ratio after 11.5x, accuracy after % 87.00
# ResNet-56, 60 %, 3 bits: sparsity % 60, bits 3, file before 219,457, accuracy before % 83.75,
#   float32 retrained % 87.55, file after 219,378, ratio after 15.6x, accuracy after % 85.55
# ResNet-56, 80 %, 5 bits: sparsity % 80, bits 5, file before 183,103, accuracy before % 81.20,
#   float32 retrained % 84.80, file after 182,821, ratio after 18.8x, accuracy after % 84.20
# ResNet-56, 80 %, 3 bits: sparsity % 80, bits 3, file before 139,799, accuracy before % 78.70,
#   float32 retrained % 84.80, file after 139,481, ratio after 24.6x, accuracy after % 83.15
# ResNet-56, 90 %, 5 bits: sparsity % 90, bits 5, file before 111,295, accuracy before % 62.00,
#   float32 retrained % 79.35, file after 111,559, ratio after 30.7x, accuracy after % 79.90
# ResNet-56, 90 %, 3 bits: sparsity % 90, bits 3, file before 86,582, accuracy before % 59.05,
#   float32 retrained % 79.35, file after 86,682, ratio after 39.6x, accuracy after % 77.05
# [/measured]

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax import coding, models, pruning, report, training
from cnnjax import tree as treelib

RESULTS = pathlib.Path(__file__).parent / "results" / "deep_compression_resnet56.json"
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)
KERNELS = "**/kernel"


def prepare(batch: Any, key: Any, train: bool) -> Any:
    """uint8 images to normalised floats on the device."""
    del key, train
    return {**batch, "image": (batch["image"].astype(jnp.float32) / 255 - MEAN) / STD}


def batches(data: Any, size: int, seed: int) -> Iterator[Any]:
    """Endless shuffled batches, mirrored and shifted by up to 4 pixels."""
    rng = np.random.default_rng(seed)
    images, labels = data
    while True:
        order = rng.permutation(len(labels))
        for at in range(0, len(order) - size + 1, size):
            pick = order[at : at + size]
            x = np.pad(images[pick], ((0, 0), (4, 4), (4, 4), (0, 0)))
            rows = rng.integers(0, 9, (size, 1, 1)) + np.arange(32)[:, None]
            columns = rng.integers(0, 9, (size, 1, 1)) + np.arange(32)
            columns = np.where(rng.random((size, 1, 1)) < 0.5, columns, columns[..., ::-1])
            yield {"image": x[np.arange(size)[:, None, None], rows, columns], "label": labels[pick]}


class Run:
    """The data and the few operations of the experiment; a network is ``(params, stats)``."""

    def __init__(self, args: argparse.Namespace, data: Any):
        self.args, self.train, self.test = args, data["train"], data["test"]
        self.model = models.load_pretrained("resnet56_cifar", str(args.weights), num_classes=10)
        self.network, state = training.create_state(self.model, optax.set_to_zero())
        self.published = jax.device_get((state.params, state.stats))
        self.hooks = training.Hooks(prepare=prepare)

        @jax.jit
        def predict(params: Any, stats: Any, x: Any) -> Any:
            x = prepare({"image": x}, None, False)["image"]
            return jnp.argmax(self.network.model(params, stats)(x), axis=-1)

        self.predict = predict

    def accuracy(self, params: Any, stats: Any) -> float:
        """Per cent of the test images."""
        images, labels = self.test
        found = [
            self.predict(params, stats, images[i : i + 500]) for i in range(0, len(images), 500)
        ]
        return 100 * float(np.mean(np.concatenate(found) == labels))

    def fit(
        self, params: Any, stats: Any, epochs: float, rate: float, wrap: Any, hooks: Any
    ) -> Any:
        """Trains ``params`` (a network's, or codebooks)."""
        size = self.args.batch
        steps = max(2, round(epochs * len(self.train[1]) / size))
        schedule = optax.cosine_onecycle_schedule(steps, rate, pct_start=0.15)
        optimizer = wrap(optax.sgd(schedule, momentum=0.9, nesterov=True))
        network, state = training.create_state(self.model, optimizer, params=params)
        state = state.replace(stats=jax.tree.map(jnp.asarray, stats))
        step = training.make_train_step(network, optimizer, hooks=hooks)
        feed = batches(self.train, size, self.args.seed)
        config = training.FitConfig(steps, log_every=0, progress=False)
        state = training.fit(step, state, feed, config).state
        return jax.device_get((state.params, state.stats))

    def cut(self, params: Any, sparsity: float) -> Any:
        """Parameters and mask after cutting by global magnitude."""
        mask = pruning.magnitude_mask(params, sparsity=sparsity, include=KERNELS)
        return jax.device_get((pruning.apply_mask(params, mask), mask))

    def retrained(self, params: Any, stats: Any, mask: Any) -> Any:
        """The survivors trained."""

        def wrap(optimizer: Any) -> Any:
            return pruning.masked(optimizer, mask)

        return self.fit(params, stats, self.args.epochs, self.args.rate, wrap, self.hooks)

    def file(self, params: Any, stats: Any, bits: int, tune: bool) -> dict[str, Any]:
        """Shares, tunes, codes; the accuracy is that of the network read back."""
        options = coding.DeepCompression(bits=bits, centroid_dtype="float16", other_dtype="float16")

        def finish(coded: Any) -> Any:
            nonlocal stats
            if tune:
                books, stats = self.fit(
                    coding.codebooks(coded),
                    stats,
                    self.args.tune_epochs,
                    self.args.tune_rate,
                    lambda optimizer: optimizer,
                    coding.codebook_hooks(coded, self.hooks),
                )
                coded = coding.with_codebooks(coded, books)
            tree = coding.expand(coded)
            # augmented as in training: over bare images the statistics cost 5 points of accuracy on
            # 2,000 training images that the retraining had not seen
            count = -(-self.args.recalibrate // 250)
            feed = itertools.islice(batches(self.train, 250, self.args.seed), count)
            stats = training.recalibrate_batchnorm(self.network, tree, stats, feed, prepare=prepare)
            shared = self.network.model(tree, stats)
            return coding.complete(coded, coding.absorb_statistics(shared))

        blob = coding.compress(params, options, finetune=finish, metadata={"net": "resnet56_cifar"})
        loaded = coding.restore(self.network.model(*self.published), coding.decompress(blob))
        _, state = training.create_state(loaded, optax.set_to_zero())
        sizes = coding.report(blob).as_dict()
        return {
            "accuracy": self.accuracy(state.params, state.stats),
            "file_bytes": len(blob),
            "bytes": sizes["bytes"],
        }

    def network_at(self, sparsity: float) -> Any:
        """The retrained network; kept in the work folder, where the next sparsity starts from."""
        file = self.args.work / f"{sparsity:g}.npz"
        below = [float(f.stem) for f in self.args.work.glob("*.npz")]
        below = [s for s in below if 0 < s < sparsity or s == sparsity]
        network = self.published
        if below:
            with np.load(self.args.work / f"{max(below):g}.npz") as arrays:
                network = treelib.map_with_path(lambda path, _: arrays[path], _named(network))
                network = network["params"], network["stats"]
        if file.exists():
            return network
        params, mask = self.cut(network[0], sparsity)
        network = self.retrained(params, network[1], mask)
        named: dict[str, Any] = treelib.flatten(_named(network))
        np.savez(file.with_suffix(".tmp"), **named)
        os.replace(file.with_suffix(".tmp.npz"), file)
        return network

    def point(self, sparsity: float) -> list[dict[str, Any]]:
        """The rows of one sparsity."""
        args, rows = self.args, []
        bare, _ = self.cut(self.published[0], sparsity)
        params, stats = self.network_at(sparsity)
        pruned = self.accuracy(params, stats)
        # of the network as it was given: 32-bit parameters and statistics
        dense = 4 * (treelib.count(self.published[0]) + treelib.count(self.published[1]))
        for bits in args.bits:
            before = self.file(bare, self.published[1], bits, tune=False)
            after = self.file(params, stats, bits, tune=True)
            row = {
                "sparsity": sparsity,
                "bits": bits,
                "nonzeros": treelib.nonzeros(params),
                "retrained_float32": {"accuracy": pruned},
                "before": {**before, "ratio": dense / before["file_bytes"]},
                "after": {**after, "ratio": dense / after["file_bytes"]},
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        return rows


def write(args: argparse.Namespace, base: float, sizes: dict[str, int], rows: list[Any]) -> None:
    """Merges the rows into the result file, atomically."""
    settings = {
        k: getattr(args, k)
        for k in ("train_images", "test_images", "epochs", "rate", "tune_epochs", "tune_rate")
        + ("batch", "recalibrate", "seed")
    }
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    kept = old.get("curve", []) if old.get("settings") == settings else []
    new = {(r["sparsity"], r["bits"]) for r in rows}
    kept = [r for r in kept if (r["sparsity"], r["bits"]) not in new]
    out = {
        "environment": report.environment(),
        "model": "resnet56_cifar, published weights",
        "data": "cifar10_jpeg",
        "reduced": args.train_images < 50_000 or args.test_images < 10_000 or args.epochs < 20,
        "images": sizes,
        "settings": settings,
        "published_accuracy": base,
        "curve": sorted(kept + rows, key=lambda r: (r["sparsity"], -r["bits"])),
    }
    report.write_result(out | table(out), args.out)


def table(out: dict[str, Any]) -> dict[str, Any]:
    """What ``scripts/update_results.py`` shows of the result."""
    extent = "reduced" if out["reduced"] else "full"
    images = out["images"]
    return {
        "format": report.TABLE,
        "name": "deep_compression_resnet56",
        "seeds": [out["settings"]["seed"]],
        "note": f"{extent} run: {images['train']:,} training images, {out['settings']['epochs']:g} "
        f"epochs a sparsity, {images['test']:,} test images, seed {out['settings']['seed']}; "
        f"the published weights have {out['published_accuracy']:.2f} % on these images. The ratio "
        "is float32 parameters and statistics over the file. Before: cut and shared without "
        "training; after: retrained, shared, codebooks tuned",
        "header": ["network", "sparsity %", "bits", "file before", "accuracy before %"]
        + ["float32 retrained %", "file after", "ratio after", "accuracy after %"],
        "rows": [
            [
                f"ResNet-56, {100 * r['sparsity']:g} %, {r['bits']} bits",
                f"{100 * r['sparsity']:g}",
                r["bits"],
                f"{r['before']['file_bytes']:,}",
                f"{r['before']['accuracy']:.2f}",
                f"{r['retrained_float32']['accuracy']:.2f}",
                f"{r['after']['file_bytes']:,}",
                f"{r['after']['ratio']:.1f}x",
                f"{r['after']['accuracy']:.2f}",
            ]
            for r in out["curve"]
        ],
    }


def main() -> None:
    """Walks up the sparsities."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--data_dir", help="TFDS folder with cifar10_jpeg prepared")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0, 0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--bits", type=int, nargs="+", default=[5, 4, 3])
    parser.add_argument("--train_images", type=int, default=50_000)
    parser.add_argument("--test_images", type=int, default=10_000)
    parser.add_argument("--recalibrate", type=int, default=2000, help="images of the statistics")
    parser.add_argument("--epochs", type=float, default=20, help="for each sparsity")
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--tune_epochs", type=float, default=1)
    parser.add_argument("--tune_rate", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/resnet56_coded"))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    from cnnjax import data as datalib

    data, limits = {}, {"train": args.train_images, "test": args.test_images}
    for split, limit in limits.items():
        images, labels = datalib.arrays("cifar10_jpeg", split, data_dir=args.data_dir)
        data[split] = images[:limit], labels[:limit]
    run = Run(args, data)
    base = run.accuracy(*run.published)
    print(f"published weights: {base:.2f} %", flush=True)
    sizes = {split: len(labels) for split, (_, labels) in data.items()}
    args.work.mkdir(parents=True, exist_ok=True)
    for sparsity in sorted(args.sparsities):
        write(args, base, sizes, run.point(sparsity))


def _named(network: Any) -> dict[str, Any]:
    return {"params": network[0], "stats": network[1]}


if __name__ == "__main__":
    main()
