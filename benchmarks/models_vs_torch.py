"""Forward pass and training step of five networks against torch on the same machine.

    python benchmarks/models_vs_torch.py --models resnet50 --batches 1 8 [--size 224]

Needs torch and torchvision beside jax. Both sides: float32, the same threads, random weights, one
fixed batch; torch in channels-last memory, eager and, where a C++ compiler is found, compiled. The
training step is cross-entropy, its gradient and SGD with momentum. ShuffleNet v1 isn't in
torchvision: its torch twin is written out below. Times are the best of interleaved rounds (all
sides once in each round, so that another program on the machine slows them alike); the file keeps
ratios (torch / ours: above 1 ours is faster) and compile times in seconds; torch's is that of its
first call. Each row says how many threads both sides had: as many as cores the process may use. A
run adds its networks to ``benchmarks/results/models_vs_torch.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch  # pyright: ignore[reportMissingImports]
import torchvision  # pyright: ignore[reportMissingImports]
from flax import nnx
from torch import nn  # pyright: ignore[reportMissingImports]

from cnnjax import models

RESULTS = pathlib.Path(__file__).parent / "results" / "models_vs_torch.json"
Step = Callable[[], Any]


class _Unit(nn.Module):
    """ShuffleNet v1's unit (Zhang et al. 2018, 1707.01083)."""

    def __init__(self, c_in: int, c_out: int, groups: int, stride: int, first: bool):
        super().__init__()
        self.groups, self.stride = groups, stride
        middle, out = c_out // 4, c_out - (c_in if stride == 2 else 0)
        self.a = nn.Conv2d(c_in, middle, 1, groups=1 if first else groups, bias=False)
        self.b = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.c = nn.Conv2d(middle, out, 1, groups=groups, bias=False)
        self.n1, self.n2, self.n3 = (nn.BatchNorm2d(c) for c in (middle, middle, out))

    def forward(self, x: Any) -> Any:
        y = torch.relu(self.n1(self.a(x)))
        n, c, h, w = y.shape
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = self.n3(self.c(self.n2(self.b(y))))
        if self.stride == 1:
            return torch.relu(x + y)
        return torch.relu(torch.cat([nn.functional.avg_pool2d(x, 3, 2, 1), y], 1))


def _shufflenet() -> Any:
    """ShuffleNet v1, 3 groups."""
    layers: list[Any] = [nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 24
    for stage, (width, count) in enumerate(((240, 4), (480, 8), (960, 4))):
        for i in range(count):
            layers.append(_Unit(channels, width, 3, 1 if i else 2, not stage and not i))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(960, 1000))


# ours, torch's, image size
NETWORKS: dict[str, tuple[str, Callable[[], Any], int]] = {
    "resnet50": ("resnet50", torchvision.models.resnet50, 224),
    "mobilenet_v2": ("mobilenet_v2", torchvision.models.mobilenet_v2, 224),
    "shufflenet_v1_g3": ("shufflenet_v1_g3", _shufflenet, 224),
    "inception_v3": (
        "inception_v3",
        lambda: torchvision.models.inception_v3(aux_logits=False, init_weights=False),
        299,
    ),
    "densenet121": ("densenet121", torchvision.models.densenet121, 224),
}


def ours(name: str, x: np.ndarray) -> dict[str, tuple[Step, float]]:
    """Our compiled passes with their compile times in seconds."""
    model = models.create(name, rngs=nnx.Rngs(0))
    image, labels = jnp.asarray(x), jnp.zeros(len(x), jnp.int32)
    model.eval()
    graphdef, state = nnx.split(model)
    begin = time.perf_counter()
    forward = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x)).lower(state, image).compile()
    seconds = time.perf_counter() - begin
    out: dict[str, tuple[Step, float]] = {
        "forward": (lambda: jax.block_until_ready(forward(state, image)), seconds)
    }
    model.train()
    train, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.sgd(1e-3, momentum=0.9)

    def step(params: Any, rest: Any, opt: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            inner = nnx.merge(train, params, rest, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(inner(x), labels)
            return losses.mean(), nnx.state(inner, nnx.Not(nnx.Param))

        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), new, opt

    held = [params, rest, tx.init(params)]
    begin = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*held, image).compile()
    seconds = time.perf_counter() - begin

    def run() -> None:
        held[:] = compiled(*held, image)
        jax.block_until_ready(held)

    out["train"] = (run, seconds)
    return out


def theirs(
    build: Callable[[], Any], x: np.ndarray, compiled: bool
) -> dict[str, tuple[Step, float]]:
    """Torch's passes with the time of their first call in seconds."""
    net = build().to(memory_format=torch.channels_last)
    image = torch.tensor(x.transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(len(x), dtype=torch.long)
    call = torch.compile(net) if compiled else net
    sgd = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)

    def forward() -> None:
        net.eval()
        with torch.no_grad():
            call(image)

    def train() -> None:
        net.train()
        sgd.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(call(image), labels).backward()
        sgd.step()

    return {"forward": (forward, 0.0), "train": (train, 0.0)}


def measure(
    name: str, batch: int, size: int | None, rounds: int, eager: bool
) -> list[dict[str, Any]]:
    """Ratios of one network at one batch size; ``eager``: torch isn't compiled."""
    own, build, standard = NETWORKS[name]
    side = size or standard
    x = np.random.default_rng(0).standard_normal((batch, side, side, 3)).astype(np.float32)
    sides = {"ours": ours(own, x), "eager": theirs(build, x, False)}
    if not eager and (shutil.which("g++") or shutil.which("clang++")):
        sides["compiled"] = theirs(build, x, True)
    rows = []
    for part in ("forward", "train"):
        first, best = {}, {}
        for key, steps in sides.items():
            begin = time.perf_counter()
            steps[part][0]()
            first[key] = time.perf_counter() - begin
            best[key] = float("inf")
        for _ in range(rounds):
            for key, steps in sides.items():
                begin = time.perf_counter()
                steps[part][0]()
                best[key] = min(best[key], time.perf_counter() - begin)
        row: dict[str, Any] = {"network": name, "part": part, "batch": batch, "size": side}
        row["threads"], row["rounds"] = torch.get_num_threads(), rounds
        row["torch_eager_over_ours"] = round(best["eager"] / best["ours"], 2)
        row["our_compile_seconds"] = round(sides["ours"][part][1], 1)
        if "compiled" in best:
            row["torch_compiled_over_ours"] = round(best["compiled"] / best["ours"], 2)
            row["torch_first_call_seconds"] = round(first["compiled"], 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measures the networks that are asked for and adds them to the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", type=int, help="image side; default: the network's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="leave out torch.compile")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    # XLA sizes its pool so: both sides have the same threads
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for name in args.models:
        for batch in args.batches:
            new = measure(name, batch, args.size, args.rounds, args.eager)
            # read anew: another run may have written in the meantime
            rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
            keys = [(r["network"], r["part"], r["batch"], r["size"]) for r in new]
            rows = [
                r for r in rows if (r["network"], r["part"], r["batch"], r["size"]) not in keys
            ] + new
            record = {
                "what": "torch time / our time (above 1: ours is faster), best of interleaved "
                "rounds, float32, torch channels-last",
                "backend": jax.default_backend(),
                "machine": platform.machine(),
                "cpu_count": os.cpu_count(),
                "jax": jax.__version__,
                "torch": torch.__version__,
                # a row without torch_compiled_over_ours was measured against eager torch alone
                "reduced": args.size is not None,
                "rows": rows,
            }
            temporary = args.out.with_suffix(".tmp")
            temporary.write_text(json.dumps(record, indent=1) + "\n")
            os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
