"""What the training step costs beside its arithmetic, as ratios within one run.

    python benchmarks/train_step.py [--out FILE] [--rounds 5] [--cases deep_mlp lenet_300_100 ...]

For each network the same update (SGD with momentum, cross-entropy) runs as
  nnx_jit   ``nnx.jit`` on the module with ``nnx.Optimizer``, as Flax's guide writes it;
  plain     a hand-written ``jax.jit`` over plain dicts with donation and nothing else;
  step      `cnnjax.training.make_train_step`;
  step_k    the same with ``steps_per_call = 8``;
  fit       `cnnjax.training.fit` around the step: feeding, logging, no checkpoints.
The ways take turns; the cheapest round of each counts, and CPU time of the process is what is
counted, so that other programs on the machine disturb little (on an accelerator: ``--wall``).
Written are ratios of times per step to ``plain``: 1.0 means that our step costs nothing more.
``deep_mlp`` (30 narrow layers) is almost pure overhead; the others show real networks.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cnnjax import training

PER_CALL = 8
# name: (image shape, batch size, steps per round)
CASES = {
    "deep_mlp": ((4, 4, 1), 4, 80),
    "lenet_300_100": ((28, 28, 1), 64, 80),
    "lenet_5_caffe": ((28, 28, 1), 64, 16),
    "resnet20_cifar": ((32, 32, 3), 32, 8),
}


class DeepMLP(nnx.Module):
    """Thirty layers of width 16: 60 parameters, hardly any arithmetic."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(30)])

    def __call__(self, x: Any) -> Any:
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = x + 0.1 * jax.nn.relu(layer(x))
        return x[:, :10]


def make_model(name: str) -> nnx.Module:
    if name == "deep_mlp":
        return DeepMLP(rngs=nnx.Rngs(0))
    from cnnjax import models

    return models.create(name, num_classes=10, rngs=nnx.Rngs(0))


class Repeat:
    """The same host batch for ever."""

    def __init__(self, batch: dict[str, np.ndarray]) -> None:
        self.batch = batch

    def __iter__(self) -> Repeat:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return self.batch


def nnx_jit(name: str, tx: Any, batch: Any) -> Callable[[int], None]:
    model = training.set_mode(make_model(name), train=True)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss_fn(model: Any, batch: Any) -> Any:
        logits = model(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, grads)
        return loss

    def run(steps: int) -> None:
        loss = None
        for _ in range(steps):
            loss = step(model, optimizer, batch)
        jax.block_until_ready((loss, jax.tree.leaves(nnx.state(model, nnx.Param))))

    return run


def plain(name: str, tx: Any, batch: Any) -> Callable[[int], None]:
    model = training.set_mode(make_model(name), train=True)
    graphdef = nnx.graphdef(model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rest = training.model_stats(model)
    carry = (params, rest, tx.init(params))

    def loss_fn(params: Any, rest: Any, batch: Any) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits = model(batch["image"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, training.model_stats(model)

    def step(carry: Any, batch: Any) -> Any:
        params, rest, opt_state = carry
        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rest, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), loss

    jitted = jax.jit(step, donate_argnums=0)
    box = [carry]

    def run(steps: int) -> None:
        for _ in range(steps):
            box[0], _ = jitted(box[0], batch)
        jax.block_until_ready(box[0])

    return run


def ours(name: str, tx: Any, batch: Any, per_call: int = 1) -> Callable[[int], None]:
    network, state = training.create_state(make_model(name), tx)
    config = training.StepConfig(steps_per_call=per_call)
    step = training.make_train_step(network, tx, config=config)
    if per_call > 1:
        batch = jax.tree.map(lambda a: jnp.stack([a] * per_call), batch)
    box = [state]

    def run(steps: int) -> None:
        for _ in range(steps // per_call):
            box[0], _ = step(box[0], batch)
        jax.block_until_ready(box[0].params)

    return run


def whole_loop(name: str, tx: Any, batch: Any) -> Callable[[int], None]:
    network, state = training.create_state(make_model(name), tx)
    step = training.make_train_step(network, tx)
    host = jax.device_get(batch)
    box = [state]

    def run(steps: int) -> None:
        start = int(box[0].step)
        config = training.FitConfig(start + steps, log_every=50, progress=False)
        box[0] = training.fit(step, box[0], Repeat(host), config).state
        jax.block_until_ready(box[0].params)

    return run


def measure(name: str, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Times per step relative to the plain loop."""
    shape, n, steps = CASES[name]
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(n, *shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, n), jnp.int32),
    }
    tx = optax.sgd(1e-3, momentum=0.9)
    ways = {
        "plain": plain(name, tx, batch),
        "nnx_jit": nnx_jit(name, tx, batch),
        "step": ours(name, tx, batch),
        "step_k": ours(name, tx, batch, PER_CALL),
        "fit": whole_loop(name, tx, batch),
    }
    for run in ways.values():
        run(2 * PER_CALL)  # compiles
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for way, run in ways.items():
            begin = clock()
            run(steps)
            best[way] = min(best[way], clock() - begin)
    return {way: round(seconds / best["plain"], 3) for way, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES)[:3], choices=list(CASES))
    parser.add_argument("--wall", action="store_true", help="count wall-clock time")
    args = parser.parse_args()
    clock = time.perf_counter if args.wall else time.process_time
    training.enable_compilation_cache()
    results = {}
    for name in args.cases:
        results[name] = measure(name, args.rounds, clock)
        print(f"{name:16s}", "  ".join(f"{k} {v:.2f}" for k, v in results[name].items()))
    if args.out is not None:
        record = {
            "what": "time per training step relative to a plain hand-written jax.jit loop",
            "hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
            "jax": jax.__version__,
            "python": platform.python_version(),
            "rounds": args.rounds,
            "clock": "wall" if args.wall else "CPU time of the process",
            "steps_per_call_of_step_k": PER_CALL,
            "cases": {k: {"batch": CASES[k][1], **v} for k, v in results.items()},
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
