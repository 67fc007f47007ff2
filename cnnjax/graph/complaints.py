"""What a failed label check says, and the check of shapes that comes first."""

from __future__ import annotations

import traceback

import numpy as np

from cnnjax.errors import did_you_mean
from cnnjax.graph.network import Graph
from cnnjax.graph.types import LabelError


def where(error: BaseException) -> str:
    """The user's line in an exception's traceback."""
    cause = error.__cause__ or error
    found = ""
    for frame in traceback.extract_tb(cause.__traceback__):
        name = frame.filename.replace("\\", "/")
        if all(s not in name for s in ("/jax/", "/flax/", "/cnnjax/graph/", "/cnnjax/ops/")):
            found = f" at {'/'.join(name.split('/')[-3:])}:{frame.lineno} ({frame.name})"
    return found


def hints(graph: Graph) -> str:
    """Lines where channels are cut at numbers that may be hard-coded."""
    lines = [f"{c.reason} at {c.source}" for c in graph.constraints if c.kind == "split"]
    if not lines:
        return ""
    return "; channels are cut by numbers that may not follow the width: " + ", ".join(lines[:6])


def same_variables(graph: Graph, shapes: dict[str, tuple[int, ...]], alive: np.ndarray) -> None:
    """Raises unless these are the variables that a decision leaves, in their new shapes."""
    for path in graph.shapes:
        if path not in shapes:
            raise LabelError(f"the shrunk network has no {path!r}.{did_you_mean(path, shapes)}")
    kept = graph.layout.kept(alive).tolist()
    at = graph.layout.index
    for path, shape in shapes.items():
        if path not in graph.shapes:
            raise LabelError(f"the shrunk network has a new variable {path!r}")
        first = at[path, 0] if len(graph.shapes[path]) else 0
        want = tuple(kept[first : first + len(graph.shapes[path])])
        if want != tuple(shape):
            raise LabelError(f"{path} has shape {shape}, the kept channels ask for {want}")
