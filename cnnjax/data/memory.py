"""Batches of arrays in memory, of any keys, with an exact position."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class MemoryLoader(Iterator[dict[str, np.ndarray]]):
    """Endless shuffled batches of a dict of arrays, as `cnnjax.training.fit` takes them.

    Batch ``i`` is a pure function of the arrays, the seed and ``i`` (``loader[i]``); an epoch's
    remainder is left out.

    Attributes:
      steps_per_epoch: batches in one pass.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], *, batch_size: int, seed: int = 0):
        """Prepares to read.

        Args:
          arrays: equally long arrays by key, e.g. ``image``, ``boxes`` and ``label``.
          batch_size: examples in a batch.
          seed: of the order.

        Raises:
          ValueError: arrays of different lengths, or fewer examples than a batch has.
        """
        self._arrays = {k: np.asarray(v) for k, v in arrays.items()}
        lengths = {k: len(v) for k, v in self._arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the arrays must be equally long, got {lengths}")
        self._n = next(iter(lengths.values()))
        if not 1 <= batch_size <= self._n:
            raise ValueError(f"batch_size is {batch_size}, there are {self._n} examples")
        self.batch_size, self.seed, self._position = batch_size, seed, 0
        self.steps_per_epoch = self._n // batch_size
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.intp))

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Batch ``number`` of the stream, without moving the position."""
        epoch, step = divmod(int(number), self.steps_per_epoch)
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self._n)
            self._order = (epoch, order)
        rows = self._order[1][step * self.batch_size : (step + 1) * self.batch_size]
        return {k: v[rows] for k, v in self._arrays.items()}

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self[self._position]
        self._position += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The exact position and what it belongs to: plain JSON values."""
        content = 0
        for key in sorted(self._arrays):
            content = zlib.crc32(np.ascontiguousarray(self._arrays[key][:8]).tobytes(), content)
        return {
            "next_batch": self._position,
            "num_examples": self._n,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "content": content,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position from `get_state`.

        Raises:
          ValueError: the position belongs to another stream.
        """
        mine = self.get_state()
        other = {k: (state.get(k), v) for k, v in mine.items() if k != "next_batch"}
        told = ", ".join(f"{k} {a!r} (here {b!r})" for k, (a, b) in other.items() if a != b)
        if told:
            raise ValueError(f"this position belongs to another stream of batches: {told}")
        self._position = int(state["next_batch"])

    def close(self) -> None:
        """There is nothing to close."""


def in_order(arrays: Mapping[str, np.ndarray], batch_size: int) -> list[dict[str, np.ndarray]]:
    """One pass in stored order, for evaluation; the last batch is as short as it is."""
    n = len(next(iter(arrays.values())))
    return [{k: v[i : i + batch_size] for k, v in arrays.items()} for i in range(0, n, batch_size)]
