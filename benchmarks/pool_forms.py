"""Time the gradient of max pooling, ours against JAX's own.

    python benchmarks/pool_forms.py [--out FILE] [--rounds 5]

Forward and gradient together, the two in turn, the fastest round of each counts; on a shared
machine the minimum is what the code needs. Only ratios are written (native time / our time).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from records import machine, write

from cnnjax import ops

# (shape, window, stride, padding): LeNet-5, a CIFAR VGG, VGG-16, ResNet's stem, Inception's pools
CASES = [
    ((64, 24, 24, 20), 2, 2, "VALID"),
    ((64, 8, 8, 50), 2, 2, "VALID"),
    ((32, 32, 32, 64), 2, 2, "VALID"),
    ((8, 112, 112, 64), 2, 2, "VALID"),
    ((8, 112, 112, 64), 3, 2, ((1, 1), (1, 1))),
    ((1, 112, 112, 64), 3, 2, ((1, 1), (1, 1))),
    ((8, 35, 35, 288), 3, 2, "VALID"),
    ((8, 28, 28, 192), 3, 1, "SAME"),
    ((8, 14, 14, 480), 3, 1, "SAME"),
]


POOLS = {"native": nnx.max_pool, "ours": ops.max_pool}


def gradient(pool: Any, window: int, stride: int, padding: Any) -> Any:
    """(images, cotangent or None for ones) -> values and the images' cotangent."""

    def run(x: Any, ct: Any) -> Any:
        y, back = jax.vjp(lambda x: pool(x, (window,) * 2, (stride,) * 2, padding), x)
        return y, back(jnp.ones_like(y) if ct is None else ct)[0]

    return jax.jit(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = pathlib.Path(__file__).parent / "results" / "pool_forms.json"
    parser.add_argument("--out", type=pathlib.Path, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for shape, k, s, padding in CASES:
        image = jax.random.normal(jax.random.key(0), shape)
        forms = {name: gradient(pool, k, s, padding) for name, pool in POOLS.items()}
        size = jax.eval_shape(forms["ours"], image, None)[0].shape
        ct = jax.random.normal(jax.random.key(1), size)
        results = {name: jax.block_until_ready(f(image, ct)) for name, f in forms.items()}
        gap = float(np.abs(results["native"][1] - results["ours"][1]).max())
        best = dict.fromkeys(forms, float("inf"))
        for _ in range(args.rounds):
            for name, f in forms.items():
                start = time.perf_counter()
                jax.block_until_ready(f(image, ct))
                best[name] = min(best[name], time.perf_counter() - start)
        row = {
            "shape": shape, "window": k, "stride": s, "padding": padding,
            "native_over_ours": round(best["native"] / best["ours"], 2), "largest_difference": gap,
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        rows.append(row)
    record = {
        "what": "native time / our time, forward and gradient of a max pool, float32",
        **machine(),
        "rounds": args.rounds,
        "rows": rows,
    }
    write(args.out, record)


if __name__ == "__main__":
    main()
