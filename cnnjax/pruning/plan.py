"""The steps in which channels go, pool by pool, and how far each pool may go."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from cnnjax.graph import Graph
from cnnjax.pruning.pools import Pool

SCOPES = ("layer", "global", "isomorphic")


class Plan:
    """The steps of every pool in the order in which they go.

    Args:
      graph: of the network.
      pools: the pools that may be pruned.
      score: of every atom.
      round_to: widths are multiples of this, or whole.
      min_width: the least width of a group.
    """

    def __init__(
        self,
        graph: Graph,
        pools: list[Pool],
        score: np.ndarray,
        round_to: int,
        min_width: int,
    ) -> None:
        self.graph, self.pools = graph, pools
        self.order = [p.order(score) for p in pools]
        self.gone = [p.gone for p in pools]
        # a step's score is the mean over its atoms; the running maximum keeps a pool's steps in
        # order where an uneven first step or rounding would not
        self.score = [
            np.maximum.accumulate(np.add.reduceat(score[o], g[:-1]) / np.diff(g))
            for o, g in zip(self.order, self.gone)
        ]
        self.allowed = [_allowed(graph, p, round_to, min_width) for p in pools]

    def alive(self, steps: list[int]) -> np.ndarray:
        """The decision after so many steps in each pool, or the next fewer that are allowed."""
        alive = self.graph.alive()
        for i, n in enumerate(steps):
            allowed = self.allowed[i]
            most = allowed[np.searchsorted(allowed, n, side="right") - 1]
            alive[self.order[i][: self.gone[i][most]]] = False
        return alive

    def ranked(self, members: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """All steps of some pools, lowest score first: the pool of each, and its channels."""
        pool = np.concatenate([np.full(self.pools[i].steps, i) for i in members])
        score = np.concatenate([self.score[i] for i in members])
        width = np.concatenate([np.diff(self.gone[i]) for i in members])
        order = np.argsort(score, kind="stable")
        return pool[order], width[order]

    def classes(self, scope: str) -> list[list[int]]:
        """Pools that compete with each other."""
        if scope == "global":
            return [list(range(len(self.pools)))]
        found: dict[Any, list[int]] = {}
        for i, pool in enumerate(self.pools):
            found.setdefault(_structure(self.graph, pool), []).append(i)
        return list(found.values())


def _allowed(graph: Graph, pool: Pool, round_to: int, min_width: int) -> np.ndarray:
    """Numbers of steps that leave every width at least minimal and round; 0 is always one."""
    good = np.ones(pool.steps + 1, bool)
    for g in pool.groups:
        atoms = graph.groups[g].atoms  # neighbours in number, in order
        mine = [i for i, c in enumerate(pool.cells) if atoms[0] <= c[0] <= atoms[-1]]
        width = pool.kept[:, mine].sum(axis=1) if len(pool.cells) > 1 else pool.kept[:, 0]
        full = width[0]
        good &= width >= max(1, min(min_width, full))
        good &= (width % round_to == 0) | (width == full)
    good[0] = True
    return np.flatnonzero(good)


def _structure(graph: Graph, pool: Pool) -> tuple[Any, ...]:
    """What a pool looks like whatever its width and place: kinds of axes, spatial sizes."""
    kinds: Counter[tuple[Any, ...]] = Counter()
    for i in pool.groups:
        for path, axis in graph.groups[i].members:
            shape = graph.shapes[path]
            spatial = shape[:-2] if len(shape) > 2 else ()
            one = graph.axes[path, axis]
            kinds[path.rpartition("/")[2], axis - len(shape), spatial, one.consumer] += 1
    return tuple(sorted(kinds.items()))
