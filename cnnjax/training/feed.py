"""Batches on the device ahead of their step."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from cnnjax.training.mesh import shard_batch

PyTree = Any


def _rows(batch: PyTree, axis: int) -> int:
    return int(np.shape(jax.tree.leaves(batch)[0])[axis])


class Feed:
    """Batches on the device ahead of their step, with the data position where it is asked."""

    def __init__(
        self,
        data: Iterator[Any],
        *,
        start: int,
        total: int,
        per_call: int = 1,
        ahead: int = 2,
        save_every: int = 0,
        mesh: Any = None,
    ) -> None:
        """Prepares to read.

        Args:
          data: iterator of host batches.
          start: number of finished steps.
          total: step to end at.
          per_call: batches stacked into one item.
          ahead: items placed beyond the one in hand.
          save_every: items that end at a multiple carry the data position; so does the last.
          mesh: to split batches over.
        """
        self._data, self._next, self._total = data, start, total
        self._per_call, self._ahead, self._every = per_call, ahead, save_every
        self._mesh = mesh
        self._queue: collections.deque[Any] = collections.deque()
        self.draining = False  # set it to read no more and hand out only what was read

    def _place(self, batches: list[Any]) -> PyTree:
        stacked = self._per_call > 1
        batch = jax.tree.map(lambda *a: np.stack(a), *batches) if stacked else batches[0]
        if self._mesh is not None:
            return shard_batch(batch, self._mesh, stacked=stacked)
        return jax.device_put(batch)

    def _read(self) -> None:
        count = min(self._per_call, self._total - self._next)
        batches = []
        for _ in range(count):
            try:
                batches.append(next(self._data))
            except StopIteration:
                raise ValueError(
                    f"the data ended after {self._next + len(batches)} steps, "
                    f"{self._total} were asked; repeat the data set"
                ) from None
        self._next += count
        due = self._next == self._total or (self._every and self._next % self._every == 0)
        position = self._data.get_state() if due and hasattr(self._data, "get_state") else None
        rows = _rows(batches[0], 0) * count * jax.process_count()
        self._queue.append((self._place(batches), self._next, rows, position))

    def __iter__(self) -> Iterator[tuple[PyTree, int, int, Any]]:
        """Yields ``(batch, step after it, images, data position or None)``.

        Raises:
          ValueError: if the data ends before the last step.
        """
        while True:
            while (
                not self.draining and self._next < self._total and len(self._queue) <= self._ahead
            ):
                self._read()
            if not self._queue:
                return
            yield self._queue.popleft()
