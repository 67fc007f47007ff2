"""Steps and evaluations that first measure the forms of their convolutions on the device."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from cnnjax import ops


class Tuned:
    """A function whose convolutions run in the forms that were measured for its first arguments."""

    def __init__(self, fn: Callable[..., Any], file: pathlib.Path, mesh: Any = None) -> None:
        """Prepares; nothing is measured yet.

        Args:
          fn: traceable, such as a training step.
          file: of the table (see `cnnjax.ops.tune`): read and added to.
          mesh: that batches are split over; forms are timed on one device's share.
        """
        self._fn, self._file = fn, file
        self._shards = 1 if mesh is None else mesh.size
        self._table: ops.FormTable | None = None

    def __call__(self, *args: Any) -> Any:
        """``fn(*args)``."""
        if self._table is None:
            self._table = ops.tune(self._fn, *args, shards=self._shards, cache=self._file)
        with ops.use_table(self._table):
            return self._fn(*args)
