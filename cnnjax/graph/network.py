"""The graph of a network: what `cnnjax.graph.trace` returns, and what can be asked of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnnjax.errors import did_you_mean
from cnnjax.graph.axes import Layout
from cnnjax.graph.types import Axis, Constraint, Fixed, Group, Key, Layer
from cnnjax.tree import match_any


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """What a network is, read off its jaxpr. See the module's docstring for atoms.

    Attributes:
      axes: every axis of every variable, including the fixed ones.
      groups: prunable groups, in program order.
      constraints: all constraints.
      fixed: what can't be pruned, and why (one entry per axis and reason).
      layers: in program order.
      shapes: shape of every variable.
      dtypes: dtype of every variable.
      num_atoms: how many atoms there are.
      links: the adjacency, in a form that grows with the depth alone: (producer, consumer) pairs of
        indices of layers, and of *streams*, which have negative ones and stand for all that goes
        into them. `edges` is the same without streams.
      inputs: abstract example inputs, as given.
      mode: how grouped convolutions and splits are treated: ``"flexible"``, ``"tied"`` (same
        positions in every part) or ``"whole"`` (whole conv-groups; splits as in ``"tied"``).
      layout: labels of all axes in flat arrays, of which ``axes`` is made.
      identities: for every position of ``layout`` an identity: equal where the program makes two
        positions meet. Finer than atoms, which also bind positions that only go together.
      tables: the same for the ``table`` of grouped kernels.
      table_nodes: the nodes behind ``tables``.
      starts: first node of every axis.
      twins: (P, 3) where nodes meet whose identities come twice on some axis: event, both nodes.
      bonds: rows of identities of channels that one output is made of, in program order.
      pools: identities of channels that are reduced to one value, in program order.
      literals: scalar constants of the program, in order, with their lines' equation info.
      parameters: paths of the trainable variables (running statistics and keys are not).
      notes: the dims that labels had after each reshape, for `cnnjax.graph.label_check`.
    """

    axes: Mapping[Key, Axis]
    groups: tuple[Group, ...]
    constraints: tuple[Constraint, ...]
    fixed: tuple[Fixed, ...]
    layers: tuple[Layer, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, Any]
    num_atoms: int
    layout: Layout = dataclasses.field(repr=False)
    identities: np.ndarray = dataclasses.field(repr=False)
    links: tuple[tuple[int, int], ...] = ()
    inputs: tuple[Any, ...] = ()
    mode: str = "flexible"
    tables: Mapping[Key, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    table_nodes: Mapping[Key, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    starts: Mapping[Key, int] = dataclasses.field(default_factory=dict, repr=False)
    twins: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 3), np.int64), repr=False
    )
    bonds: tuple[np.ndarray, ...] = dataclasses.field(default=(), repr=False)
    pools: tuple[np.ndarray, ...] = dataclasses.field(default=(), repr=False)
    literals: tuple[tuple[float, Any], ...] = dataclasses.field(default=(), repr=False)
    parameters: frozenset[str] = dataclasses.field(default=frozenset(), repr=False)
    notes: tuple[Any, ...] = dataclasses.field(default=(), repr=False)

    def axis(self, path: str, axis: int = -1) -> Axis:
        """The `Axis` of a variable.

        Raises:
          KeyError: if there's no such variable (names near ones) or no such axis.
        """
        if path not in self.shapes:
            raise KeyError(f"no variable {path!r}.{did_you_mean(path, self.shapes)}")
        ndim = len(self.shapes[path])
        if not -ndim <= axis < ndim:
            raise KeyError(f"axis {axis} of {path!r}, which has {ndim} axes")
        return self.axes[path, axis % ndim]

    def groups_of(self, path: str, axis: int = -1) -> tuple[Group, ...]:
        """All groups with an atom on that axis (several after a concatenation; () if fixed)."""
        atoms = self.axis(path, axis).atoms
        return tuple(g for g in self.groups if np.isin(g.atoms, atoms).any())

    def group_of(self, path: str, axis: int = -1) -> Group:
        """The group on that axis.

        Raises:
          KeyError: if there's no such variable or axis.
          ValueError: if the axis is fixed (gives the reason), or carries several groups.
        """
        found = self.groups_of(path, axis)
        if not found:
            a = self.axis(path, axis)
            where = f" at {a.source}" if a.source else ""
            raise ValueError(f"{path!r} axis {axis} can't be pruned: {a.reason}{where}")
        if len(found) > 1:
            names = ", ".join(repr(g.name) for g in found)
            raise ValueError(f"{path!r} axis {axis} carries {len(found)} groups: {names}")
        return next(iter(found))

    def layer(self, path: str, call: int = 0) -> Layer:
        """The layer at a module path.

        Raises:
          KeyError: if there's none (names near ones).
        """
        return self.layers[self._index(path, call)]

    def layers_of(self, paths: str | tuple[str, ...]) -> tuple[Layer, ...]:
        """Layers whose path matches a glob."""
        return tuple(layer for layer in self.layers if match_any(paths, layer.path))

    @functools.cached_property
    def identity(self) -> dict[Key, np.ndarray]:
        """Of every axis the identities of its positions."""
        layout = self.layout
        return {key: self.identities[layout.nodes(i)] for i, key in enumerate(layout.keys)}

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(producer layer index, consumer layer index) pairs: dataflow to the *next* layers.

        Behind a stack of residual blocks that is every pair of a block and a later layer.
        """
        after = self._linked[0]
        layers = range(len(self.layers))
        return tuple(sorted((a, b) for a in layers for b in _through(after, {a})))

    @functools.cached_property
    def _linked(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """What follows and what precedes each layer and stream."""
        after: dict[int, list[int]] = {}
        before: dict[int, list[int]] = {}
        for a, b in self.links:
            after.setdefault(a, []).append(b)
            before.setdefault(b, []).append(a)
        return after, before

    def next_layers(self, path: str) -> tuple[Layer, ...]:
        """Layers that read this layer's output before any other layer does."""
        return self._ordered(_through(self._linked[0], self._indices(path)))

    def prev_layers(self, path: str) -> tuple[Layer, ...]:
        """Layers whose output this layer reads with no other layer between."""
        return self._ordered(_through(self._linked[1], self._indices(path)))

    def bn_of(self, path: str) -> Layer | None:
        """The BatchNorm that alone reads this layer's output, or None."""
        after = self.next_layers(path)
        if len(after) == 1 and after[0].kind == "batch_norm":
            return after[0]
        return None

    def alive(self) -> np.ndarray:
        """The decision that keeps everything: all True."""
        return np.ones(self.num_atoms, dtype=bool)

    @functools.cached_property
    def _at(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for i, layer in enumerate(self.layers):
            found.setdefault(layer.path, set()).add(i)
        return found

    def _indices(self, path: str) -> set[int]:
        found = self._at.get(path)
        if not found:
            paths = [layer.path for layer in self.layers if layer.path]
            raise KeyError(f"no layer {path!r}.{did_you_mean(path, paths)}")
        return found

    def _index(self, path: str, call: int) -> int:
        for i in sorted(self._indices(path)):
            if self.layers[i].call == call:
                return i
        raise KeyError(f"layer {path!r} is not called {call + 1} times")

    def _ordered(self, indices: set[int]) -> tuple[Layer, ...]:
        return tuple(self.layers[i] for i in sorted(indices))

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers, {len(self.groups)} groups, {self.num_atoms} atoms"]
        lines += [f"  {group}" for group in self.groups]
        if self.constraints:
            lines.append(f"constraints: {len(self.constraints)}")
            lines += [f"  {c}" for c in self.constraints]
        if self.fixed:
            lines.append(f"fixed: {len(self.fixed)}")
            lines += [f"  {f}" for f in self.fixed]
        return "\n".join(lines)


def _through(links: Mapping[int, list[int]], start: set[int]) -> set[int]:
    """The layers that are linked to one of ``start``, through streams."""
    found: set[int] = set()
    todo = [b for a in start for b in links.get(a, ())]
    seen = set(todo)
    while todo:
        at = todo.pop()
        if at >= 0:
            found.add(at)
            continue
        new = [b for b in links.get(at, ()) if b not in seen]
        seen.update(new)
        todo.extend(new)
    return found
