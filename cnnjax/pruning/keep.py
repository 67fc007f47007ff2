"""A decision: which channels stay. Data made by selection and applied by `shrink`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnnjax.errors import did_you_mean
from cnnjax.graph import Graph


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Keep:
    """Which atoms of a graph stay.

    Attributes:
      alive: bool array over the graph's atoms.
      groups: for each channel group its name and the bool array of its atoms.
    """

    alive: np.ndarray
    groups: tuple[tuple[str, np.ndarray], ...]

    @classmethod
    def of(cls, graph: Graph, alive: Any) -> Keep:
        """The decision ``alive`` (bool array over the atoms), checked.

        Raises:
          ValueError: if a layer would be empty, or a constraint broken; see `check_alive`.
        """
        alive = np.array(alive, bool)
        check_keep(graph, alive)
        return cls(alive, tuple((g.name, alive[g.atoms]) for g in graph.groups))

    @classmethod
    def of_positions(cls, graph: Graph, positions: Mapping[str, Any], *, axis: int = -1) -> Keep:
        """The decision that keeps given channels: ``{"conv1/kernel": [0, 2, 5]}``.

        Args:
          graph: of the network.
          positions: kept positions of ``axis`` of each variable; everything else is kept.
          axis: of the variables named; the last one, a kernel's outputs, by default.

        Raises:
          KeyError: if a path names no variable; lists near matches.
          ValueError: if a position is fixed, out of range, or tied to one that is kept or removed
            by another path, or by the same one (names both).
        """
        alive = graph.alive()
        said: dict[int, tuple[str, bool]] = {}
        for path, kept in positions.items():
            one = graph.axis(path, axis)
            if one.table is not None:
                raise ValueError(
                    f"{path!r} axis {axis} reads other channels in each conv-group; decide at the "
                    "layer that makes them"
                )
            mask = np.zeros(one.size, bool)
            kept = np.asarray(kept)
            if kept.dtype == bool:
                kept = np.flatnonzero(kept)
            if kept.size and not (kept.min() >= 0 and kept.max() < one.size):
                raise ValueError(
                    f"{path!r} axis {axis} has positions 0..{one.size - 1}, got {kept.tolist()}"
                )
            mask[kept.astype(np.int64)] = True
            for position, (atom, stay) in enumerate(zip(one.labels.tolist(), mask.tolist())):
                if atom < 0:
                    if not stay:
                        raise ValueError(
                            f"position {position} of {path!r} axis {axis} can't go: {one.reason}"
                        )
                    continue
                before = said.setdefault(atom, (f"{path}[{position}]", stay))
                if before[1] != stay:
                    raise ValueError(
                        f"{path}[{position}] and {before[0]} are tied: both stay or both go, but "
                        f"{'the first stays' if stay else 'the second stays'} and the other doesn't"
                    )
                alive[atom] = stay
        return cls.of(graph, alive)

    @property
    def removed(self) -> int:
        """Number of atoms that go."""
        return int(len(self.alive) - self.alive.sum())

    def to_json(self) -> dict[str, Any]:
        """``{"groups": {name: {"size": n, "removed": [positions]}}}``, JSON-able."""
        return {
            "groups": {
                name: {"size": len(mask), "removed": np.flatnonzero(~mask).tolist()}
                for name, mask in self.groups
            }
        }

    @classmethod
    def from_json(cls, graph: Graph, data: Mapping[str, Any] | str) -> Keep:
        """The inverse of `to_json`, for a graph of the same network.

        Raises:
          ValueError: if the groups are not those of the graph.
        """
        loaded: Any = json.loads(data) if isinstance(data, str) else data
        groups = loaded["groups"]
        known = {g.name: g for g in graph.groups}
        alive = graph.alive()
        for name, entry in groups.items():
            if name not in known:
                raise ValueError(f"the graph has no group {name!r}.{did_you_mean(name, known)}")
            if known[name].size != entry["size"]:
                raise ValueError(
                    f"group {name!r} has {known[name].size} channels, the decision was made for "
                    f"{entry['size']}"
                )
            alive[known[name].atoms[np.asarray(entry["removed"], np.int64)]] = False
        return cls.of(graph, alive)

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.groups), default=0)
        lines = [f"keep {int(self.alive.sum())} of {len(self.alive)} channels"]
        lines += [f"  {name:<{width}}  {int(m.sum()):>5} / {len(m)}" for name, m in self.groups]
        return "\n".join(lines)

    __repr__ = __str__


def check_keep(graph: Graph, alive: np.ndarray) -> None:
    """Raises unless a decision can be applied to the graph.

    Raises:
      ValueError: if ``alive`` has the wrong length, a layer would lose all its channels, or parts
        that must keep equal numbers don't (names the layer and the line).
    """
    if alive.shape != (graph.num_atoms,):
        raise ValueError(f"alive has shape {alive.shape}, the graph has {graph.num_atoms} atoms")
    layout = graph.layout
    running = np.concatenate([[0], np.cumsum(layout.alive(alive))])
    left = running[layout.starts + layout.lengths] - running[layout.starts]
    for i, (table, _) in layout.tables.items():
        left[i] = np.append(alive, True)[table].sum()
    empty = np.flatnonzero((left == 0) & (layout.lengths > 0))
    if len(empty):
        path, axis = layout.keys[empty[0]]
        size = layout.lengths[empty[0]]
        raise ValueError(f"axis {axis} of {path!r} would be empty: all its {size} channels go")
    for c in graph.constraints:
        # untouched, a shuffle of channels that don't divide evenly is as it was
        if not alive[c.atoms].all() and not c.holds(alive):
            ins, outs = c.counts(alive)
            where = f" at {c.source}" if c.source else ""
            both = f" and {outs.tolist()} outputs" if len(outs) else ""
            raise ValueError(
                f"{c.path or c.reason}: the parts would keep {ins.tolist()}{both} channels, which "
                f"must be equal in each ({c.reason}){where}"
            )
