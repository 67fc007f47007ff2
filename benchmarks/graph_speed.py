"""Time to read a network, choose half of its channels and cut them, beside Torch-Pruning.

    python benchmarks/graph_speed.py [--out FILE] [--models resnet50 densenet121] [--rounds 5]

For each model, on weights filled with random numbers, each side in a fresh process of one thread:
  trace    `cnnjax.graph.trace`: labels, groups, layers;
  scores   the L1 norms of all kernels;
  select   `select_channels(ratio=0.5)`;
  shrink   `shrink(check=False)`: the new module, its arrays cut, its label check (a second run);
  proof    what `shrink` takes longer with the numeric proof (both networks compiled and run, images
           of 64 x 64), counted apart: the other side has nothing like it.
Torch-Pruning 1.6.1, where it is installed (with torch and torchvision for CPU), does the same in
the same run: dependency graph, L1 importance, 50 % of the channels of every group, one step.
``cold`` is the first time in a process (imports are not counted, compilations and JAX's own caches
are), ``warm`` the fastest of the later rounds; ``cleared`` the fastest with JAX's caches dropped
before each. ``jaxpr`` is `jax.make_jaxpr` of the model alone, where reading equations would start.
The depth series reads and shrinks ResNets (56, 110, 164, 1202 layers) without scanned stages, from
abstract values. Their memory is the peak while the collector is paused, by `tracemalloc`.
Written are CPU seconds of this machine and, what carries over, ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
import tracemalloc
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import graph, models, pruning, surgery
from cnnjax.graph import tracing

IMAGE = (1, 224, 224, 3)
PROOF = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)


def filled(name: str) -> nnx.Module:
    """The model with random numbers, without its initializers."""
    rng = np.random.default_rng(0)

    def leaf(path: str, a: Any) -> Any:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return jnp.zeros(a.shape, a.dtype)
        return jnp.asarray(0.05 * np.abs(rng.standard_normal(a.shape)) + 0.01, a.dtype)

    return surgery.map_leaves(models.abstract(name), leaf)


def once(model: nnx.Module, shape: tuple[int, ...] = IMAGE) -> tuple[dict[str, float], Any]:
    """CPU seconds of every stage, once; and the graph, the decision and the small model."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    clock, wall = time.process_time, time.perf_counter()
    t = [clock()]
    read = graph.trace(model, x)
    t.append(clock())
    weights = {p: a for p, a in surgery.leaves(model).items() if p in read.parameters}
    scores = pruning.importance.l1(weights)
    jax.block_until_ready(scores)
    t.append(clock())
    keep = pruning.select_channels(read, scores, ratio=0.5)
    t.append(clock())
    small = pruning.shrink(model, read, keep, check=False)
    jax.block_until_ready(jax.tree.leaves(nnx.state(small)))
    t.append(clock())
    names = ("trace", "scores", "select", "shrink")
    spent = {name: b - a for name, a, b in zip(names, t, t[1:])}
    spent |= {"total": t[-1] - t[0], "wall": time.perf_counter() - wall}
    return spent, (read, keep, small)


def fastest(runs: list[dict[str, float]]) -> dict[str, float]:
    """The round with the least total."""
    return min(runs, key=lambda r: r["total"])


def ours(name: str, rounds: int, proof: bool) -> dict[str, Any]:
    """Our side, in this process."""
    model = filled(name)
    x = jax.ShapeDtypeStruct(IMAGE, jnp.float32)
    clock = time.process_time
    out: dict[str, Any] = {}
    out["cold"], (read, keep, small) = once(model)
    out["warm"] = fastest([once(model)[0] for _ in range(rounds)])
    cleared = []
    for _ in range(rounds):
        jax.clear_caches()
        cleared.append(once(model)[0])
    out["cleared"] = fastest(cleared)
    jaxpr = []
    for _ in range(3):
        jax.clear_caches()
        t = clock()
        tracing.jaxpr_of(tracing.program_of(model), (x,))
        jaxpr.append(clock() - t)
    out["jaxpr"] = min(jaxpr)
    out["parameters_left"] = sum(p.size for p in jax.tree.leaves(nnx.state(small, nnx.Param)))
    if proof:
        t = clock()
        pruning.shrink(model, read, keep, check=True, inputs=(PROOF,))
        out["proof"] = clock() - t - out["warm"]["shrink"]
    return out


def theirs(name: str, rounds: int, threads: int) -> dict[str, Any] | None:
    """Torch-Pruning's side, in this process; None where it isn't installed.

    CPU seconds of all threads, and seconds by the clock.
    """
    try:
        import torch
        import torch_pruning as tp
        import torchvision
    except ImportError:
        return None
    torch.set_num_threads(threads)
    clock = time.process_time
    runs = []
    for _ in range(rounds + 1):
        model = getattr(torchvision.models, name)().eval()
        x = torch.randn(1, 3, 224, 224)
        keep = [
            m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000
        ]
        wall, t0 = time.perf_counter(), clock()
        pruner = tp.pruner.MagnitudePruner(
            model, x, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5,
            ignored_layers=keep,
        )  # fmt: skip
        t1 = clock()
        pruner.step()
        t2 = clock()
        runs.append({"graph": t1 - t0, "prune": t2 - t1, "total": t2 - t0})
        runs[-1]["wall"] = time.perf_counter() - wall
        left = sum(p.numel() for p in model.parameters())
    return {
        "cold": runs[0],
        "warm": fastest(runs[1:]),
        "threads": threads,
        "parameters_left": left,
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }


def child(side: str, name: str, rounds: int, proof: bool, threads: int = 1) -> Any:
    """One side in a fresh process."""
    found = subprocess.run(
        [sys.executable, __file__, "--side", side, "--models", name, "--rounds", str(rounds)]
        + ["--threads", str(threads)]
        + (["--proof"] if proof else []),
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        },
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(found.stdout.strip().splitlines()[-1])


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
    """Milliseconds and peak Python kilobytes per block, of reading and of the whole way.

    ``links_per_block`` are those of the adjacency with streams (`cnnjax.graph.Graph.links`).
    """
    model = Deep(blocks)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

    def whole() -> tuple[float, float, int]:
        t = time.process_time()
        read = graph.trace(model, x)
        reading = time.process_time() - t
        assert len(read.groups) == blocks + 1
        half = read.alive()
        for group in read.groups:
            half[group.atoms[::2]] = False
        pruning.shrink(model, read, half)
        return reading, time.process_time() - t, len(read.links)

    reading, total, links = whole()
    tracemalloc.start()
    whole()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "layers": 2 * blocks + 2,
        "blocks": blocks,
        "trace_ms_per_block": 1000 * reading / blocks,
        "total_ms_per_block": 1000 * total / blocks,
        "peak_kb_per_block": peak / 1024 / blocks,
        "links_per_block": links / blocks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--models", nargs="+", default=["resnet50", "densenet121"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depths", nargs="*", type=int, default=[27, 54, 81, 600])
    parser.add_argument("--proof", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        (name,) = args.models
        own = args.side == "ours"
        out = (
            ours(name, args.rounds, args.proof) if own else theirs(name, args.rounds, args.threads)
        )
        print(json.dumps(out))
        return
    report: dict[str, Any] = {
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "weights": "random",
        "input": list(IMAGE),
        "clock": "CPU seconds of the process, one thread a side (two threads: a row of its own)",
        "cold": "first time in the process, with every compilation; imports are not counted",
        "warm": "fastest later round, JAX's caches kept",
        "cleared": "fastest later round, JAX's caches dropped before it",
        "proof": "the numeric proof on top of shrink, with both compilations; not in the totals",
        "rounds": args.rounds,
        "models": {},
        "depth": [],
    }
    for name in args.models:
        entry: dict[str, Any] = {"cnnjax": child("ours", name, args.rounds, args.proof)}
        peer = child("theirs", name, args.rounds, False)
        if peer is not None:
            entry["torch_pruning"] = peer
            entry["torch_pruning_two_threads"] = child("theirs", name, args.rounds, False, 2)
            entry["torch_pruning_over_cnnjax"] = {
                how: peer[how if how == "cold" else "warm"]["total"] / entry["cnnjax"][how]["total"]
                for how in ("cold", "warm", "cleared")
            }
            two = entry["torch_pruning_two_threads"]["warm"]["wall"]
            entry["by_the_clock"] = {
                "torch_pruning_one_thread": peer["warm"]["wall"] / entry["cnnjax"]["warm"]["wall"],
                "torch_pruning_two_threads": two / entry["cnnjax"]["warm"]["wall"],
            }
        report["models"][name] = entry
        print(name, json.dumps(entry, indent=1), flush=True)
    depth(8)  # the first time in a process
    for blocks in args.depths:
        report["depth"].append(depth(blocks))
        print(report["depth"][-1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        temp = args.out.with_suffix(".tmp")
        temp.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(temp, args.out)


if __name__ == "__main__":
    main()
