"""The training loop: feeds batches, logs, evaluates, checkpoints, resumes.

The loop never waits for the device within a logging interval: metrics stay on the device until
the interval's end, and batches are placed on the device ahead of their step.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax.training.checkpoint import Checkpointer, check_workdir
from cnnjax.training.feed import Feed
from cnnjax.training.mesh import replicate
from cnnjax.training.metrics import JsonlWriter, Progress
from cnnjax.training.runlog import Log, NonFiniteLossError, Preempted, Signal
from cnnjax.training.state import TrainState
from cnnjax.training.step import TrainStep
from cnnjax.training.tensorboard import EventWriter

PyTree = Any


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Lengths and intervals, in steps; 0 turns an interval off.

    Attributes:
      total_steps: of the whole run, resumed part included.
      log_every: metrics are averaged over so many steps and written.
      eval_every: besides once at the end.
      checkpoint_every: besides once at the end.
      keep: how many newest checkpoints stay.
      prefetch: calls whose batches are placed on the device ahead.
      progress: show the progress line (process 0).
      tensorboard: also write event files to ``<workdir>/tensorboard`` (process 0).
      name: of the metrics file and the progress line.
    """

    total_steps: int
    log_every: int = 50
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    prefetch: int = 2
    progress: bool = True
    tensorboard: bool = False
    name: str = "train"

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        for field in ("log_every", "eval_every", "checkpoint_every", "prefetch"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")


@dataclasses.dataclass(frozen=True)
class FitResult:
    """Outcome of `fit`.

    Attributes:
      state: the final state.
      history: all records, those before a resume included; each has ``kind`` (``"train"`` or
        ``"eval"``) and ``step``.
      resumed_from: step of the checkpoint that the run continued from, None for a fresh run.
      seconds: wall-clock time of this call.
    """

    state: TrainState
    history: list[dict[str, Any]]
    resumed_from: int | None
    seconds: float

    def last(self, kind: str = "eval") -> dict[str, Any]:
        """The newest record of a kind.

        Raises:
          KeyError: if there is none.
        """
        for record in reversed(self.history):
            if record["kind"] == kind:
                return record
        raise KeyError(f"no record of kind {kind!r}")


@jax.jit
def _all_finite(params: PyTree) -> Any:
    leaves = [jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)]
    return jnp.all(jnp.stack(leaves))


def fit(
    step: TrainStep,
    state: TrainState,
    data: Iterator[Any],
    config: FitConfig,
    *,
    workdir: str | os.PathLike[str] | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    mesh: Any = None,
    record: Any = None,
    callbacks: Sequence[tuple[int, Callable[[TrainState, int], TrainState]]] = (),
) -> FitResult:
    """Trains to ``config.total_steps``, resuming from ``workdir`` if a checkpoint is there.

    Args:
      step: from `make_train_step`.
      state: a fresh state; it is donated, and replaced by the checkpoint's on resume.
      data: endless iterator of host batches (dicts of arrays, first axis the examples, this
        process's share). With a workdir it needs ``get_state()`` and ``set_state(s)``.
      config: see `FitConfig`.
      workdir: for ``checkpoints/`` and ``metrics.jsonl`` (prefixed with the config's name if it
        is not ``train``); None: nothing is written, nothing resumes.
      evaluate: ``state -> metrics``, run every ``eval_every`` steps and at the end; it must not
        keep the state's arrays.
      mesh: data-parallel mesh, see `data_mesh`.
      record: JSON-able configuration of the run, stored in the checkpoints.
      callbacks: ``(every, fn)``: ``state = fn(state, step)`` after every so many steps; must be
        deterministic for an exact resume.

    Returns:
      See `FitResult`. If the run was complete already, nothing is trained.

    Raises:
      NonFiniteLossError: names the step, its learning rate and the last good checkpoint.
      Preempted: on SIGTERM, after saving.
      CheckpointError: a checkpoint could not be written or read.
      OSError: the work folder cannot be written; raised before training.
      ValueError: an interval is not a multiple of ``steps_per_call``, or the data ends early.
      TypeError: with a workdir, if the data cannot save its position.
    """
    began = time.monotonic()
    per_call = step.config.steps_per_call
    intervals = [config.log_every, config.eval_every, config.checkpoint_every]
    for every in [*intervals, *(e for e, _ in callbacks)]:
        if every % per_call:
            raise ValueError(f"interval {every} is not a multiple of steps_per_call {per_call}")
    if workdir is not None and not (hasattr(data, "get_state") and hasattr(data, "set_state")):
        raise TypeError(
            f"{type(data).__name__} has no get_state/set_state, so a resume could not be exact; "
            "use such an iterator, or no workdir"
        )
    if mesh is not None:
        state = replicate(state, mesh)
    prefix = "" if config.name == "train" else f"{config.name}-"
    main = jax.process_index() == 0
    history: list[dict[str, Any]] = []
    checkpoints = writer = events = resumed = None
    if workdir is not None:
        folder = check_workdir(workdir)
        checkpoints = Checkpointer(folder / f"{prefix}checkpoints", keep=config.keep, config=record)
        resumed = checkpoints.latest()
        if resumed is not None:
            restored = checkpoints.restore(state)
            state = restored.state
            data.set_state(restored.iterator)  # type: ignore[attr-defined]
        if main:
            writer = JsonlWriter(folder / f"{prefix}metrics.jsonl", resume_step=resumed)
            history = writer.records
            if config.tensorboard:
                events = EventWriter(folder / "tensorboard")
    start = int(state.step)
    progress = Progress(
        config.total_steps, start=start, label=config.name, enabled=config.progress and main
    )
    log = Log(writer, events, start, progress, step.learning_rate, history, config.name)
    last_good = checkpoints.latest if checkpoints is not None else lambda: None
    feed = Feed(
        data,
        start=start,
        total=config.total_steps,
        per_call=per_call,
        ahead=config.prefetch,
        save_every=config.checkpoint_every,
        mesh=mesh,
    )

    def save(position: Any) -> None:
        assert checkpoints is not None
        if not bool(_all_finite(state.params)):
            raise NonFiniteLossError(now - 1, 0.0, log.learning_rate(now - 1), last_good())
        if writer is not None:
            writer.sync()
        checkpoints.save(state, iterator=position)

    now = start
    waiting: list[Any] = []  # closed intervals, written after the next call is on its way
    try:
        with Signal() as stop:
            for batch, now, rows, position in feed:
                state, metrics = step(state, batch)
                log.add(metrics, rows)
                while waiting:
                    log.flush(waiting.pop(), last_good)
                for every, fn in callbacks:
                    if every and now % every == 0:
                        state = fn(state, now)
                end = now == config.total_steps
                logs, evals, saves = (end or bool(e and now % e == 0) for e in intervals)
                evals = evals and evaluate is not None
                saves = saves and checkpoints is not None
                if logs or evals or saves:
                    waiting.append(log.take())
                if evals or saves:
                    log.flush(waiting.pop(), last_good)
                if evals and evaluate is not None:
                    log.write({"kind": "eval", "step": now, **evaluate(state)})
                if saves:
                    save(position)
                if evals or saves:
                    log.restart_clock()
                feed.draining = feed.draining or stop.agreed(logs)
            while waiting:
                log.flush(waiting.pop(), last_good)
            if now < config.total_steps:  # only a signal ends the feed early
                log.flush(log.take(), last_good)
                if checkpoints is not None:
                    save(data.get_state())  # type: ignore[attr-defined]
                    checkpoints.wait()
                raise Preempted(now)
            if checkpoints is not None:
                checkpoints.wait()
    finally:
        progress.close()
        if writer is not None:
            writer.close()
        if events is not None:
            events.close()
        if checkpoints is not None:
            checkpoints.abandon()
    return FitResult(state, history, resumed, time.monotonic() - began)
