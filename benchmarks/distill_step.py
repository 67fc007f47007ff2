"""Cost of a distillation step against its parts, and of a step with cached targets; ratios only.

    python benchmarks/distill_step.py

A teacher's forward pass inside the student's jitted step should cost what both cost apart. Rounds
alternate, so that a changing load meets all alike; the median of the rounds counts.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import optax
from flax import nnx

from cnnjax import distillation, models, training

RESULT = pathlib.Path(__file__).parent / "results" / "distill_step.json"
ROUNDS, STEPS, BATCH = 15, 5, 128


def main() -> None:
    """Measures and writes the result file."""
    teacher = models.create("plain_cnn", widths=(32, 32, 64), rngs=nnx.Rngs(0))
    student = models.create("plain_cnn", widths=(16, 32), rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    batch = {
        "image": jax.device_put(rng.random((BATCH, 8, 8, 1), np.float32)),
        "label": jax.device_put(rng.integers(0, 10, BATCH).astype(np.int32)),
    }
    guide = distillation.Teacher(teacher)
    call = jax.jit(lambda constants, x: guide(constants, x).logits)
    cached = {**batch, "teacher_logits": call(guide.constants, batch["image"])}
    tx = optax.sgd(0.01, momentum=0.9)

    def step_of(loss: Any, constants: Any, data: Any) -> Any:
        network, state = training.create_state(student, tx)
        hooks = training.Hooks(loss=loss)
        step = training.make_train_step(network, tx, hooks=hooks, constants=constants)
        held = [state]

        def one() -> Any:
            held[0], metrics = step(held[0], data)
            return metrics["loss"]

        return one

    kd = distillation.DistillConfig()
    alone = distillation.DistillConfig(hard=1.0, soft="none")
    jobs = {
        "teacher": lambda: call(guide.constants, batch["image"]),
        "student": step_of(distillation.distillation_loss(alone), None, batch),
        "online": step_of(
            distillation.distillation_loss(kd, guide), {"teacher": guide.constants}, batch
        ),
        "cached": step_of(distillation.distillation_loss(kd), None, cached),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        jax.block_until_ready(job())
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            began = time.process_time()
            for _ in range(STEPS):
                out = job()
            jax.block_until_ready(out)
            times[name].append((time.process_time() - began) / STEPS)
    median = {name: float(np.median(t)) for name, t in times.items()}
    result = {
        "online_over_parts": median["online"] / (median["teacher"] + median["student"]),
        "cached_over_student": median["cached"] / median["student"],
        "online_over_cached": median["online"] / median["cached"],
        "measured": "CPU time of the process, median of alternating rounds",
        "model": "plain_cnn (32, 32, 64) teaching plain_cnn (16, 32), 8x8 images, batch 128",
        "hardware": f"{jax.default_backend()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "rounds": ROUNDS,
    }
    print(json.dumps(result, indent=1))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    temporary = RESULT.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, RESULT)


if __name__ == "__main__":
    main()
