"""Dense networks on MNIST: what a teacher's outputs carry, beyond labels and without them.

    python configs/mnist_dark_knowledge.py --data_dir DIR

Students are 784-32-10 perceptrons, Adam 1e-3, batches of 128, 6,000 steps; three teachers of
784-400-400-10 on 20,000 training images, averaged in their logits. All 10,000 test images, three
seeds of the students.

- Few labels, many images without any (the survey's scheme): 1,000 labels alone, against the
  teachers' soft targets (T = 4) on all 20,000 images without a label.
- The same images: logits (Ba & Caruana 2014, 1312.6184) against soft targets (Hinton et al. 2015,
  1503.02531); a transfer set without any 3, and the class seen nevertheless.
- Made-up images (Bucila et al. 2006): ten teachers that saw 1,000 images label MUNGE's images, or
  pixels drawn one by one.

``--reduced 4`` takes a quarter of all steps.

What `scripts/update_results.py` found in ``configs/results/mnist_dark_knowledge.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 1 CPU cores, 1 x cpu, jax 0.10.2
# teachers of 20,000 images, mean of 3: % 97.32, runs 1
# teachers of 20,000 images, together: % 97.75, runs 1
# teachers of 1,000 images, mean of 10: % 90.06, runs 1
# teachers of 1,000 images, together: % 90.24, runs 1
# agreement with the teachers, 500 images: % 88.58 (88.43-88.85), runs 3
# agreement with the teachers, 2,000 images: % 93.15 (92.87-93.36), runs 3
# agreement with the teachers, 20,000 images: % 96.66 (96.51-96.76), runs 3
# hard, 1,000 labels: % 89.17 (89.10-89.29), runs 3
# KD, the same 1,000 images: % 90.29 (90.22-90.42), runs 3
# KD, 20,000 images without labels: % 95.62 (95.53-95.76), runs 3
# logits, 20,000 images without labels: % 95.06 (94.76-95.28), runs 3
# hard, 20,000 labels: % 95.12 (94.95-95.25), runs 3
# recall of threes, KD without any 3: % 29.87 (26.14-36.44), runs 3
# recall of threes, KD without any 3, bias + 4: % 57.39 (53.56-62.97), runs 3
# recall of threes, hard without any 3: % 0.00, runs 3
# recall of threes, hard without any 3, bias + 4: % 0.00, runs 3
# KD, 20,000 images of MUNGE, teachers of 1,000 images: % 89.38 (89.35-89.41), runs 3
# KD, 20,000 images of single pixels, teachers of 1,000 images: % 86.61 (86.04-87.61), runs 3
# [/measured]

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax import data, distillation, report

RESULTS = pathlib.Path(__file__).parent / "results" / "mnist_dark_knowledge.json"
STUDENT, TEACHER, SMALL_TEACHER = (784, 32, 10), (784, 400, 400, 10), (784, 128, 10)
OMITTED, SHIFT = 3, 4.0  # the class without examples, and what is added to its bias
MANY, FEW = 20_000, 1_000


def fresh(key: Any, sizes: tuple[int, ...]) -> list[Any]:
    """He-normal kernels and zero biases."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (a, b)) * jnp.sqrt(2 / a), jnp.zeros(b))
        for k, a, b in zip(keys, sizes, sizes[1:])
    ]


@jax.jit
def logits(params: list[Any], x: Any) -> Any:
    """(n, 784) -> (n, 10)."""
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


LOSSES: dict[str, Callable[..., Any]] = {
    "hard": lambda z, y: distillation.cross_entropy(z, y),
    "kd": lambda z, v: distillation.kd(z, v, temperature=4.0, alpha=1.0),
    "kd2": lambda z, v: distillation.kd(z, v, temperature=2.0, alpha=1.0),
    "logits": lambda z, v: distillation.logit_regression(z, v),
}


@functools.partial(jax.jit, static_argnames=("sizes", "loss", "steps"))
def trained(key: Any, x: Any, target: Any, sizes: Any, loss: str, steps: int) -> Any:
    """A network after ``steps`` batches of 128, all in one compiled loop."""
    start, order = jax.random.split(key)
    tx = optax.adam(1e-3)
    params = fresh(start, sizes)

    def one(i: Any, carry: Any) -> Any:
        params, opt = carry
        rows = jax.random.randint(jax.random.fold_in(order, i), (128,), 0, len(x))
        gradient = jax.grad(lambda p: LOSSES[loss](logits(p, x[rows]), target[rows]))(params)
        updates, opt = tx.update(gradient, opt)
        return optax.apply_updates(params, updates), opt

    return jax.lax.fori_loop(0, steps, one, (params, tx.init(params)))[0]


def accuracy(found: Any, truth: Any) -> float:
    """Of logits against classes."""
    return float((np.asarray(found).argmax(-1) == np.asarray(truth)).mean())


def measure(arrays: Any, teachers: Any, seed: int, steps: int) -> dict[str, float]:
    """Every student of one seed."""
    x, y, tx, ty = arrays
    key = jax.random.key(seed)
    many = distillation.ensemble_logits([logits(p, x) for p in teachers["large"]])
    several = distillation.ensemble_logits([logits(p, tx) for p in teachers["large"]])

    def student(loss: str, images: Any, target: Any) -> Any:
        return trained(key, images, target, STUDENT, loss, steps)

    few = slice(0, FEW)
    out: dict[str, float] = {}
    networks = {
        "hard, 1,000 labels": student("hard", x[few], y[few]),
        "KD, the same 1,000 images": student("kd", x[few], many[few]),
        "KD, 20,000 images without labels": student("kd", x, many),
        "logits, 20,000 images without labels": student("logits", x, many),
        "hard, 20,000 labels": student("hard", x, y),
    }
    for size in (500, 2_000):
        net = student("kd", x[:size], many[:size])
        out[f"agreement with the teachers, {size:,} images"] = accuracy(
            logits(net, tx), np.asarray(several).argmax(-1)
        )
    net = networks["KD, 20,000 images without labels"]
    out["agreement with the teachers, 20,000 images"] = accuracy(
        logits(net, tx), np.asarray(several).argmax(-1)
    )
    out |= {name: accuracy(logits(net, tx), ty) for name, net in networks.items()}
    seen, threes = np.asarray(y) != OMITTED, np.asarray(ty) == OMITTED
    for name, loss, target in (("KD", "kd", many), ("hard", "hard", y)):
        found = np.array(logits(student(loss, x[seen], target[seen]), tx))[threes]
        out[f"recall of threes, {name} without any 3"] = accuracy(found, OMITTED)
        found[:, OMITTED] += SHIFT
        out[f"recall of threes, {name} without any 3, bias + {SHIFT:g}"] = accuracy(found, OMITTED)
    copies = MANY // FEW
    low, high = x[few].min(0), x[few].max(0)
    made = {
        "MUNGE": distillation.munge(key, x[few], k=copies, p=0.3, s=4.0),
        "single pixels": distillation.independent_marginals(key, x[few], size=MANY),
    }
    for name, images in made.items():
        images = jnp.clip(jnp.asarray(images), low, high)
        target = distillation.ensemble_logits([logits(p, images) for p in teachers["small"]])
        net = student("kd2", images, target)
        out[f"KD, 20,000 images of {name}, teachers of 1,000 images"] = accuracy(
            logits(net, tx), ty
        )
    return out


def main() -> None:
    """Trains the teachers, then every student; the result file grows by a seed at a time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data_dir", default=None)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--reduced", type=int, default=1, help="divide the steps by this")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    raw = [*data.arrays("mnist", f"train[:{MANY}]", args.data_dir)]
    raw += data.arrays("mnist", "test", args.data_dir)
    x, tx = (jnp.asarray(np.asarray(a, np.float32).reshape(len(a), -1) / 255) for a in raw[::2])
    y, ty = (jnp.asarray(a, jnp.int32) for a in raw[1::2])
    steps = {"large": 4000 // args.reduced, "small": 1500 // args.reduced}
    key = jax.random.key(100)
    few = slice(0, FEW)
    teachers = {
        "large": [
            trained(jax.random.fold_in(key, i), x, y, TEACHER, "hard", steps["large"])
            for i in range(3)
        ],
        "small": [
            trained(
                jax.random.fold_in(key, 10 + i), x[few], y[few], SMALL_TEACHER, "hard",
                steps["small"],
            )
            for i in range(10)
        ],
    }  # fmt: skip
    shown = {}
    for name, nets in teachers.items():
        each = [logits(p, tx) for p in nets]
        size = f"{MANY if name == 'large' else FEW:,}"
        shown[f"teachers of {size} images, mean of {len(nets)}"] = [
            float(np.mean([accuracy(v, ty) for v in each]))
        ]
        shown[f"teachers of {size} images, together"] = [
            accuracy(distillation.ensemble_logits(each), ty)
        ]
    runs = []
    for seed in args.seeds:
        runs.append(measure((x, y, tx, ty), teachers, seed, 6000 // args.reduced))
        print(json.dumps(runs[-1]), flush=True)
        rows = {**shown, **{name: [run[name] for run in runs] for name in runs[0]}}
        record = {
            "format": report.TABLE,
            "name": "mnist_dark_knowledge",
            "note": "last step; mean (min-max) over the seeds of the students; 10,000 test images",
            "seeds": args.seeds[: len(runs)],
            "reduced": args.reduced > 1,
            "header": ["network", "%", "runs"],
            "rows": [
                [
                    name,
                    report.spread(
                        {"mean": float(np.mean(v)), "min": min(v), "max": max(v)}, scale=100.0
                    ),
                    len(v),
                ]
                for name, v in rows.items()
            ],
            "runs": runs,
            "environment": report.environment(),
        }
        report.write_result(record, args.out)


if __name__ == "__main__":
    main()
