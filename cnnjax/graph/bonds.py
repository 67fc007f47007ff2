"""Rows of channels that one output is made of: a depthwise kernel with its input, a maxout's pair.

A tie says that channels are removed together. Where an atom holds several such rows, a shrunk
program that meets its channels in another order could join channels of different rows; bonds say
which belong together, and in which order the kernel of a depthwise convolution must be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnnjax.graph.ledger import STAY, Event, Ledger

NONE = -1  # identity or class of positions that can't go


def identified(events: Sequence[Event], ident: np.ndarray) -> tuple[np.ndarray, ...]:
    """The labels of all events as identities."""
    return tuple(np.where(e.labels == STAY, NONE, ident[e.labels]) for e in events)


class Bonds:
    """The bonds and pools of the original beside those of the shrunk program.

    Args:
      old: bonds of the original, as identities.
      pools: channels of the original that are reduced to one value, as identities.
      ledger: of the shrunk program.
      ident: its classes.
    """

    def __init__(
        self,
        old: Sequence[np.ndarray],
        pools: Sequence[np.ndarray],
        ledger: Ledger,
        ident: np.ndarray,
    ) -> None:
        self.old, self.pools, self.ledger = old, pools, ledger
        self.new = identified(ledger.bonds, ident)
        self.new_pools = identified(ledger.pools, ident)
        self.last = np.full(int(ident.max()) + 1, NONE, np.int64)  # bond of a class, not in front
        for i, rows in enumerate(self.new):
            inside = rows[:, 1:]
            self.last[inside[inside >= 0]] = i

    def followers(self, classes: np.ndarray, label: np.ndarray, unknown: int) -> np.ndarray:
        """The identity of each class by the first channel of the row that it is in, or unknown."""
        want = np.full(len(label), unknown, np.int64)
        events = np.unique(self.last[classes])
        if len(self.old) == len(self.new):
            for i in events[events >= 0].tolist():
                old, new = self.old[i], self.new[i]
                if old.shape[1:] != new.shape[1:]:
                    continue
                sort = np.argsort(old[:, 0], kind="stable")
                first = old[sort, 0]
                found = np.where(new[:, 0] >= 0, label[new[:, 0]], unknown)
                at = np.minimum(np.searchsorted(first, found), len(first) - 1)
                # channels that come twice in front say nothing
                alone = np.searchsorted(first, found, "right") == at + 1
                good = (first[at] == found) & alone
                rest, values = new[good, 1:], old[sort[at[good]], 1:]
                want[rest[rest >= 0]] = values[rest >= 0]
        return want[classes]

    def mismatch(self, label: np.ndarray, stays: np.ndarray) -> Event | None:
        """A bond that the original doesn't have, or a pool of others than it had.

        Args:
          label: identity of every class of the shrunk program.
          stays: of every identity whether it is still there.
        """
        for events, new, old in (
            (self.ledger.bonds, self.new, self.old),
            (self.ledger.pools, self.new_pools, self.pools),
        ):
            paired = len(old) == len(new)
            every = None if paired else {r for rows in old for r in _rows(rows)}
            for i, (event, rows) in enumerate(zip(events, new)):
                carried = np.where(rows >= 0, label[rows], NONE)
                known = carried[(carried >= NONE).all(axis=1)] if carried.ndim == 2 else carried
                if paired and known.shape == old[i].shape and np.array_equal(known, old[i]):
                    continue
                if not _rows(known) <= (_rows(old[i]) if every is None else every):
                    return event
        if len(self.pools) == len(self.new_pools):
            for event, new, old in zip(self.ledger.pools, self.new_pools, self.pools):
                carried = np.unique(label[new[new >= 0]])
                if not np.isin(old[old >= 0][stays[old[old >= 0]]], carried).all():
                    return event
        return None


def _rows(rows: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, rows.reshape(len(rows), -1).tolist()))
