"""What a network is: channel groups, layers, adjacency, cost, capture; read off its jaxpr."""

from __future__ import annotations

from cnnjax.graph.capture import capture, captured_program
from cnnjax.graph.check import label_check
from cnnjax.graph.network import Graph
from cnnjax.graph.profile import LayerCost, Profile, profile
from cnnjax.graph.timing import Energy, Latency, energy, latencies, latency, proxy_energy
from cnnjax.graph.tracing import trace, trace_fn
from cnnjax.graph.types import (
    FIXED,
    Axis,
    Constraint,
    Fixed,
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
    "Energy",
    "Fixed",
    "Graph",
    "GraphError",
    "Group",
    "LabelError",
    "Latency",
    "Layer",
    "LayerCost",
    "Profile",
    "Source",
    "capture",
    "captured_program",
    "energy",
    "label_check",
    "latencies",
    "latency",
    "profile",
    "proxy_energy",
    "trace",
    "trace_fn",
]
