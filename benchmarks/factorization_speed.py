"""FLOP ratio against measured time ratio of factorized layers, and a network chosen by the clock.

    python benchmarks/factorization_speed.py [--out FILE] [--networks NAME ...] [--batch 8]

For each layer shape, method and share of MACs: what the counted MACs promise and what the present
device delivers (the original convolution and its factors timed in turns). Then whole networks:
every layer by the rule's share, and the same with the layers kept whose factors are not faster
(`cnnjax.factorization.keep_faster`), beside the original. Random weights of He's scale.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cnnjax import factorization as f
from cnnjax import models, surgery

# (size, in, out, kernel, stride)
LAYERS = [
    (32, 64, 64, 3, 1),
    (16, 128, 128, 3, 1),
    (16, 128, 128, 3, 2),
    (14, 256, 256, 3, 1),
    (7, 512, 512, 3, 1),
    (14, 256, 1024, 1, 1),
    (28, 32, 64, 5, 1),
]
RULES = {
    "basis": f.Basis,
    "spatial": f.Spatial,
    "tucker2": f.Tucker2,
    "cp": f.CP,
}
IMAGES = {"cifar": (32, 32, 3)}


class One(nnx.Module):
    """A network of one convolution."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        """(n, h, w, i) -> (n, h2, w2, o)."""
        return self.layer(x)  # pyright: ignore[reportCallIssue]


def layer_rows(batch: int, shares: list[float], rounds: int) -> list[dict[str, Any]]:
    """Counted and measured ratios of single layers."""
    rows = []
    for size, i, o, k, stride in LAYERS:
        model = One(nnx.Conv(i, o, (k, k), stride, use_bias=True, rngs=nnx.Rngs(0)))
        x = jnp.asarray(
            np.random.default_rng(0).standard_normal((batch, size, size, i)), jnp.float32
        )
        for name, rule in RULES.items():
            if k == 1 and name != "basis":
                continue
            for share in shares:
                options = {"iterations": 1, "restarts": 1} if name == "cp" else {}
                decided = f.plan(model, rule(f.MacsRatio(share), **options), x)
                entry = decided.layers[0]
                if entry.kept:
                    continue
                before, after = f.time_pair(model, f.factorize(model, decided), x, rounds=rounds)
                assert entry.macs is not None
                row = {
                    "layer": f"{k}x{k} {i}->{o} /{stride} on {size}x{size}",
                    "method": name,
                    "ranks": list(entry.ranks),
                    "macs_ratio": entry.macs[0] / entry.macs[1],
                    "time_ratio": before / after,
                    "milliseconds": 1e3 * before,
                }
                row["reached"] = row["time_ratio"] / row["macs_ratio"]
                rows.append(row)
                print(
                    f"{row['layer']:28s} {name:8s} rank {entry.ranks!s:12s} MACs "
                    f"{row['macs_ratio']:5.2f}x  time {row['time_ratio']:5.2f}x",
                    flush=True,
                )
    return rows


def filled(name: str) -> nnx.Module:
    """The network with random numbers, without its initializers."""
    rng = np.random.default_rng(0)

    def leaf(path: str, a: Any) -> Any:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return jnp.zeros(a.shape, a.dtype)
        if path.endswith(("var", "scale")):
            return jnp.ones(a.shape, a.dtype)
        # activations that die out become denormal numbers, which take many times longer
        fan = max(1, int(np.prod(a.shape[:-1])))
        size = np.sqrt(2 / fan) if a.ndim > 1 else 0.05
        return jnp.asarray(size * rng.standard_normal(a.shape), a.dtype)

    return surgery.map_leaves(models.abstract(name), leaf)


def network_row(name: str, batch: int, share: float, rounds: int) -> dict[str, Any]:
    """The whole network: original, all layers factorized, layers chosen by the clock."""

    def timer(before: Any, after: Any, x: Any) -> tuple[float, float]:
        return f.time_pair(before, after, x, rounds=rounds)

    model = nnx.view(filled(name), use_running_average=True, raise_if_not_found=False)
    shape = next((v for k, v in IMAGES.items() if k in name), (224, 224, 3))
    example = jnp.asarray(np.random.default_rng(0).standard_normal((batch, *shape)), jnp.float32)
    out: dict[str, Any] = {"network": name, "batch": batch, "share": share, "methods": {}}
    for method, rule in (("tucker2", f.Tucker2), ("spatial", f.Spatial)):
        decided = f.plan(model, rule(f.MacsRatio(share)), example)
        everything = timer(model, f.factorize(model, decided), example)
        found = f.keep_faster(model, decided, example, timer=timer)
        row = {
            "all_time_ratio": everything[0] / everything[1],
            "chosen_time_ratio": found.network[0] / found.network[1],
            "factorized": sum(not p.kept for p in found.plan.layers),
            "kept_by_the_clock": sum("faster" in (p.kept or "") for p in found.plan.layers),
            "reverted": len(found.reverted),
            "milliseconds": 1e3 * found.network[0],
            "layers": f.report(found.plan),
        }
        out["methods"][method] = row
        print(
            f"{name} {method}: all layers {row['all_time_ratio']:.2f}x, chosen by the clock "
            f"{row['chosen_time_ratio']:.2f}x ({row['factorized']} factorized, "
            f"{row['kept_by_the_clock']} kept as not faster)",
            flush=True,
        )
    return out


def main() -> int:
    """Runs and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/factorization_speed.json")
    parser.add_argument("--networks", nargs="*", default=["resnet20_cifar"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--share", type=float, default=0.5, help="of the whole networks' layers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip_layers", action="store_true")
    flags = parser.parse_args()
    out = pathlib.Path(flags.out)
    known = json.loads(out.read_text()) if out.exists() else {"networks": []}
    known.update(
        hardware=f"{platform.machine()} {jax.default_backend()}, {os.cpu_count()} cores",
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        weights="random",
        clock="ratios of median wall seconds, both called in turns",
        batch=flags.batch,
    )
    if not flags.skip_layers:
        known["layers"] = layer_rows(flags.batch, flags.shares, flags.rounds)
    for name in flags.networks:
        rows = [r for r in known.get("networks", []) if r["network"] != name]
        known["networks"] = [*rows, network_row(name, flags.batch, flags.share, flags.rounds)]
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(temporary, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
