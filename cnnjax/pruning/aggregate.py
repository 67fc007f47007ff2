"""From scores of weights or channels to one score for each atom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cnnjax.errors import did_you_mean
from cnnjax.graph import Graph
from cnnjax.tree import flatten

PyTree = Any
REDUCE: dict[str, Callable[..., Any]] = {
    # accumulated in float64 without a copy of the scores in float64
    "sum": lambda x, axis: x.sum(axis, dtype=np.float64),
    "mean": lambda x, axis: x.mean(axis, dtype=np.float64),
    "max": lambda x, axis: x.max(axis),
    "min": lambda x, axis: x.min(axis),
    "l2": lambda x, axis: np.sqrt(np.square(x).sum(axis, dtype=np.float64)),
}
NORMALIZE = ("none", "mean", "max", "sum", "l2", "standard")


def score_atoms(
    graph: Graph, scores: PyTree, *, reduce: str = "mean", within: str = "sum"
) -> tuple[np.ndarray, np.ndarray]:
    """One score for each atom, from the scores of the axes that make it.

    Args:
      graph: of the network.
      scores: see `select_channels`.
      reduce: over the axes of an atom.
      within: over the weights of one axis' position.

    Returns:
      ``(score, scored)``: float64 (num_atoms,), and whether an atom has any score.

    Raises:
      ValueError: if a score's shape fits neither its variable nor an axis of it, if a score is NaN,
        or if no score belongs to any group.
      KeyError: if a path names no variable.
    """
    flat = {p: leaf for p, leaf in flatten(scores).items() if leaf is not None}
    total: list[np.ndarray] = []
    atoms: list[np.ndarray] = []
    for path, leaf in flat.items():
        if path not in graph.shapes:
            raise KeyError(
                f"scores for {path!r}, which is no variable.{did_you_mean(path, graph.shapes)}"
            )
        values = np.asarray(leaf)
        if values.dtype not in (np.float32, np.float64):
            values = values.astype(np.float64)
        for axis, vector in _vectors(graph, path, values, within):
            labels = graph.axes[path, axis].labels
            on = labels >= 0
            if not on.all():
                labels, vector = labels[on], vector[on]
            if not len(labels):
                continue
            if np.isnan(vector).any():
                raise ValueError(f"the scores of {path!r} hold NaN")
            if within in ("sum", "mean", "max", "min") and (labels[1:] > labels[:-1]).all():
                atoms.append(labels)  # each atom once, as nearly everywhere
                total.append(vector)
                continue
            # an atom on several positions of one axis: those are parts of the same channel
            unique, where = np.unique(labels, return_inverse=True)
            atoms.append(unique)
            total.append(_by_label(vector, where, len(unique), within))
    if not graph.groups:
        why = "; ".join(sorted({str(f) for f in graph.fixed})[:3])
        raise ValueError(f"no channel of this network can be pruned, for example: {why}")
    if not atoms:
        raise ValueError(
            "no score belongs to a group that can be pruned; scores need the paths of the "
            f"variables, e.g. {next(iter(graph.shapes), '')!r}, and a score for every weight where "
            "channels are not the last axis"
        )
    return _combine(np.concatenate(atoms), np.concatenate(total), graph.num_atoms, reduce)


def _vectors(
    graph: Graph, path: str, values: np.ndarray, within: str
) -> Iterator[tuple[int, np.ndarray]]:
    """(axis, score of each position) for every producing axis that carries atoms."""
    shape, layout = graph.shapes[path], graph.layout
    first = layout.index[path, 0] if shape else 0
    consumer = layout.consumer[first : first + len(shape)].tolist()
    axes = [
        d
        for d in range(len(shape))
        if layout.prunable[first + d] and not consumer[d] and first + d not in layout.tables
    ]
    if values.shape == shape:
        for d in axes:
            others = tuple(e for e in range(len(shape)) if e != d)
            yield d, REDUCE[within](values, others) if others else values
        return
    if values.ndim == 1:
        making = [d for d in range(len(shape)) if not consumer[d]]
        if making and len(values) == shape[making[-1]]:
            if making[-1] in axes:
                yield making[-1], values
            return
        if shape and len(values) == shape[-1]:
            return  # the last axis is contracted: a score of what is read, not of what is made
    raise ValueError(
        f"the scores of {path!r} have shape {values.shape}; expected {shape} (every weight) or one "
        "number for each channel of the last axis that is not contracted"
    )


def _by_label(values: np.ndarray, where: np.ndarray, n: int, within: str) -> np.ndarray:
    if within in ("max", "min"):
        fill = -np.inf if within == "max" else np.inf
        out = np.full(n, fill)
        (np.maximum if within == "max" else np.minimum).at(out, where, values)
        return out
    powered = values**2 if within == "l2" else values
    out = np.bincount(where, powered, n)
    if within == "mean":
        return out / np.bincount(where, minlength=n)
    return np.sqrt(out) if within == "l2" else out


def _combine(
    atoms: np.ndarray, values: np.ndarray, count: int, reduce: str
) -> tuple[np.ndarray, np.ndarray]:
    out = np.zeros(count)
    unique, where = np.unique(atoms, return_inverse=True)
    out[unique] = _by_label(values, where, len(unique), reduce)
    scored = np.zeros(count, bool)
    scored[unique] = True
    return out, scored


def normalized(values: np.ndarray, how: str) -> np.ndarray:
    """Scores of one group, made comparable with those of others; see `select_channels`."""
    if how == "none":
        return values
    if how == "standard":
        return (values - values.mean()) / (values.std() or 1.0)
    by = {
        "mean": np.abs(values).mean(),
        "max": np.abs(values).max(),
        "sum": np.abs(values).sum(),
        "l2": np.sqrt((values**2).sum()),
    }[how]
    return values / (by or 1.0)
