"""Time of layer-wise optimal brain surgeon, and what a mask costs in training.

    python benchmarks/obs_speed.py [--out FILE] [--rounds 5]

``obs``: `cnnjax.pruning.obs.layer_obs` on the shape of LeNet-300-100's first layer (784 inputs, 300
units, 90 % removed) with the second moment of random sparse images; seconds of wall clock and of
CPU, compilation apart. ``masked``: the training step of LeNet-300-100 with `masked(adam)` against
plain Adam; the two take turns, CPU time, the cheapest round counts.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnnjax import models, pruning, report, training
from cnnjax.pruning import obs

RESULTS = pathlib.Path(__file__).parent / "results" / "obs_speed.json"
BATCH, CALL = 128, 26


def surgeon(inputs: int, units: int, sparsity: float) -> dict[str, Any]:
    """Seconds of one layer."""
    rng = np.random.default_rng(0)
    x = rng.random((4000, inputs)) * (rng.random((4000, inputs)) < 0.2)
    w = jnp.asarray(rng.normal(size=(inputs, units)) / np.sqrt(inputs), jnp.float32)
    moment = jnp.asarray(obs.second_moment(x), jnp.float32)
    began = time.perf_counter()
    jax.block_until_ready(obs.layer_obs(w, moment, sparsity))
    first = time.perf_counter() - began
    wall, cpu = time.perf_counter(), time.process_time()
    new = jax.block_until_ready(obs.layer_obs(w, moment, sparsity))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    magnitude = pruning.magnitude_mask({"w": w}, sparsity)["w"]

    def cost(v: Any) -> float:
        d = np.asarray(v, np.float64) - np.asarray(w, np.float64)
        return float(0.5 * np.sum(d * (np.asarray(moment, np.float64) @ d)))

    return {
        "inputs": inputs,
        "units": units,
        "sparsity": sparsity,
        "first_seconds": round(first, 2),
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "error_to_magnitude": round(cost(new.w) / cost(jnp.where(magnitude, w, 0)), 4),
    }


def masked_step(rounds: int, steps: int) -> dict[str, Any]:
    """CPU time of a masked training step relative to the dense one."""
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.random((CALL, BATCH, 28, 28, 1), np.float32)),
        "label": jnp.asarray(rng.integers(0, 10, (CALL, BATCH)), jnp.int32),
    }
    model = models.create("lenet_300_100", rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = pruning.magnitude_mask(params, 0.9, scope="layer")
    own: dict[str, Any] = {}
    for name, optimizer in (
        ("dense", optax.adam(1e-3)),
        ("masked", pruning.masked(optax.adam(1e-3), mask)),
    ):
        network, state = training.create_state(model, optimizer, seed=0)
        config = training.StepConfig(steps_per_call=CALL)
        step = training.make_train_step(network, optimizer, config=config)
        state, _ = step(state, batch)
        own[name] = [step, state, []]
    for _ in range(rounds):
        for one in own.values():
            began = time.process_time()
            for _ in range(steps):
                one[1], metrics = one[0](one[1], batch)
            jax.block_until_ready(metrics)
            one[2].append(time.process_time() - began)
    return {
        "network": "lenet_300_100",
        "batch": BATCH,
        "steps_per_round": steps * CALL,
        "masked_to_dense": round(min(own["masked"][2]) / min(own["dense"][2]), 3),
    }


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small layer, to try the script")
    args = parser.parse_args()
    shape = (64, 16) if args.tiny else (784, 300)
    record = {
        "what": "layer-wise OBS of LeNet-300-100's first layer; masked against dense training step",
        "hardware": f"{jax.default_backend()}, {os.cpu_count()} cores, {platform.machine()}",
        "jax": jax.__version__,
        "obs": surgeon(*shape, 0.9),
        "masked": masked_step(args.rounds, 1 if args.tiny else 6),
    }
    print(record)
    report.write_result(record, args.out)


if __name__ == "__main__":
    main()
