"""Zhang's claims in kind: top-1 without fine-tuning by way of reconstruction, at equal ranks.

    python benchmarks/response_reconstruction.py --weights cifar10_resnet20.npz --data_dir DIR

A published CIFAR ResNet on the JPEG copy of CIFAR-10. The residual blocks' convolutions get the
PCA-energy ranks of the wanted share of MACs; then the same plan is fitted in every way: from the
weights alone, linear or ReLU-aware, on the original network's inputs (symmetric) or the compressed
network's own (asymmetric). Nothing is fine-tuned. ``--depths N ...`` replaces only the first N
layers of the plan, at the same ranks: the error that the layers before leave behind grows with N. A
row is written as soon as it is measured, and rows that the file has are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from flax import nnx
from records import write

from cnnjax import data, factorization, models, report
from cnnjax.factorization import Asymmetric3D, Basis, Reconstruction

RESULT = pathlib.Path(__file__).parent / "results" / "response_reconstruction.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RULES: dict[str, Any] = {"channels": Basis(), "3-D": Asymmetric3D()}
WAYS = (
    "weights",
    "linear, symmetric",
    "ReLU-aware, symmetric",
    "linear, asymmetric",
    "ReLU-aware, asymmetric",
)


KEY = ("model", "rule", "share", "way", "layers")


def main() -> None:
    """Measures what is missing and writes the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--model", default="resnet20_cifar")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.6, 0.5])
    parser.add_argument("--depths", type=int, nargs="+", default=[None])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rules", nargs="+", default=["channels"], choices=list(RULES))
    parser.add_argument("--train_images", type=int, default=1024)
    parser.add_argument("--test_images", type=int, default=2000)
    flags = parser.parse_args()
    network = models.load_pretrained(flags.model, flags.weights, rngs=nnx.Rngs(0), num_classes=10)
    train = [b["image"] for b in batches(flags, f"train[:{flags.train_images}]", 256)]
    test = list(batches(flags, f"test[:{flags.test_images}]", 500))
    example = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    record: dict[str, Any] = {"rows": []}
    if RESULT.exists():
        record = json.loads(RESULT.read_text())
    record |= {
        "what": "top-1 on test images without fine-tuning, by way of fitting at equal ranks",
        "data": "cifar10_jpeg",
        "environment": report.environment(),
    }
    known = {tuple(map(r.get, KEY)) for r in record["rows"]}
    for name, share in itertools.product(flags.rules, flags.shares):
        missing = [
            (depth, way)
            for depth, way in itertools.product(flags.depths, flags.ways)
            if (flags.model, name, share, way, depth) not in known
        ]
        if missing:
            rules: Any = {"layer*/*/conv*": RULES[name]}
            plan = factorization.pca_plan(network, rules, train, share, example=example)
            for depth, way in missing:
                row = dict(zip(KEY, (flags.model, name, share, way, depth)))
                small = fitted(network, first(plan, depth), train, example, way)
                row |= {
                    "train_images": flags.train_images,
                    "test_images": flags.test_images,
                    "top1": top1(small, test),
                }
                print(row, flush=True)
                record["rows"].append(row)
                write(RESULT, record)


def first(plan: Any, layers: int | None) -> Any:
    """The plan for its first replaced layers only, None: for all."""
    replaced = [p for p in plan.layers if p.ranks and not p.kept]
    return dataclasses.replace(plan, layers=tuple(replaced[:layers]))


def batches(flags: argparse.Namespace, split: str, size: int) -> Any:
    """One pass over a split, normalised as the weights want it."""
    return data.loader(
        "cifar10_jpeg",
        split,
        batch_size=size,
        train=False,
        augment=data.Augment(mean=MEAN, std=STD),
        data_dir=flags.data_dir,
        workers=0,
    )


def fitted(network: Any, plan: Any, train: Any, example: Any, way: str) -> Any:
    """The network of a plan, fitted in one of the ways."""
    if way == "weights":
        return factorization.factorize(network, plan)
    kind, inputs = way.split(", ")
    options = Reconstruction(nonlinear=kind == "ReLU-aware", asymmetric=inputs == "asymmetric")
    return factorization.reconstruct(network, plan, train, example=example, options=options)[0]


def top1(model: Any, test: list[Any]) -> float:
    """Share of right answers."""
    graphdef, state = nnx.split(nnx.view(model, use_running_average=True))
    answer = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x).argmax(-1))
    right = [np.asarray(answer(state, b["image"])) == b["label"] for b in test]
    return float(np.mean(np.concatenate(right)))


if __name__ == "__main__":
    main()
