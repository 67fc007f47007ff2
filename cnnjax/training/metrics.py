"""Metrics as JSON lines that survive a resume, and a progress line with images per second."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from typing import IO, Any

from cnnjax import files


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete records of a file, in order; a torn last line (a killed writer) is left out.

    Raises:
      ValueError: if a line before the last one is not JSON.
    """
    lines = pathlib.Path(path).read_text().split("\n")
    records = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i >= len(lines) - 1:
                break
            raise ValueError(f"{path}, line {i + 1}: not JSON ({error})") from error
    return records


class JsonlWriter:
    """Appends one JSON object per line, each with a ``step``.

    Opening it at a resumed step first drops all records beyond that step (they will be written
    again), atomically; so a file never holds a step twice and never misses one.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        """Opens the file.

        Args:
          path: of the file; its folder exists.
          resume_step: last finished step of the run that continues; None: start anew.
        """
        self.path = pathlib.Path(path)
        self.records: list[dict[str, Any]] = []
        if resume_step is not None and self.path.exists():
            self.records = [r for r in read_jsonl(self.path) if r["step"] <= resume_step]
        files.write_text(self.path, "".join(_line(r) for r in self.records))
        self._file: IO[str] = open(self.path, "a")  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record and flushes it."""
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Forces the records to the disk; a checkpoint of the same step comes after this."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(record: dict[str, Any]) -> str:
    clean = {
        k: (str(v) if isinstance(v, float) and not math.isfinite(v) else v)
        for k, v in record.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"


class Progress:
    """One line on stderr: step, loss, images per second, time left.

    On a terminal the line is rewritten in place, elsewhere a new line is printed at most every
    ``interval`` seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        label: str = "train",
        enabled: bool = True,
        stream: Any = None,  # a text stream; default stderr
        interval: int | float = 10.0,
    ) -> None:
        self.total, self.label, self.enabled, self.interval = total, label, enabled, interval
        self.stream = sys.stderr if stream is None else stream
        self.start, self.began = start, time.monotonic()
        self._last, self._width = -math.inf, 0

    def update(self, step: int, metrics: dict[str, Any], rate: int | float | None = None) -> None:
        """Shows the state of affairs after ``step`` steps."""
        now = time.monotonic()
        tty = self.stream.isatty()
        if not self.enabled or (not tty and now - self._last < self.interval):
            return
        self._last = now
        parts = [f"{self.label} {step}/{self.total}"]
        parts += [f"{k} {metrics[k]:.4g}" for k in ("loss", "accuracy", "top1") if k in metrics]
        if rate is not None:
            parts.append(f"{rate:,.0f} images/s")
        if step > self.start:
            left = (now - self.began) / (step - self.start) * (self.total - step)
            parts.append(f"{left:.0f} s left")
        line = "  ".join(parts)
        padding = " " * max(self._width - len(line), 0)
        self._width = len(line)
        self.stream.write(f"\r{line}{padding}" if tty else line + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Ends the line."""
        if self.enabled and self.stream.isatty() and self._width:
            self.stream.write("\n")
            self.stream.flush()
