"""What a network is: channel groups, layers, adjacency, cost, capture; read off its jaxpr."""

from __future__ import annotations

from cnnjax.graph.types import (
    FIXED,
    Axis,
    Constraint,
    Fixed,
    Graph,
    GraphError,
    Group,
    LabelError,
    Layer,
    Source,
)

__all__ = [
    "FIXED",
    "Axis",
    "Constraint",
    "Fixed",
    "Graph",
    "GraphError",
    "Group",
    "LabelError",
    "Layer",
    "Source",
]
