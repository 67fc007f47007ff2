"""cnnjax makes any Flax CNN smaller and faster, and proves it.

The rooms are imported on first use: ``import cnnjax`` alone is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = (
    "coding",
    "data",
    "detection",
    "distillation",
    "factorization",
    "graph",
    "models",
    "ops",
    "pipeline",
    "pruning",
    "report",
    "surgery",
    "training",
    "tree",
)
# public functions that live at the top: name -> module that defines it
_FACES = {
    "profile": "cnnjax.graph",
    "save": "cnnjax.archive",
    "load": "cnnjax.archive",
}

__all__ = [*_ROOMS, *_FACES, "__version__"]

if TYPE_CHECKING:
    from cnnjax import models, tree  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"cnnjax.{name}")
    if name in _FACES:
        return getattr(importlib.import_module(_FACES[name]), name)
    raise AttributeError(f"module 'cnnjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
