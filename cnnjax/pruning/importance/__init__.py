"""Importance scores: which channels or weights matter. Every score: higher = keep."""

from __future__ import annotations

from cnnjax.pruning.importance.parameters import bn_scale, l1, l2, random
from cnnjax.pruning.importance.registry import get, names, register

__all__ = ["bn_scale", "get", "l1", "l2", "names", "random", "register"]
