"""The cost of a decision without tracing again: MACs, parameters, bytes, or your own measure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from cnnjax.graph import Graph

Cost = Callable[[np.ndarray], float]  # alive -> cost, never larger for a smaller network


class CostModel:
    """Exact MACs, parameters and bytes of a network after a decision.

    A convolution's or dense layer's MACs are its output positions times its kernel's elements,
    grouped or not, so the surviving elements of every variable are all that is needed.

    Args:
      graph: of the network.
      variables: paths that count as parameters; by default the graph's trainable variables.
    """

    def __init__(self, graph: Graph, variables: Collection[str] | None = None) -> None:
        self.graph = graph
        paths = list(graph.shapes)
        self.index = {p: i for i, p in enumerate(paths)}
        flat: list[np.ndarray] = []
        owner: list[int] = []
        base = np.ones(len(paths), np.int64)
        self.tables: list[tuple[int, np.ndarray, int]] = []
        for i, path in enumerate(paths):
            for d, n in enumerate(graph.shapes[path]):
                axis = graph.axes[path, d]
                if axis.table is not None:
                    self.tables.append((i, axis.table, n))
                elif axis.prunable:
                    flat.append(axis.labels)
                    owner.append(i)
                else:
                    base[i] *= n
        self.base, self.owner = base, np.array(owner, np.int64)
        self.labels = np.concatenate(flat) if flat else np.zeros(0, np.int64)
        self.starts = np.cumsum([0] + [len(f) for f in flat[:-1]]) if flat else np.zeros(0, int)
        counted = set(graph.parameters if variables is None else variables)
        self.counted = np.array([p in counted for p in paths])
        self.itemsize = np.array([_itemsize(graph.dtypes[p]) for p in paths], np.int64)
        self.factor = np.zeros(len(paths))
        for layer in graph.layers:
            if layer.kernel in self.index and layer.macs:
                full = int(np.prod(layer.kernel_shape))
                self.factor[self.index[layer.kernel]] += layer.macs / full

    def elements(self, alive: np.ndarray) -> np.ndarray:
        """Surviving scalars of every variable, in the order of ``graph.shapes``."""
        mask = np.append(np.asarray(alive, bool), True)
        out = self.base.copy()
        if len(self.labels):
            counts = np.add.reduceat(mask[self.labels].astype(np.int64), self.starts)
            np.multiply.at(out, self.owner, counts)
        for i, table, _ in self.tables:
            rows = mask[table].sum(axis=1)
            out[i] *= rows[rows > 0][0] if (rows > 0).any() else 0
        return out

    def widths(self, alive: np.ndarray) -> dict[str, tuple[float, float]]:
        """For each kernel (*K, C/groups, O) the fractions of C and of O that are left."""
        out: dict[str, tuple[float, float]] = {}
        for layer in self.graph.layers:
            if layer.kernel not in self.index or layer.kernel in out:
                continue
            shape = self.graph.shapes[layer.kernel]
            if len(shape) < 2:
                continue
            left = []
            for d in (len(shape) - 2, len(shape) - 1):
                mask = self.graph.axes[layer.kernel, d].alive(alive)
                left.append(float(mask.mean()))
            if shape[-2] == 1 and layer.groups > 1:
                left[0] = left[1]  # depthwise: inputs are outputs
            out[layer.kernel] = (left[0], left[1])
        return out

    def macs(self, alive: np.ndarray) -> float:
        """Multiply-accumulates of convolutions and dense layers for one example."""
        return float(np.round(self.factor @ self.elements(alive)))

    def macs_without(self, alive: np.ndarray, atoms: np.ndarray) -> np.ndarray:
        """`macs` of as many decisions: ``alive`` without the first of ``atoms``, the second, ..."""
        if self.tables or not len(self.labels):
            out = []
            for atom in atoms:
                one = np.array(alive, bool)
                one[atom] = False
                out.append(self.macs(one))
            return np.array(out)
        counts = np.add.reduceat(np.append(alive, True)[self.labels].astype(np.int64), self.starts)
        left = counts - self.occurrences[atoms].toarray()
        first = np.flatnonzero(np.diff(self.owner, prepend=-1))  # owners come in order
        elements = np.tile(self.base, (len(atoms), 1))
        elements[:, self.owner[first]] *= np.multiply.reduceat(left, first, axis=1)
        return np.round(elements @ self.factor)

    @functools.cached_property
    def occurrences(self) -> Any:
        """Sparse (atoms, axes): positions of each atom on each axis that ``owner`` lists."""
        axis = np.repeat(np.arange(len(self.owner)), np.diff([*self.starts, len(self.labels)]))
        on = self.labels >= 0
        ones = np.ones(int(on.sum()), np.int64)
        shape = (self.graph.num_atoms, len(self.owner))
        return csr_matrix((ones, (self.labels[on], axis[on])), shape=shape)

    def params(self, alive: np.ndarray) -> float:
        """Trainable scalars."""
        return float(self.elements(alive)[self.counted].sum())

    def bytes(self, alive: np.ndarray) -> float:
        """Bytes of the trainable scalars."""
        return float((self.elements(alive) * self.itemsize)[self.counted].sum())


def _itemsize(dtype: object) -> int:
    try:
        return np.dtype(dtype).itemsize  # type: ignore[arg-type]
    except TypeError:
        return 8
