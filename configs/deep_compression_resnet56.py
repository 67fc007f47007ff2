"""ResNet-56 on CIFAR-10, pruned, shared and coded without retraining: file ratio against accuracy.

Weights: a trained ResNet-56 with PyTorch's names, see ``cnnjax.models.load_pretrained``. Data:
``cifar10_jpeg``. Everything after loading is arithmetic on the weights, so this is the floor that
retraining improves on: a curve over sparsity and codebook bits.

Command (CPU; ``--images`` takes that many test images, 10,000 is the full set)::

    python configs/deep_compression_resnet56.py --weights cifar10_resnet56.npz --data_dir DIR

Expected: at sparsity 0 and 6 bits within a point of the dense network (83.20 % on the lossy copy)
at about 6 times smaller. Results: ``configs/results/deep_compression_resnet56.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import coding, models, pruning, report

RESULTS = pathlib.Path(__file__).parent / "results" / "deep_compression_resnet56.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POINTS = ((0.0, 8), (0.0, 6), (0.0, 5), (0.0, 4), (0.2, 5), (0.4, 5), (0.5, 5), (0.6, 5), (0.7, 5))
KERNELS = "**/kernel"


def main() -> None:
    """Measures the curve and writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--data_dir", help="TFDS folder with cifar10_jpeg prepared")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    from cnnjax import data

    images, labels = data.arrays("cifar10_jpeg", "test", data_dir=args.data_dir)
    images, labels = images[: args.images], labels[: args.images]
    model = models.load_pretrained("resnet56_cifar", str(args.weights), num_classes=10)
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    dense = jax.device_get(nnx.to_pure_dict(params))

    @jax.jit
    def logits(tree: Any, x: Any) -> Any:
        state = jax.tree.map(lambda a: a, params)
        nnx.replace_by_pure_dict(state, tree)
        x = (x.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
        return nnx.merge(graphdef, state, rest)(x)

    def accuracy(tree: Any) -> float:
        found = [
            np.argmax(logits(tree, images[i : i + 500]), axis=-1)
            for i in range(0, len(images), 500)
        ]
        return 100 * float(np.mean(np.concatenate(found) == labels))

    base = accuracy(dense)
    print(f"dense: {base:.2f} %", flush=True)
    rows = []
    for sparsity, bits in POINTS:
        tree = dense
        if sparsity:
            mask = pruning.magnitude_mask(dense, sparsity=sparsity, include=KERNELS)
            tree = jax.device_get(pruning.apply_mask(dense, mask))
        config = coding.DeepCompression(bits=bits, centroid_dtype="float16")
        blob = coding.compress(tree, config)
        row = {
            "sparsity": sparsity,
            "bits": bits,
            "file_bytes": len(blob),
            "ratio": coding.report(blob).ratio,
            "accuracy": accuracy(coding.decompress(blob)),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    out = {
        "environment": report.environment(),
        "full": len(images) == 10_000,
        "test_images": len(images),
        "retrained": False,
        "dense_accuracy": base,
        "curve": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(out, indent=1) + "\n")
    os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
