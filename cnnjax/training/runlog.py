"""What the loop needs on the side: the log of metrics, SIGTERM, and their errors."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cnnjax.training.metrics import JsonlWriter, Progress
from cnnjax.training.tensorboard import EventWriter

_IN_FLIGHT = 8  # calls dispatched and not yet finished


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


class Log:
    """Collects device metrics and writes their means; finds the first loss that is not finite."""

    def __init__(
        self,
        writer: JsonlWriter | None,
        events: EventWriter | None,
        step: int,
        progress: Progress,
        rate: Callable[[Any], Any] | None,
        history: list[dict[str, Any]],
        name: str,
    ) -> None:
        self.writer, self.events, self.progress = writer, events, progress
        self.rate, self.history, self.name = rate, history, name
        self._pending: list[Any] = []
        self._step, self._rows, self._since = step, 0, time.monotonic()

    def add(self, metrics: dict[str, Any], rows: int) -> None:
        self._pending.append(metrics)
        self._rows += rows
        if len(self._pending) > _IN_FLIGHT:  # a fast host must not fill the device with batches
            jax.block_until_ready(self._pending[-1 - _IN_FLIGHT]["loss"])

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
        if self.events is not None:
            prefix = self.name if record["kind"] == "train" else f"{self.name}-{record['kind']}"
            scalars = {f"{prefix}/{k}": v for k, v in record.items() if isinstance(v, float)}
            self.events.scalars(record["step"], scalars)

    def restart_clock(self) -> None:
        """Leaves the time of an evaluation or a save out of the images per second."""
        self._since = time.monotonic()


class Signal:
    """Notes SIGTERM instead of dying; on the main thread only."""

    def __init__(self) -> None:
        self.received = False
        self._old: Any = None
        self._main = threading.current_thread() is threading.main_thread()

    def _note(self, *_: Any) -> None:
        self.received = True

    def __enter__(self) -> Signal:
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
