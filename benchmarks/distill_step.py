"""Cost of a distillation step: every way against the student alone, teachers on the fly and cached.

    python benchmarks/distill_step.py [--pairs digits cifar]

A teacher's forward pass inside the student's jitted step should cost what both cost apart
(``online_over_parts``, at most 1.1). ``images_per_second`` is relative to the student alone, the
batches' way from memory included; cached targets lie in the host's memory, on the device or on the
disk (a memory-mapped file that the system has read once). ``fitnet`` and ``fsp`` are the steps of
their first stage, the second is that of KD and of the student alone; ``fisher_kd`` is the step of
its pruning phase, in which the network still has the teacher's size. Rounds alternate, so that a
changing load meets all alike; the median of the rounds counts. Only ratios are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import optax
from flax import nnx

from cnnjax import distillation, files, models, pruning, report, training
from cnnjax.data.memory import MemoryLoader
from cnnjax.distillation import DistillConfig

RESULT = pathlib.Path(__file__).parent / "results" / "distill_step.json"
BATCHES = 4  # different ones, in turn
HARD = DistillConfig(hard=1.0, soft="none")
KD = DistillConfig(hard=0.1, soft_weight=0.9, temperature=4.0)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A teacher and a student: registry names and fields, images, layers that are compared."""

    teacher: tuple[str, dict[str, Any]]
    student: tuple[str, dict[str, Any]]
    shape: tuple[int, int, int]
    batch: int
    hint: tuple[str, str]
    attention: tuple[tuple[str, str], ...]
    fsp: tuple[tuple[str, str, str, str], ...]
    rounds: int
    steps: int


_ENDS = tuple((f"layer{i}/2", f"layer{i}/8") for i in (1, 2, 3))
_EARLY, _MIDDLE = "convs/1:input", "convs/2:input"
PAIRS = {
    "digits": Pair(
        ("plain_cnn", {"widths": (32, 32, 64), "hidden": (64,)}),
        ("plain_cnn", {"widths": (4, 4, 8), "hidden": (16,)}),
        (8, 8, 1),
        128,
        (_MIDDLE, _MIDDLE),
        ((_EARLY, _EARLY), (_MIDDLE, _MIDDLE)),
        ((_EARLY, _MIDDLE, _EARLY, _MIDDLE),),
        15,
        8,
    ),
    "cifar": Pair(
        ("resnet56_cifar", {}),
        ("resnet20_cifar", {}),
        (32, 32, 3),
        32,
        _ENDS[1],
        _ENDS,
        tuple((f"layer{i}/0", f"layer{i}/2", f"layer{i}/0", f"layer{i}/8") for i in (1, 2, 3)),
        5,
        2,
    ),
}


def ways(pair: Pair) -> dict[str, DistillConfig]:
    """The records of the students that have the student's own size."""
    first = {"hard": 0.0, "soft": "none"}
    return {
        "alone": HARD,
        "kd": KD,
        "fitnet": DistillConfig(**first, hint_weight=1e-3, hints=(pair.hint,)),
        "attention": dataclasses.replace(HARD, attention_beta=1e3, attention=pair.attention),
        "fsp": DistillConfig(**first, fsp_weight=1e-2, fsp=pair.fsp),
        "dkd": dataclasses.replace(HARD, soft="dkd", soft_weight=1.0, dkd_beta=2.0),
    }


def jobs_of(pair: Pair, folder: pathlib.Path) -> dict[str, Callable[[], Any]]:
    """Name -> one step, from the batch to the loss."""
    teacher, student = (
        models.create(name, rngs=nnx.Rngs(i), **fields)
        for i, (name, fields) in enumerate((pair.teacher, pair.student))
    )
    teacher = training.set_mode(teacher, train=False)
    rng, n = np.random.default_rng(0), BATCHES * pair.batch
    arrays = {
        "image": rng.standard_normal((n, *pair.shape), np.float32),
        "label": rng.integers(0, 10, n).astype(np.int32),
    }
    example = jax.ShapeDtypeStruct((1, *pair.shape), np.float32)
    guide = distillation.Teacher(teacher)
    tx = optax.sgd(1e-3, momentum=0.9)

    def endless(stream: Any) -> Any:
        start = stream.get_state()
        while True:
            stream.set_state(start)
            for _ in range(BATCHES):
                yield next(stream)

    def loader() -> MemoryLoader:
        return MemoryLoader(arrays, batch_size=pair.batch, seed=0)

    def step_of(model: Any, loss: Any, constants: Any, stream: Any, optimizer: Any = tx) -> Any:
        network, state = training.create_state(training.set_mode(model, train=True), optimizer)
        step = training.make_train_step(
            network, optimizer, hooks=training.Hooks(loss=loss), constants=constants
        )
        held, batches = [state], endless(stream)

        def one() -> Any:
            held[0], metrics = step(held[0], next(batches))
            return metrics["loss"]

        return one

    def taught(config: DistillConfig, cache: str = "") -> Any:
        plan = distillation.plan_distillation(config, student, teacher, example)
        own = guide.with_taps(plan.teacher_taps)
        adapters = plan.adapters(nnx.Rngs(0))
        model = distillation.WithAdapters(student, adapters) if adapters else student
        if not cache:
            loss = distillation.distillation_loss(plan, own if config.taught else None)
            constants = {"teacher": own.constants} if config.taught else None
            return step_of(model, loss, constants, loader())
        targets = distillation.cache_stream(own, loader(), BATCHES)
        if cache == "device":
            targets = targets.on_device()
        if cache == "disk":
            targets = distillation.load_cache(targets.save(folder / f"{len(own.taps)}"))
        stream = distillation.CachedStream(loader(), targets)
        return step_of(model, distillation.distillation_loss(plan), None, stream)

    call = jax.jit(lambda constants, x: guide(constants, x).logits)
    images = endless(loader())
    jobs: dict[str, Any] = {"teacher": lambda: call(guide.constants, next(images)["image"])}
    jobs |= {name: taught(config) for name, config in ways(pair).items()}
    whole = jax.tree.map(
        lambda w: np.ones(w.shape, bool), nnx.to_pure_dict(nnx.state(teacher, nnx.Param))
    )
    jobs["fisher_kd"] = step_of(
        teacher,
        distillation.distillation_loss(KD, guide),
        {"teacher": guide.constants},
        loader(),
        pruning.masked(tx, whole),
    )
    for place in ("memory", "device", "disk"):
        jobs[f"kd_{place}"] = taught(KD, place)
        jobs[f"attention_{place}"] = taught(ways(pair)["attention"], place)
    return jobs


def measure(pair: Pair) -> dict[str, Any]:
    """The ratios of one pair of networks."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = jobs_of(pair, pathlib.Path(folder))
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for job in jobs.values():
            jax.block_until_ready(job())
            jax.block_until_ready(job())
        for _ in range(pair.rounds):
            for name, job in jobs.items():
                began = time.perf_counter()
                for _ in range(pair.steps):
                    out = job()
                jax.block_until_ready(out)
                times[name].append((time.perf_counter() - began) / pair.steps)
    median = {name: float(np.median(t)) for name, t in times.items()}
    parts = median["teacher"] + median["alone"]
    return {
        "teacher": f"{pair.teacher[0]} {pair.teacher[1] or ''}".strip(),
        "student": f"{pair.student[0]} {pair.student[1] or ''}".strip(),
        "batch": pair.batch,
        "rounds": pair.rounds,
        "online_over_parts": {
            name: median[name] / parts for name in ("kd", "fitnet", "attention", "fsp", "dkd")
        },
        "images_per_second": {
            name: median["alone"] / t for name, t in median.items() if name != "teacher"
        },
        "cached_over_online": {
            name: median[name.split("_")[0]] / t
            for name, t in median.items()
            if name.endswith(("_memory", "_device", "_disk"))
        },
    }


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    flags = parser.parse_args()
    pairs = json.loads(RESULT.read_text()).get("pairs", {}) if RESULT.exists() else {}
    for name in flags.pairs:
        pairs[name] = measure(PAIRS[name])
        print(json.dumps({name: pairs[name]}, indent=1), flush=True)
    record = {
        "measured": "time on the clock, median of alternating rounds; ratios within one run",
        "pairs": pairs,
        "environment": report.environment(),
    }
    files.write_text(RESULT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
