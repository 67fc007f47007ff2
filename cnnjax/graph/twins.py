"""Channels that one axis carries twice: ``x + x[..., ::-1]`` makes channels i and n-1-i the same.

Identities alone can't tell such twins apart when a shrunk program meets them in another order (a
roll, say). The pairs of positions that the program joins can: they are kept for twins, and the
shrunk program must join exactly the pairs of the original that are left.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cnnjax.graph.ledger import STAY, Ledger, pairs
from cnnjax.graph.types import Key


def joined(ledger: Ledger) -> np.ndarray:
    """Where different nodes meet, none of them immovable: (P, 3), the event and both nodes.

    The first is that of the result: ``x + roll(x)`` and ``roll(x) + x`` give other channels.
    """
    a, b = pairs(ledger.same, ledger.same_to)
    event = np.repeat(np.arange(len(ledger.same)), [len(to) for to in ledger.same_to])
    use = (a != b) & (a != STAY) & (b != STAY)
    return np.stack([event[use], a[use], b[use]], axis=1)


def repeats(classes: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The nodes, but the first one of its kind, whose class comes more than once on their axis.

    Args:
      classes: of every node; node 0 is on no axis.
      owner: the axis of every node, those of one axis next to each other.
    """
    # on nearly every axis classes grow, which is seen without sorting
    falls = (classes[1:] <= classes[:-1]) & (owner[1:] == owner[:-1])
    out = [np.zeros(0, np.int64)]
    for axis in np.flatnonzero(np.bincount(owner[1:][falls])) if falls.any() else ():
        start, stop = np.searchsorted(owner, [axis, axis + 1])
        order = np.argsort(classes[start:stop], kind="stable")
        found = classes[start:stop][order]
        out.append(start + order[1:][found[1:] == found[:-1]])
    return np.concatenate(out)


def twice(ident: np.ndarray, owner: np.ndarray) -> np.ndarray | None:
    """For every class whether it comes more than once on some axis; None: none does."""
    again = repeats(ident, owner)
    if not len(again):
        return None
    out = np.zeros(int(ident.max()) + 1, bool)
    out[ident[again]] = True
    return out


def fix_ambiguous(ledger: Ledger, ident: np.ndarray, owner: np.ndarray) -> None:
    """Stays whole: what a depthwise convolution reads, or a sum over some channels, among twins.

    A depthwise kernel's channels are bound to those that it reads, and not the same; which kernel
    belongs to which twin after a change of their order is seen in no pair. Nor is which of two
    twins a sum holds that holds one of them.
    """
    among = twice(ident, owner) if ledger.depthwise or ledger.pools else None
    if among is None:
        return
    events = [(e, False) for e in ledger.depthwise] + [(e, True) for e in ledger.pools]
    for event, pool in events:
        nodes = np.unique(event.labels[among[ident[event.labels]] & (event.labels != STAY)])
        if not len(nodes) or (pool and _complete(nodes, ident, owner)):
            continue
        ledger.info = event.info
        reason = f"beside channels that are the same as others, in {event.reason}"
        ledger.fix(event.labels, reason, policy=True)


def _complete(nodes: np.ndarray, ident: np.ndarray, owner: np.ndarray) -> bool:
    """Whether all twins of these nodes on their axes are among them."""
    axes = np.isin(owner, owner[nodes])
    return bool(np.isin(np.flatnonzero(axes & np.isin(ident, ident[nodes])), nodes).all())


def twin_pairs(ledger: Ledger, ident: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The rows of `joined` with nodes whose class comes more than once on some axis."""
    among = twice(ident, owner)
    if among is None:
        return np.zeros((0, 3), np.int64)
    met = joined(ledger)
    return met[among[ident[met[:, 1]]]]


class Twins:
    """The pairs of the original, and which node of it each node of the shrunk program is.

    Attributes:
      pairs: rows of `joined` of the original, of identities that come twice on an axis.
      ids: these identities.
      old: the original's node of each node of the shrunk program, -1 while unknown.
    """

    def __init__(
        self,
        pairs: np.ndarray,
        starts: Mapping[Key, int],
        identity: np.ndarray,
        ledger: Ledger,
    ) -> None:
        self.pairs, self.starts, self.ledger = pairs, starts, ledger
        self.new_pairs = joined(ledger) if len(pairs) else pairs
        self.old = np.full(ledger.size if len(pairs) else 0, -1, np.int64)
        self.identity = identity
        self.ids = np.unique(self.identity[pairs[:, 1]]) if len(pairs) else np.zeros(0, np.int64)

    def among(self, ids: np.ndarray) -> bool:
        """Whether twins are among these identities."""
        return bool(len(self.ids)) and bool(np.isin(ids, self.ids).any())

    def assign(self, key: Key, index: np.ndarray) -> None:
        """Says which old positions the positions of a new axis are."""
        if not len(self.pairs):
            return
        start = self.ledger.starts[key]
        self.old[start : start + len(index)] = self.starts[key] + index

    def order(self, key: Key, known: np.ndarray, kept: np.ndarray) -> np.ndarray | None:
        """Old positions of a new axis by the pairs with axes that are known; None: can't tell.

        Args:
          key: the axis.
          known: old identity of every new position.
          kept: old positions that stay.
        """
        start, old_start = self.ledger.starts[key], self.starts[key]
        inside = {int(k) for k in kept}
        partners: dict[tuple[int, int], set[int]] = {}
        for _, *ends in self.pairs.tolist():
            for side in (0, 1):
                at = ends[1 - side] - old_start
                if at in inside:
                    partners.setdefault((side, ends[side]), set()).add(at)
        found: list[set[int]] = [
            {int(k) for k in kept if self.identity[old_start + k] == label}
            for label in known.tolist()
        ]
        for _, *ends in self.new_pairs.tolist():
            for side in (0, 1):
                at, other = ends[1 - side] - start, int(self.old[ends[side]])
                if 0 <= at < len(kept) and (side, other) in partners:
                    found[at] &= partners[side, other]
        if any(len(f) != 1 for f in found):
            return None
        index = np.array([f.pop() for f in found], np.int64)
        return index if np.array_equal(np.sort(index), np.sort(kept)) else None

    def mismatch(self) -> bool:
        """Whether the shrunk program joins other twins than the original does."""
        if not len(self.pairs):
            return False
        left = np.isin(self.pairs[:, 1:], self.old[self.old >= 0]).all(axis=1)
        new = np.column_stack([self.new_pairs[:, 0], self.old[self.new_pairs[:, 1:]]])
        new = new[(new[:, 1:] >= 0).all(axis=1)]
        new = new[np.isin(self.identity[new[:, 1]], self.ids)]
        old, new = (set(map(tuple, rows.tolist())) for rows in (self.pairs[left], new))
        old, new = ({r for r in rows if r[1] != r[2]} for rows in (old, new))
        if {r[0] for r in old} != {r[0] for r in new}:
            # arrays that met may be one array now, which is no event: all events together
            old, new = ({r[1:] for r in rows} for rows in (old, new))
        return old != new
