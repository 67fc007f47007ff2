"""Runs the stages in order for every seed, resumes, and writes the report.

The work folder: ``config.json``, ``report.json``, ``report.txt``, ``curve.png``, and for each seed
``seed<S>/<stage>/`` with ``metrics.jsonl``, ``checkpoints/``, ``network/`` and ``done.json``.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from cnnjax import data, models, report, training
from cnnjax.pipeline import store
from cnnjax.pipeline.config import DataConfig, RunConfig, from_config, to_plain
from cnnjax.pipeline.context import Context, write_json
from cnnjax.pipeline.fields import image_shape, model_fields
from cnnjax.pipeline.registry import Carry, Known, Outcome

# what may differ between the parts of a run that was interrupted
_ANY = ("note", "seeds", "data_parallel", "tune_forms")


def run(config: Any, workdir: str | os.PathLike[str], *, progress: bool = True) -> dict[str, Any]:
    """Carries out a compression run, or what is left of it.

    Everything that can be wrong with the configuration is refused before any work.

    Args:
      config: ConfigDict, plain dict or `RunConfig`.
      workdir: holds everything that the run writes.
      progress: show progress and the report on the terminal.

    Returns:
      The report, as in ``report.json``.

    Raises:
      ValueError: unknown keys or names, values out of range, globs that match nothing, or a work
        folder of another configuration.
      OSError: the work folder cannot be written.
    """
    cfg = config if isinstance(config, RunConfig) else from_config(config)
    described = data.info(cfg.data.name, cfg.data.data_dir or None)
    fields = model_fields(cfg.model, cfg.data, described)
    shape = models.abstract(cfg.model.name, **fields)
    _check_stages(cfg, shape, described)
    report.check_floors(cfg.expected, list(cfg.stages))
    _check_batches(cfg.data)
    if cfg.tune_forms and jax.process_count() > 1:
        raise ValueError("tune_forms: processes could measure different forms; leave it off")
    folder = training.check_workdir(workdir)
    plain = json.loads(json.dumps(to_plain(cfg)))
    main = jax.process_index() == 0
    _check_same_config(folder, plain)
    finished = folder / "report.json"
    if finished.exists():
        found = json.loads(finished.read_text())
    else:
        found = {}
    if found.get("config", {}).get("seeds") == plain["seeds"]:
        if progress and main:
            print(report.run_table(found))
            print(f"\nThis run is complete; its files are in {folder}.")
        return found
    if main:
        write_json(folder / "config.json", plain)
    mesh = None
    if cfg.data_parallel and jax.device_count() > 1:
        mesh = training.data_mesh()
    example = jax.ShapeDtypeStruct((1, *image_shape(cfg.data, described)), np.float32)
    runs = []
    for seed in cfg.seeds:
        stages = _run_seed(cfg, fields, example, seed, folder / f"seed{seed}", mesh, progress)
        runs.append({"seed": seed, "stages": stages})
    result = {
        "name": cfg.name,
        "note": cfg.note,
        "model": cfg.model.name,
        "data": cfg.data.name,
        "test_images": described.splits.get(cfg.data.test),
        "runs": runs,
        "summary": report.summarize(runs),
        "environment": report.environment(),
        "config": plain,
    }
    if main:
        text = report.run_table(result)
        same = {"name": cfg.name, "expected": plain["expected"], "stages": result["summary"]}
        floors = [(s, report.floor_line(same, s)) for s in cfg.stages]
        text += "".join(f"\n\n{stage}: {line}" for stage, line in floors if line)
        (folder / "report.txt").write_text(text + "\n")
        report.plot_curve(result, folder / "curve.png")
        write_json(finished, result)  # last: its presence says that the run is complete
        if progress:
            print(text)
            print(f"\nEverything is in {folder}.")
    return result


def _run_seed(
    cfg: RunConfig,
    fields: dict[str, Any],
    example: Any,
    seed: int,
    folder: pathlib.Path,
    mesh: Any,
    progress: bool,
) -> list[dict[str, Any]]:
    carry = Carry(models.create(cfg.model.name, rngs=nnx.Rngs(seed), **fields))
    main = jax.process_index() == 0
    records = []
    for name, stage in cfg.stages.items():
        place = folder / name
        done = place / "done.json"
        known = json.loads(done.read_text()) if done.exists() else None
        if known is not None and not getattr(stage, "restructures", False):
            carry = store.load(place / "network", carry)
            records.append(known)
            continue
        place.mkdir(parents=True, exist_ok=True)
        context = Context(
            data_config=cfg.data,
            seed=seed,
            name=name,
            folder=place,
            mesh=mesh,
            progress=progress,
            forms=folder.parent / "forms.json" if cfg.tune_forms else None,
        )
        if progress and main:
            print(f"[seed {seed}] {name}: {type(stage).__name__}", flush=True)
        began = time.monotonic()
        outcome = stage.run(carry, context)
        seconds = time.monotonic() - began
        carry = outcome.network
        if known is None:
            known = _measure(name, stage, outcome, context, example, mesh, seconds)
            if main:
                store.save(place / "network", carry)
                write_json(done, known)  # last: its presence says that the stage is complete
        records.append(known)
    return records


def _measure(
    name: str,
    stage: Any,
    outcome: Outcome,
    context: Context,
    example: Any,
    mesh: Any,
    seconds: float,
) -> dict[str, Any]:
    network, state = training.create_state(outcome.network.model, optax.set_to_zero())
    state = state if mesh is None else training.replicate(state, mesh)
    accuracy = context.evaluate(network, state)
    return {
        "name": name,
        "kind": type(stage).__name__,
        "accuracy": accuracy["top1"],
        "error": 1.0 - accuracy["top1"],
        "top5": accuracy["top5"],
        "loss": accuracy["loss"],
        "seconds": seconds,
        **report.measure(outcome.network.model, example),
        "metrics": outcome.metrics,
        "curve": outcome.curve,
    }


def _check_batches(chosen: DataConfig) -> None:
    """Each process reads an equal share of every batch."""
    processes = jax.process_count()
    for key in ("batch_size", "eval_batch_size"):
        size = getattr(chosen, key)
        if size < 1 or size % processes:
            raise ValueError(
                f"data.{key} is {size}; it must be a positive multiple of the number of "
                f"processes, {processes}"
            )


def _check_stages(cfg: RunConfig, shape: Any, described: Any) -> None:
    params = nnx.to_pure_dict(nnx.state(shape, nnx.Param))
    same, known = True, Known(shape)
    for name, stage in cfg.stages.items():
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"a stage's name becomes a folder: {name!r} does not do")
        restructures = getattr(stage, "restructures", False)
        same = same and not restructures  # what comes later sees other parameters
        try:
            if same and hasattr(stage, "check"):
                stage.check(params)
            if hasattr(stage, "foresee"):
                known = stage.foresee(known, cfg.data, described)
            elif restructures:
                known = Known(None, known.teachers)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from error


def _check_same_config(folder: pathlib.Path, plain: dict[str, Any]) -> None:
    file = folder / "config.json"
    if not file.exists():
        return
    old = json.loads(file.read_text())
    changed = [
        f"{key} is {new!r}, was {before!r}"
        for key, before, new in _differences(old, plain)
        if not key.startswith("expected") and key not in (*_ANY, "data.data_dir", "data.workers")
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run of another configuration ({'; '.join(changed[:5])}); choose "
            "another workdir, or remove it"
        )


def _differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        prefix = where + "." if where else ""
        return [d for k in keys for d in _differences(old.get(k), new.get(k), prefix + str(k))]
    return [] if old == new else [(where, old, new)]
