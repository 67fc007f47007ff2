"""All axes of a graph in a few flat arrays, and `Axis` objects made of them when asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cnnjax.graph.types import FIXED, Axis, Key, Source

Reasons = Mapping[int, tuple[str, Source | None]]  # by axis: why positions of it are fixed


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Positions of all axes, one after the other; position 0 belongs to no axis.

    Attributes:
      keys: of every axis, in the variables' order.
      starts: first position of every axis; axis i ends where axis i + 1 starts.
      lengths: of every axis.
      owner: the axis of every position, -1 for position 0.
      labels: the atom of every position, ``FIXED`` where it stays and on axes with a table.
      consumer: for every axis whether it is contracted away.
      tables: for axes with one: the table, and the axis that its conv-groups partition.
    """

    keys: tuple[Key, ...]
    starts: np.ndarray
    lengths: np.ndarray
    owner: np.ndarray
    labels: np.ndarray
    consumer: np.ndarray
    tables: Mapping[int, tuple[np.ndarray, int | None]]

    @functools.cached_property
    def index(self) -> dict[Key, int]:
        """Where each axis is among ``keys``."""
        return {key: i for i, key in enumerate(self.keys)}

    @functools.cached_property
    def prunable(self) -> np.ndarray:
        """For every axis whether one of its positions may go."""
        out = np.zeros(len(self.keys), bool)
        out[self.owner[self.labels >= 0]] = True
        for i, (table, _) in self.tables.items():
            out[i] = (table >= 0).any()
        return out

    def alive(self, alive: np.ndarray) -> np.ndarray:
        """For every position whether it survives; True on axes with a table."""
        return np.append(alive, True)[self.labels]

    def kept(self, alive: np.ndarray) -> np.ndarray:
        """How many positions of every axis survive a decision.

        Raises:
          ValueError: if the conv-groups of one keep different numbers.
        """
        if not len(self.keys):
            return np.zeros(0, np.int64)
        running = np.concatenate([[0], np.cumsum(self.alive(alive))])
        out = running[self.starts + self.lengths] - running[self.starts]
        for i, (table, on) in self.tables.items():
            path, axis = self.keys[i]
            labels = np.full(self.lengths[i], FIXED)
            out[i] = Axis(path, axis, labels, table, on, True).kept(alive).shape[-1]
        return out

    def nodes(self, i: int) -> slice:
        """The positions of an axis."""
        return slice(int(self.starts[i]), int(self.starts[i] + self.lengths[i]))


class Axes(Mapping[Key, Axis]):
    """``{(path, axis): Axis}``."""

    def __init__(self, layout: Layout, reasons: Reasons) -> None:
        self._layout, self._reasons = layout, reasons
        self._made: dict[Key, Axis] = {}

    def __getitem__(self, key: Key) -> Axis:
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._make(key)
        return made

    def _make(self, key: Key) -> Axis:
        layout = self._layout
        i = layout.index[key]
        labels = layout.labels[layout.nodes(i)]
        if i in layout.tables:
            table, on = layout.tables[i]
            return Axis(*key, labels, table, on, True)
        consumer = bool(layout.consumer[i])
        return Axis(*key, labels, None, None, consumer, *self._reasons.get(i, (None, None)))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._layout.keys)

    def __len__(self) -> int:
        return len(self._layout.keys)

    def __contains__(self, key: Any) -> bool:
        return key in self._layout.index
