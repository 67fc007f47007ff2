"""Time group-wise brain damage's thin product against the dense convolution.

    python benchmarks/thin_conv.py [--out FILE] [--rounds 8]

A 3x3 layer keeps a share of the columns of its lowered kernel (one input channel at one place of
the window), the same ones for all filters; ``ThinConv`` gathers these alone and multiplies. The two
run in turns, the fastest round of each in CPU seconds counts, and only the ratio is written
(dense / thin).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from records import machine, write

from cnnjax import pruning

# (batch, size, channels)
CASES = [(8, 56, 64), (8, 28, 128), (8, 14, 256), (1, 28, 128)]
SHARES = (0.1, 0.3, 0.5)


def measure(case: tuple[int, int, int], share: float, rounds: int) -> dict[str, object]:
    """One layer that keeps a share of its columns."""
    batch, size, channels = case
    layer = nnx.Conv(channels, channels, (3, 3), padding="SAME", rngs=nnx.Rngs(0))
    columns = np.random.default_rng(0).random((3, 3, channels)) < share
    mask = np.broadcast_to(columns[..., None], layer.kernel.shape)
    layer.kernel[...] = jnp.where(mask, layer.kernel[...], 0)
    networks = {"dense": layer, "thin": pruning.ThinConv(layer, mask)}
    x = jax.random.normal(jax.random.key(0), (batch, size, size, channels))
    run = {name: nnx.jit(lambda m, x: m(x)) for name in networks}
    out = {name: run[name](m, x) for name, m in networks.items()}
    best = dict.fromkeys(networks, float("inf"))
    for _ in range(rounds):
        for name, network in networks.items():
            start = time.process_time()
            jax.block_until_ready(run[name](network, x))
            best[name] = min(best[name], time.process_time() - start)
    return {
        "case": case,
        "columns": float(columns.mean()),
        "dense_over_thin": round(best["dense"] / best["thin"], 2),
        "largest_difference": float(jnp.max(jnp.abs(out["dense"] - out["thin"]))),
    }


def main() -> None:
    """Measures every case and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = pathlib.Path(__file__).parent / "results" / "thin_conv.json"
    parser.add_argument("--out", type=pathlib.Path, default=default)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    rows = []
    for case in CASES:
        for share in SHARES:
            rows.append(measure(case, share, args.rounds))
            print(json.dumps(rows[-1]), flush=True)
    what = "time of the dense convolution / of the thin product, float32"
    write(args.out, {"what": what, **machine(), "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
