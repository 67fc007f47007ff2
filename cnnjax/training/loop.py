"""The training loop: feeds batches, logs, evaluates, checkpoints, resumes.

The loop never waits for the device within a logging interval: metrics stay on the device until
the interval's end, and batches are placed on the device ahead of their step.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.training.checkpoint import Checkpointer, check_workdir
from cnnjax.training.mesh import replicate, shard_batch
from cnnjax.training.metrics import JsonlWriter, Progress
from cnnjax.training.state import TrainState
from cnnjax.training.step import TrainStep

PyTree = Any


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite. Attributes: ``step``, ``learning_rate``, ``last_good``."""

    def __init__(self, step: int, loss: float, rate: float | None, last_good: int | None) -> None:
        self.step, self.loss, self.learning_rate, self.last_good = step, loss, rate, last_good
        what = "the parameters are not finite" if math.isfinite(loss) else f"the loss is {loss}"
        at = "unknown" if rate is None else f"{rate:.6g}"
        good = "no checkpoint was saved" if last_good is None else f"step {last_good}"
        super().__init__(
            f"{what} at step {step} (learning rate {at}); last good checkpoint: {good}. "
            "Lower the learning rate, lengthen the warm-up, or clip the gradient."
        )


class Preempted(SystemExit):
    """SIGTERM came: the state is saved, and the process ends with code 0 unless this is caught."""

    def __init__(self, step: int) -> None:
        super().__init__(0)
        self.step = step


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
      name: of the metrics file and the progress line.
    """

    total_steps: int
    log_every: int = 50
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    prefetch: int = 2
    progress: bool = True
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


def _rows(batch: PyTree, axis: int) -> int:
    return int(np.shape(jax.tree.leaves(batch)[0])[axis])


class _Feed:
    """Batches on the device ahead of their step, with the data position where it is asked."""

    def __init__(
        self, data: Iterator[Any], step: int, config: FitConfig, per_call: int, mesh: Any
    ) -> None:
        self._data, self._next, self._config = data, step, config
        self._per_call, self._mesh = per_call, mesh
        self._queue: collections.deque[Any] = collections.deque()
        self.draining = False

    def _place(self, batches: list[Any]) -> PyTree:
        stacked = self._per_call > 1
        batch = jax.tree.map(lambda *a: np.stack(a), *batches) if stacked else batches[0]
        if self._mesh is not None:
            return shard_batch(batch, self._mesh, stacked=stacked)
        return jax.device_put(batch)

    def _read(self) -> None:
        count = min(self._per_call, self._config.total_steps - self._next)
        batches = []
        for _ in range(count):
            try:
                batches.append(next(self._data))
            except StopIteration:
                raise ValueError(
                    f"the data ended after {self._next + len(batches)} steps, "
                    f"{self._config.total_steps} were asked; repeat the data set"
                ) from None
        self._next += count
        every = self._config.checkpoint_every
        due = self._next == self._config.total_steps or (every and self._next % every == 0)
        position = self._data.get_state() if due and hasattr(self._data, "get_state") else None
        rows = _rows(batches[0], 0) * count * jax.process_count()
        self._queue.append((self._place(batches), self._next, rows, position))

    def __iter__(self) -> Iterator[Any]:
        while True:
            while (
                not self.draining
                and self._next < self._config.total_steps
                and len(self._queue) <= self._config.prefetch
            ):
                self._read()
            if not self._queue:
                return
            yield self._queue.popleft()


class _Log:
    """Collects device metrics and writes their means; finds the first loss that is not finite."""

    def __init__(
        self,
        writer: JsonlWriter | None,
        step: int,
        progress: Progress,
        rate: Callable[[Any], Any] | None,
        history: list[dict[str, Any]],
    ) -> None:
        self.writer, self.progress, self.rate, self.history = writer, progress, rate, history
        self._pending: list[Any] = []
        self._step, self._rows, self._since = step, 0, time.monotonic()

    def add(self, metrics: dict[str, Any], rows: int) -> None:
        self._pending.append(metrics)
        self._rows += rows

    def take(self) -> Any:
        """The open interval, closed; write it later with `flush`."""
        window, self._pending = (self._pending, self._rows), []
        self._rows = 0
        return window

    def flush(self, window: Any, last_good: Callable[[], int | None]) -> None:
        pending, rows = window
        if not pending:
            return
        host = jax.device_get(pending)
        series = {k: np.concatenate([np.ravel(m[k]) for m in host]) for k in host[0]}
        losses = series["loss"]
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            step = self._step + int(bad[0])
            raise NonFiniteLossError(
                step, float(losses[bad[0]]), self.learning_rate(step), last_good()
            )
        count = losses.size
        self._step += count
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        record = {"kind": "train", "step": self._step, "steps": count}
        record |= {k: float(np.mean(v, dtype=np.float64)) for k, v in series.items()}
        if "learning_rate" in series:
            record["learning_rate"] = float(series["learning_rate"][-1])
        record["images_per_second"] = rows / seconds if seconds > 0 else 0.0
        self.write(record)
        self.progress.update(self._step, record, record["images_per_second"])

    def learning_rate(self, step: int) -> float | None:
        return None if self.rate is None else float(self.rate(step))

    def write(self, record: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(record)
        else:
            self.history.append(record)

    def restart_clock(self) -> None:
        """Leaves the time of an evaluation or a save out of the images per second."""
        self._since = time.monotonic()


class _Signal:
    """Notes SIGTERM instead of dying; on the main thread only."""

    def __init__(self) -> None:
        self.received = False
        self._old: Any = None
        self._main = threading.current_thread() is threading.main_thread()

    def _note(self, *_: Any) -> None:
        self.received = True

    def __enter__(self) -> _Signal:
        if self._main:
            self._old = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._old)

    def agreed(self, at_interval: bool) -> bool:
        """Whether to stop; several processes agree at the ends of logging intervals only."""
        if jax.process_count() == 1:
            return self.received
        if not at_interval:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.received))))


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
    checkpoints = writer = resumed = None
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
    start = int(state.step)
    progress = Progress(
        config.total_steps, start=start, label=config.name, enabled=config.progress and main
    )
    log = _Log(writer, start, progress, step.learning_rate, history)
    last_good = checkpoints.latest if checkpoints is not None else lambda: None
    feed = _Feed(data, start, config, per_call, mesh)

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
        with _Signal() as stop:
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
        if checkpoints is not None:
            checkpoints.abandon()
    return FitResult(state, history, resumed, time.monotonic() - began)
