"""From a mask with whole zero groups to the decision that removes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnjax import tree
from cnnjax.graph import Graph
from cnnjax.pruning.keep import Keep

PyTree = Any


def dead_channels(graph: Graph, mask: PyTree) -> Keep:
    """The decision without the channels that a mask has silenced.

    A channel goes when everything that makes it is masked (kernels, biases and scales: with an
    activation that maps 0 to 0 it is 0), or everything that reads it is. Structured penalties,
    gates and group operators end here; `shrink` then makes the network really smaller. One channel
    of every group stays.

    Args:
      graph: of the network.
      mask: bool tree of the parameters (any subset of their leaves; others count as alive).

    Raises:
      KeyError: a path that names no variable.
      ValueError: a mask of another shape than its variable.
    """
    flat = {p: np.asarray(m) for p, m in tree.flatten(mask).items()}
    for path, m in flat.items():
        if path not in graph.shapes:
            raise KeyError(f"the mask has {path!r}, which is no variable of the graph")
        if m.shape != tuple(graph.shapes[path]):
            raise ValueError(
                f"the mask of {path!r} has shape {m.shape}, expected {tuple(graph.shapes[path])}"
            )
    makes, reads = (np.zeros(graph.num_atoms, bool) for _ in range(2))
    read_at_all = np.zeros(graph.num_atoms, bool)
    for group in graph.groups:
        for path, axis in group.members:
            one = graph.axes[path, axis]
            side = reads if one.consumer else makes
            if one.consumer:
                read_at_all[one.atoms] = True
            if path not in flat:
                # running statistics make nothing; an unmasked parameter does
                if one.consumer or path.rpartition("/")[2] not in ("mean", "var"):
                    side[one.atoms] = True
                continue
            if one.table is not None:
                side[one.atoms] = True
                continue
            others = tuple(a for a in range(flat[path].ndim) if a != axis)
            on = flat[path].any(axis=others) if others else flat[path]
            labels = one.labels[on]
            side[labels[labels >= 0]] = True
    alive = graph.alive()
    for group in graph.groups:
        mine = group.atoms
        stay = makes[mine] & (reads[mine] | ~read_at_all[mine])
        if not stay.any():
            stay[0] = True
        alive[mine] &= stay
    return Keep.of(graph, alive)
