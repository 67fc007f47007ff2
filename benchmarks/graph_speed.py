"""Time to read a network, choose half of its channels and cut them, beside Torch-Pruning.

    python benchmarks/graph_speed.py [--out FILE] [--models resnet50 densenet121] [--rounds 3]

For each model, on weights filled with random numbers, one process and CPU time:
  jaxpr    `jax.make_jaxpr` of the model alone: what JAX and Flax take, our floor;
  trace    `cnnjax.graph.trace`: jaxpr, label algebra, groups;
  select   L1 scores and `select_channels(ratio=0.5)`;
  shrink   `shrink(check=False)`: the new module with its label check (a second trace).
Torch-Pruning 1.6.1, where it is installed (with torch and torchvision for CPU), does the same in
the same run: dependency graph, L1 importance, 50 % of the channels, no round of fine-tuning.
The depth series reads ResNets without scanned stages: time and memory per block stay the same.
Written are seconds of this machine and, what carries over, ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import time
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cnnjax import graph, models, pruning, surgery
from cnnjax.graph import tracing

IMAGE = (1, 224, 224, 3)


def filled(name: str) -> nnx.Module:
    """The model with random numbers, without its initializers."""
    rng = np.random.default_rng(0)

    def leaf(path: str, a: Any) -> Any:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return jnp.zeros(a.shape, a.dtype)
        return jnp.asarray(0.05 * np.abs(rng.standard_normal(a.shape)) + 0.01, a.dtype)

    return surgery.map_leaves(models.abstract(name), leaf)


def ours(model: nnx.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """CPU seconds of every stage, once."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    clock = time.process_time
    jax.clear_caches()
    t0 = clock()
    fn, state = tracing.functional(model)
    tracing.program(fn, state, (x,))
    t1 = clock()
    jax.clear_caches()
    t2 = clock()
    read = graph.trace(model, x)
    t3 = clock()
    scores = pruning.importance.l1(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    jax.block_until_ready(scores)
    keep = pruning.select_channels(read, scores, ratio=0.5)
    t4 = clock()
    small = pruning.shrink(model, read, keep, check=False)
    jax.block_until_ready(jax.tree.leaves(nnx.state(small)))
    t5 = clock()
    return {
        "jaxpr": t1 - t0,
        "trace": t3 - t2,
        "select": t4 - t3,
        "shrink": t5 - t4,
        "total": t5 - t2,
    }


def theirs(name: str) -> dict[str, float] | None:
    """The same with Torch-Pruning; None where it isn't installed."""
    try:
        import torch
        import torch_pruning as tp
        import torchvision
    except ImportError:
        return None
    model = getattr(torchvision.models, name)()
    x = torch.randn(1, 3, 224, 224)
    keep = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
    clock = time.process_time
    t0 = clock()
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5,
        ignored_layers=keep,
    )  # fmt: skip
    t1 = clock()
    pruner.step()
    return {"graph": t1 - t0, "prune": clock() - t1, "total": clock() - t0}


def variable(*shape: int, kind: Any = nnx.Param) -> Any:
    """An abstract variable: building thousands of layers takes no time."""
    return kind(jax.ShapeDtypeStruct(shape, jnp.float32))


class ConvNorm(nnx.Module):
    """A convolution and a BatchNorm in evaluation mode, by hand."""

    def __init__(self, c: int, o: int) -> None:
        self.kernel = variable(3, 3, c, o)
        self.scale, self.bias = variable(o), variable(o)
        self.mean, self.var = (variable(o, kind=nnx.BatchStat) for _ in range(2))

    def __call__(self, x: Any) -> Any:
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, self.kernel[...], (1, 1), "SAME", dimension_numbers=dims
        )
        x = (x - self.mean[...]) * jax.lax.rsqrt(self.var[...] + 1e-5)
        return x * self.scale[...] + self.bias[...]


class Deep(nnx.Module):
    """Basic blocks, one after the other, none of them scanned."""

    def __init__(self, blocks: int) -> None:
        self.stem = ConvNorm(3, 16)
        self.blocks = nnx.List(
            [nnx.List([ConvNorm(16, 16), ConvNorm(16, 16)]) for _ in range(blocks)]
        )
        self.head = variable(16, 10)

    def __call__(self, x: Any) -> Any:
        x = self.stem(x)
        for a, b in self.blocks:
            x = jax.nn.relu(x + b(jax.nn.relu(a(x))))
        return x.mean((1, 2)) @ self.head[...]


def depth(blocks: int) -> dict[str, float]:
    """Milliseconds and peak Python kilobytes per block."""
    model = Deep(blocks)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    t = time.process_time()
    read = graph.trace(model, x)
    t = time.process_time() - t
    assert len(read.groups) == blocks + 1
    del read
    tracemalloc.start()
    graph.trace(model, x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "blocks": blocks,
        "ms_per_block": 1000 * t / blocks,
        "kb_per_block": peak / 1024 / blocks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--models", nargs="+", default=["resnet50", "densenet121"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depths", nargs="*", type=int, default=[27, 108, 300])
    args = parser.parse_args()
    report: dict[str, Any] = {
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "weights": "random",
        "input": list(IMAGE),
        "clock": "CPU seconds of the process, fastest round",
        "rounds": args.rounds,
        "models": {},
        "depth": [],
    }
    for name in args.models:
        model = filled(name)
        runs = [ours(model, IMAGE) for _ in range(args.rounds)]
        best = {k: min(r[k] for r in runs) for k in runs[0]}
        entry: dict[str, Any] = {
            "cnnjax": best,
            "first_round_total": runs[0]["total"],
            "analysis_over_jaxpr": (best["trace"] - best["jaxpr"]) / best["jaxpr"],
        }
        peer = [theirs(name) for _ in range(args.rounds)]
        if peer[0] is not None:
            other = {k: min(r[k] for r in peer if r) for k in peer[0]}
            entry["torch_pruning"] = other
            entry["torch_pruning_over_cnnjax"] = other["total"] / best["total"]
        report["models"][name] = entry
        print(name, json.dumps(entry, indent=1))
    for blocks in args.depths:
        report["depth"].append(depth(blocks))
        print(report["depth"][-1])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        temp = args.out.with_suffix(".tmp")
        temp.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(temp, args.out)


if __name__ == "__main__":
    main()
