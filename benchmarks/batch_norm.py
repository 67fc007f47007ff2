"""Training steps with Flax's batch normalization and with `cnnjax.ops.BatchNorm`, side by side.

    python benchmarks/batch_norm.py

The step is the gradient of the cross-entropy in training mode, with the new statistics. Times are
the process' CPU seconds, the least of rounds in turns; memory is what the compiled program holds
beside its arguments and results. Both as ratios, Flax over ours.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from records import machine, write

from cnnjax import models, ops

RESULT = pathlib.Path(__file__).parent / "results" / "batch_norm.json"
# network, batch, size
CASES = [
    ("mobilenet_v2", 8, 224),
    ("resnet50", 8, 128),
    ("densenet121", 8, 128),
    ("inception_v3", 8, 139),
    ("resnet56_cifar", 64, 32),
    ("densenet_40_12", 32, 32),
]


def compiled(name: str, batch: int, size: int, norm: type) -> tuple[Callable[[], Any], int, Any]:
    """One step as a call, its temporary bytes, and its gradient."""
    model = models.create(name, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(model):
        if type(module) is ops.BatchNorm:
            module.__class__ = norm
    model.train()
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)

    def loss(weights: Any, rest: Any, x: Any, y: Any) -> Any:
        inner = nnx.merge(graphdef, weights, rest, copy=True)
        logits = jax.tree.leaves(inner(x))[0]
        values = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return values.mean(), nnx.state(inner, nnx.BatchStat)

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, size, size, 3)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, batch))
    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(weights, rest, x, y).compile()
    found: Any = step.memory_analysis()
    gradient = step(weights, rest, x, y)[1]
    return (lambda: step(weights, rest, x, y)), found.temp_size_in_bytes, gradient


def measure(name: str, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Ratios of time and memory, and how far the gradients are apart."""
    sides = [compiled(name, batch, size, norm) for norm in (nnx.BatchNorm, ops.BatchNorm)]
    best = [np.inf, np.inf]
    for _ in range(rounds):
        for i, (call, _, _) in enumerate(sides):
            start = time.process_time()
            jax.block_until_ready(call())
            best[i] = min(best[i], time.process_time() - start)
    flat = [np.concatenate([np.ravel(v) for v in jax.tree.leaves(g)]) for _, _, g in sides]
    return {
        "network": name,
        "batch": batch,
        "size": size,
        "time_ratio": round(best[0] / best[1], 3),
        "memory_ratio": round(sides[0][1] / sides[1][1], 3),
        "gradient_difference": float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0])),
    }


def main() -> None:
    """Measures the cases and writes the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows: list[dict[str, Any]] = []
    for case in CASES:
        rows.append(measure(*case, rounds))
        print(rows[-1], flush=True)
        write(RESULT, {"what": "Flax over ours", "rows": rows, **machine()})


if __name__ == "__main__":
    main()
