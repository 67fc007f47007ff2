"""The registry of stages: what a compression run can be made of.

A stage is a frozen dataclass (its configuration) with one method::

    @stage("halve")
    @dataclasses.dataclass(frozen=True)
    class Halve:
        '''What it does, and its attributes.'''

        ratio: float = 0.5

        def run(self, network: Carry, context: Context) -> Outcome: ...

``run`` maps a network to a network and must be deterministic given ``context.seed``: a killed run
is resumed by calling it again, and `Context.train` continues from its checkpoints. It may also
define ``check(params)``, called with abstract parameters before any work to refuse what cannot fit
(only on the first stages, before the structure changes), ``foresee(known, data, described)``,
which refuses what will not fit later and says what becomes of the network (see `Known`), and set
the class attribute ``restructures = True`` if the returned network has other shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cnnjax.errors import did_you_mean

PyTree = Any
_STAGES: dict[str, type] = {}


@dataclasses.dataclass(frozen=True)
class Carry:
    """What goes from stage to stage.

    Attributes:
      model: NNX module.
      mask: bool tree like its parameters, or None before pruning.
      extras: whatever stages hand on to later ones, by name (a teacher, a codebook).
    """

    model: Any
    mask: PyTree = None
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of the networks before any work.

    Attributes:
      model: abstract NNX module, or None: an earlier stage decides on its shapes.
      teachers: likewise, those that were kept.
    """

    model: Any
    teachers: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage returns.

    Attributes:
      network: the new network.
      metrics: JSON-able numbers of the stage's own.
      curve: points (dicts of numbers) of its progress, e.g. accuracy at each sparsity.
    """

    network: Carry
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def stage(kind: str) -> Callable[[type], type]:
    """Registers a stage's dataclass under a name.

    Raises:
      ValueError: the name is taken, or the class is not a frozen dataclass with ``run``.
    """

    def register(cls: type) -> type:
        frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
        if not frozen or not callable(getattr(cls, "run", None)):
            raise ValueError(f"stage {kind!r} must be a frozen dataclass with a method run")
        if _STAGES.get(kind, cls).__qualname__ != cls.__qualname__:
            raise ValueError(f"stage {kind!r} is already registered")
        _STAGES[kind] = cls
        return cls

    return register


def get(kind: str) -> type:
    """The dataclass of a stage.

    Raises:
      ValueError: unknown kind, with near matches.
    """
    import cnnjax.pipeline.stages  # noqa: F401  (registers the stages)

    if kind not in _STAGES:
        raise ValueError(f"unknown stage {kind!r}.{did_you_mean(str(kind), _STAGES)}")
    return _STAGES[kind]


def kind_of(cls: type) -> str | None:
    """The name under which a class is registered."""
    return next((k for k, v in _STAGES.items() if v is cls), None)


def names() -> tuple[str, ...]:
    """Registered stages, sorted."""
    import cnnjax.pipeline.stages  # noqa: F401

    return tuple(sorted(_STAGES))
