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
    """All pairs (P, 2) of different nodes that meet, none of them immovable."""
    a, b = pairs(ledger.same, ledger.same_to)
    use = (a != b) & (a != STAY) & (b != STAY)
    return np.stack([a[use], b[use]], axis=1)


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


def fix_depthwise(ledger: Ledger, ident: np.ndarray, owner: np.ndarray) -> None:
    """What a depthwise convolution reads stays whole where it has twins.

    Its kernel's channels are bound to those that it reads, and not the same; which kernel belongs
    to which twin after a change of their order is seen in no pair.
    """
    among = twice(ident, owner) if ledger.depthwise else None
    if among is None:
        return
    for event in ledger.depthwise:
        if (among[ident[event.labels]] & (event.labels != STAY)).any():
            ledger.info = event.info
            reason = f"beside channels that are the same as others, in {event.reason}"
            ledger.fix(event.labels, reason, policy=True)


def twin_pairs(ledger: Ledger, ident: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The joined pairs (P, 2) of nodes whose class comes more than once on some axis."""
    among = twice(ident, owner)
    if among is None:
        return np.zeros((0, 2), np.int64)
    met = joined(ledger)
    return met[among[ident[met[:, 0]]]]


class Twins:
    """The pairs of the original, and which node of it each node of the shrunk program is.

    Attributes:
      ids: identities of the original that come twice on an axis.
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
        self.ids = np.unique(self.identity[pairs[:, 0]]) if len(pairs) else np.zeros(0, np.int64)

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
        partners: dict[int, set[int]] = {}
        for a, b in self.pairs.tolist():
            for x, y in ((a, b), (b, a)):
                if y - old_start in inside:
                    partners.setdefault(x, set()).add(y - old_start)
        found: list[set[int]] = [
            {int(k) for k in kept if self.identity[old_start + k] == label}
            for label in known.tolist()
        ]
        for a, b in self.new_pairs.tolist():
            for x, y in ((a, b), (b, a)):
                other = int(self.old[y])
                if start <= x < start + len(kept) and other >= 0 and other in partners:
                    found[x - start] &= partners[other]
        if any(len(f) != 1 for f in found):
            return None
        index = np.array([f.pop() for f in found], np.int64)
        return index if np.array_equal(np.sort(index), np.sort(kept)) else None

    def mismatch(self) -> bool:
        """Whether the shrunk program joins other twins than the original does."""
        if not len(self.pairs):
            return False
        left = np.isin(self.pairs, self.old[self.old >= 0]).all(axis=1)
        new = self.old[self.new_pairs]
        new = new[(new >= 0).all(axis=1)]
        new = new[np.isin(self.identity[new[:, 0]], self.ids)]
        return _as_set(self.pairs[left]) != _as_set(new)


def _as_set(pairs: np.ndarray) -> set[tuple[int, int]]:
    return {(min(a, b), max(a, b)) for a, b in pairs.tolist() if a != b}
