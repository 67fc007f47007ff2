"""Pools: which channels can go, step by step, without breaking a constraint.

A *pool* is a set of atoms that compete with each other. Without constraints it is a channel group
and one step removes one atom. Under constraints (conv-groups or split parts that must keep equal
numbers) the atoms fall into *cells*, the intersections of all parts, and a step removes from every
cell in proportion to its size: cells of 4, 2, 2, 4 lose 2, 1, 1, 2 atoms at a time. Then the parts
stay equal whatever the scores, and each cell loses its own worst atoms. Where the sizes have no
common divisor (a channel shuffle of 20 channels over 3 groups makes cells of 7, 7 and 6), the first
step evens them out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cnnjax.graph import Constraint, Graph

# the first step of a pool may cost at most this share of its channels in evening out its cells
_MOST_LOST = 0.2
_MOST_LOST_ALONE = 0.34  # where there is no other step at all
_FINE = 32  # steps to look for where cells differ in size


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Atoms that are selected together.

    Attributes:
      name: of the first group in it.
      groups: the channel groups that it holds, by index in ``graph.groups``.
      cells: the atoms of each cell.
      kept: int array (steps + 1, cells): how many atoms of each cell stay after so many steps; the
        first row is the cells' sizes, the last one zero.
      statistic: why its channels are not independent of each other, or None.
    """

    name: str
    groups: tuple[int, ...]
    cells: tuple[np.ndarray, ...]
    kept: np.ndarray
    statistic: str | None = None

    @property
    def steps(self) -> int:
        """Number of steps; the last one empties every cell."""
        return len(self.kept) - 1

    @property
    def size(self) -> int:
        """Number of atoms."""
        return int(self.kept[0].sum())

    @property
    def gone(self) -> np.ndarray:
        """How many atoms are gone after 0, 1, ... steps."""
        return self.size - self.kept.sum(axis=1)

    def order(self, score: np.ndarray) -> np.ndarray:
        """The atoms in the order in which they go; the first ``gone[n]`` of them in n steps.

        Args:
          score: of every atom of the graph; the lowest go first, ties by atom number.
        """
        if len(self.cells) == 1 and self.steps == self.size:
            (cell,) = self.cells
            return cell[np.lexsort((cell, score[cell]))]
        atoms, step = [], []
        for i, cell in enumerate(self.cells):
            atoms.append(cell[np.lexsort((cell, score[cell]))])
            step.append(np.repeat(np.arange(self.steps), -np.diff(self.kept[:, i])))
        return np.concatenate(atoms)[np.argsort(np.concatenate(step), kind="stable")]


def pools(graph: Graph) -> tuple[Pool, ...]:
    """The pools of a graph, in program order; groups that constraints tie together share one.

    Atoms whose constraints admit no step but "all or nothing" are in no pool.
    """
    families = [f for c in graph.constraints for f in _families(c)]
    group_of = np.full(graph.num_atoms, -1, np.int64)
    for group in graph.groups:
        group_of[group.atoms] = group.index
    touched = [np.unique(np.concatenate(f)) for f in families]
    touched = [t[t >= 0] for t in touched]
    component = _components(
        len(graph.groups), [np.unique(group_of[atoms]) for atoms in touched if len(atoms)]
    )  # of groups
    mine: dict[int, list[tuple[np.ndarray, ...]]] = {}
    for family, atoms in zip(families, touched):
        if len(atoms):
            mine.setdefault(int(component[group_of[atoms[0]]]), []).append(family)
    out: list[Pool] = []
    for label in range(int(component.max()) + 1 if len(component) else 0):
        if label not in mine:
            continue
        groups = np.flatnonzero(component == label)
        atoms = np.concatenate([graph.groups[g].atoms for g in groups])
        cells, rows = _cells(atoms, group_of[atoms], mine[label], graph.num_atoms)
        out += _blocks(graph, group_of, cells, rows)
    for group, label in zip(graph.groups, component.tolist()):
        n = group.size
        if label not in mine and n > 1:  # nothing asks for anything: one channel at a time
            kept = np.arange(n, -1, -1)[:, None]
            out.append(Pool(group.name, (group.index,), (group.atoms,), kept, group.statistic))
    return tuple(sorted(out, key=lambda p: (p.groups, p.cells[0][0])))


def _families(c: Constraint) -> list[tuple[np.ndarray, ...]]:
    """Sets of parts that need equal counts; none where whole conv-groups go."""
    if c.kind == "grouped" and c.paired:
        own = [np.unique(np.concatenate(q)) for q in zip(c.parts, c.paired)]
        if all(len(a) == 1 and a[0] >= 0 for a in own) and len(np.unique(own)) == len(own):
            return []  # each conv-group is one atom, inputs and outputs: it goes, or stays
    return [tuple(parts) for parts in (c.parts, c.paired) if len(parts)]


def _components(count: int, joined: Sequence[np.ndarray]) -> np.ndarray:
    """Labels of things 0..count-1 of which each array joins some."""
    if not joined:
        return np.arange(count)
    a = [int(x) for items in joined for x in [items[0]] * (len(items) - 1)]
    b = [int(x) for items in joined for x in items[1:]]
    matrix = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(count, count))
    return connected_components(matrix, directed=False)[1]


def _cells(
    atoms: np.ndarray, groups: np.ndarray, families: list, num_atoms: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cells, and for each family the matrix (parts - 1, cells) of what must balance.

    A row is how much more often a part holds an atom of each cell than the first part does; a
    decision is allowed if it sums to zero over what goes.
    """
    position = np.full(num_atoms + 1, len(atoms), np.int64)
    position[atoms] = np.arange(len(atoms))
    held = []
    for parts in families:
        counts = np.zeros((len(parts), len(atoms) + 1), np.int64)
        for i, part in enumerate(parts):
            np.add.at(counts[i], position[part], 1)  # FIXED is -1: the spare last column
        held.append(counts[:, :-1])
    table = np.concatenate([groups[None], *held]) if held else groups[None]
    _, first, which = np.unique(table, axis=1, return_index=True, return_inverse=True)
    cells = [atoms[which.ravel() == i] for i in range(len(first))]
    return cells, [(counts[1:] - counts[:1])[:, first] for counts in held]


def _blocks(
    graph: Graph, group_of: np.ndarray, cells: list[np.ndarray], rows: list[np.ndarray]
) -> list[Pool]:
    """One pool for each set of cells that must balance with each other."""
    joined = [np.flatnonzero(r.any(axis=0)) for r in rows]
    block = _components(len(cells), [j for j in joined if len(j)])
    balance = np.concatenate(rows) if rows else np.zeros((0, len(cells)), np.int64)
    out = []
    for label in range(int(block.max()) + 1):
        mine = np.flatnonzero(block == label)
        kept = _schedule(np.array([len(cells[i]) for i in mine]), balance[:, mine])
        if kept is None:
            continue
        groups = sorted({int(group_of[cells[i][0]]) for i in mine})
        statistic = next((s for g in groups if (s := graph.groups[g].statistic)), None)
        name = graph.groups[groups[0]].name
        out.append(Pool(name, tuple(groups), tuple(cells[i] for i in mine), kept, statistic))
    return out


def _schedule(sizes: np.ndarray, balance: np.ndarray) -> np.ndarray | None:
    """How many of each cell stay after 0, 1, ... steps, or None if only all or nothing balances."""
    kept = _in_proportion(sizes, balance)
    if kept is not None:
        return _finer(sizes, balance, kept)
    # as many in each as in the smallest, where that is balanced and doesn't cost too much at once
    least = int(sizes.min())
    even = np.arange(least, -1, -1)[:, None] * np.ones_like(sizes)
    if (sizes - even[0]).sum() > _MOST_LOST_ALONE * sizes.sum() or (balance @ even[0]).any():
        return None
    kept = np.concatenate([sizes[None], even])
    return kept if (sizes != least).any() else None


def _finer(sizes: np.ndarray, balance: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """More steps where the smallest cell has few atoms: integer points near the straight way.

    Cells of 8, 56 and 80 share no more than 8 steps in exact proportion, but decisions that balance
    are much denser. Each step is the balanced one nearest to its share of every cell, and takes at
    least what the step before took.
    """
    if len(coarse) > _FINE or len(set(sizes.tolist())) == 1 or (balance @ sizes).any():
        return coarse
    n = len(sizes)
    rows = balance[balance.any(axis=1)]
    eye, zero = np.eye(n), np.zeros((len(rows), n))
    goals = LinearConstraint(np.block([[eye, -eye], [eye, eye]]))
    gone = [np.zeros(n, np.int64)]
    for t in range(1, _FINE):
        goal = sizes * (t / _FINE)
        bounds = Bounds(np.r_[gone[-1], np.zeros(n)], np.r_[sizes, np.full(n, np.inf)])
        goals.lb, goals.ub = np.r_[np.full(n, -np.inf), goal], np.r_[goal, np.full(n, np.inf)]
        found = milp(
            np.r_[np.zeros(n), 1 / sizes],
            integrality=np.r_[np.ones(n), np.zeros(n)],
            bounds=bounds,
            constraints=[LinearConstraint(np.hstack([rows, zero]), 0, 0), goals],
            options={"time_limit": 0.5},
        )
        if found.x is None:
            continue
        step = np.round(found.x[:n]).astype(np.int64)
        if (step != gone[-1]).any() and (step < sizes).all() and not (balance @ step).any():
            gone.append(step)
    kept = sizes - np.array([*gone, sizes])
    return kept if len(kept) > len(coarse) else coarse


def _in_proportion(sizes: np.ndarray, balance: np.ndarray) -> np.ndarray | None:
    least = int(sizes.min())
    for levels in range(least, 0, -1):
        weight = sizes // levels
        lost = int((sizes - levels * weight).sum())
        exact = lost == 0
        if levels == 1 and not exact:
            continue
        if lost <= _MOST_LOST * sizes.sum() and not (balance @ weight).any():
            kept = np.arange(levels, -1, -1)[:, None] * weight
            if not exact:
                kept = np.concatenate([sizes[None], kept])
            return kept if len(kept) > 2 else None
    return None
