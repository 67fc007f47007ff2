"""The registry of importance scores; every score: higher = keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cnnjax.errors import did_you_mean

Score = Callable[..., Any]
_SCORES: dict[str, Score] = {}


def register(name: str) -> Callable[[Score], Score]:
    """Decorator that registers a score under a name.

    A score takes the parameters first, then what else it needs, and returns scores for
    `cnnjax.pruning.select_channels`: a nested dict of any subset of the parameters' paths, each
    leaf of the parameter's shape or one number for each output channel; higher = keep.

    Raises:
      ValueError: if the name is taken by another function.
    """

    def put(fn: Score) -> Score:
        known = _SCORES.get(name)
        if known is not None and known.__qualname__ != fn.__qualname__:
            raise ValueError(f"the score {name!r} is registered already")
        _SCORES[name] = fn
        return fn

    return put


def get(name: str) -> Score:
    """The score of a name.

    Raises:
      ValueError: if there is none; lists near matches.
    """
    if name not in _SCORES:
        raise ValueError(f"unknown score {name!r}.{did_you_mean(name, _SCORES)}")
    return _SCORES[name]


def names() -> tuple[str, ...]:
    """The registered scores."""
    return tuple(sorted(_SCORES))
