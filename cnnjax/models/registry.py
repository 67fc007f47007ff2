"""The registry of architectures: names, configurations, creation with and without memory.

Every family lives in its own small file, which registers its variants when it is imported::

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ToyConfig(ModelConfig):      # the base: num_classes, in_channels, dtype, remat
        width: int = 16

    class Toy(Model):                       # cnnjax.models.blocks.Model: input checks, features
        def __init__(self, config: ToyConfig, *, rngs: nnx.Rngs): ...
        def forward(self, x, taps): ...     # taps("stage1", x) names an intermediate map

    register("toy_16", Toy, ToyConfig(), input_shape=(32, 32, 3))

To add a family: write ``cnnjax/models/<family>.py`` so, and add its module name as one line of
``FAMILIES`` in ``cnnjax/models/__init__.py`` (kept sorted, one a line, so that two people can add
lines at once). Nothing is imported before the first look-up. A configuration's field values must be
hashable and JSON-able (numbers, strings, bools, None, tuples of those): they're stored with the
model as its ``provenance``, from which a saved network is rebuilt.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax.errors import did_you_mean
from cnnjax.models import init

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields that every architecture has; a family's configuration extends it.

    Attributes:
      num_classes: width of the logits.
      in_channels: channels of the input image.
      dtype: name of the computation's dtype, e.g. ``"bfloat16"``; parameters and statistics stay
        float32. ``None`` computes in the input's dtype.
      remat: recompute each block's activations in the backward pass instead of storing them.
    """

    num_classes: int = 1000
    in_channels: int = 3
    dtype: str | None = None
    remat: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        check_positive(self, "num_classes", "in_channels")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(_DTYPES)} or None")


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if kinds[-1] is not Ellipsis:
            return len(value) == len(kinds) and all(map(_fits, value, kinds))
        return all(_fits(v, kinds[0]) for v in value)
    allowed = {bool: bool, int: int | np.integer, float: int | float | np.number, str: str}
    if hint not in allowed:
        return True
    return isinstance(value, allowed[hint]) and (hint is bool or not isinstance(value, bool))


def _check_types(config: Any) -> None:
    """Raises ValueError for a field of another type, or a width or number of blocks below 1."""
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            text = getattr(hint, "__name__", str(hint)) if hint in (bool, int, float, str) else hint
            raise ValueError(f"{name} must be {text}, got {value!r}")
        flat = isinstance(value, tuple) and all(isinstance(v, int | np.integer) for v in value)
        if name in ("widths", "stages") and flat and any(v < 1 for v in value):
            raise ValueError(f"{name} must hold numbers >= 1, got {value!r}")


def check_positive(config: Any, *fields: str) -> None:
    """Raises ValueError unless each field is an integer >= 1."""
    for field in fields:
        value = getattr(config, field)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{field} must be an integer >= 1, got {value!r}")


def check_rate(config: Any, *fields: str) -> None:
    """Raises ValueError unless each field is a probability in [0, 1)."""
    for field in fields:
        value = getattr(config, field)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{field} must be in [0, 1), got {value!r}")


def check_choice(config: Any, field: str, options: tuple[Any, ...]) -> None:
    """Raises ValueError unless the field's value is one of ``options``."""
    value = getattr(config, field)
    if value not in options:
        raise ValueError(
            f"{field} {value!r} is not one of {', '.join(map(repr, options))}."
            f"{did_you_mean(str(value), [str(o) for o in options])}"
        )


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a model came from: registry name and every field, hashable (a static attribute)."""

    name: str
    fields: tuple[tuple[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """``{"name": ..., "fields": {...}}``, ready for JSON."""
        return {"name": self.name, "fields": dict(self.fields)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Provenance:
        """The inverse of `as_dict`, also after a round trip through JSON (lists become tuples)."""
        fields = tuple((k, _canonical(k, v)) for k, v in data["fields"].items())
        return cls(data["name"], fields)


@dataclasses.dataclass(frozen=True)
class _Entry:
    build: Callable[..., nnx.Module]
    config: ModelConfig
    input_shape: tuple[int, int, int]


_ENTRIES: dict[str, _Entry] = {}


def register(
    name: str,
    build: Callable[..., nnx.Module],
    config: ModelConfig,
    *,
    input_shape: tuple[int, int, int],
) -> None:
    """Adds a variant.

    Args:
      name: the key, snake_case.
      build: ``build(config, rngs=rngs) -> nnx.Module``, usually the family's class.
      config: the variant's configuration; a user's fields replace its values.
      input_shape: the standard input (H, W, C), without batch.

    Raises:
      ValueError: if the name is taken by another builder or configuration.
    """
    entry = _Entry(build, config, input_shape)
    if _ENTRIES.setdefault(name, entry) != entry:
        raise ValueError(f"model {name!r} is already registered with another configuration")


def _load() -> None:
    for family in importlib.import_module("cnnjax.models").FAMILIES:
        importlib.import_module(f"cnnjax.models.{family}")


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        _load()
    if name not in _ENTRIES:
        raise ValueError(f"unknown model {name!r}.{did_you_mean(str(name), _ENTRIES)}")
    return _ENTRIES[name]


def _canonical(field: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_canonical(field, v) for v in value)
    if field == "dtype" and value is not None and not isinstance(value, str):
        return jnp.dtype(value).name
    return value


def names() -> tuple[str, ...]:
    """The registered model names, sorted."""
    _load()
    return tuple(sorted(_ENTRIES))


def config(name: str, **fields: Any) -> ModelConfig:
    """The frozen configuration of ``name`` with some fields replaced.

    Raises:
      ValueError: unknown name, or a value that the architecture refuses.
      TypeError: unknown field (the message lists near matches).
    """
    base = _entry(name).config
    known = [f.name for f in dataclasses.fields(base)]
    for field in fields:
        if field not in known:
            raise TypeError(f"model {name!r} has no field {field!r}.{did_you_mean(field, known)}")
    return dataclasses.replace(base, **{k: _canonical(k, v) for k, v in fields.items()})


def input_shape(name: str, **fields: Any) -> tuple[int, int, int]:
    """The standard input (H, W, C) of ``name``, without batch; follows ``in_channels`` and, where
    the architecture has it, ``image_size``."""
    cfg = config(name, **fields)
    height, width, _ = _entry(name).input_shape
    size = getattr(cfg, "image_size", None)
    if size is not None:
        height = width = size
    return height, width, cfg.in_channels


def create(name: str, *, rngs: nnx.Rngs, **fields: Any) -> Any:
    """Builds a model with fresh parameters.

    Args:
      name: a registered name, see `names`.
      rngs: streams ``params`` (initialisation) and ``dropout`` (random layers at training).
      **fields: replacements for the configuration's fields, e.g. ``num_classes=10``.

    Returns:
      An ``nnx.Module``: ``model(x)`` maps NHWC images to logits (N, num_classes);
      ``model.provenance`` says how to build it again.

    Raises:
      ValueError: unknown name, or a value that the architecture refuses.
      TypeError: unknown field, or no random streams.
    """
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be random streams, e.g. flax.nnx.Rngs(0), got {rngs!r}")
    cfg = config(name, **fields)
    model = _entry(name).build(cfg, rngs=rngs)
    values = tuple((f.name, getattr(cfg, f.name)) for f in dataclasses.fields(cfg))
    model.provenance = Provenance(name, values)
    return model


class _StillStream(nnx.RngStream):
    """Gives the same key each time, for abstract values.

    A stream that counts stores its counter at each key, which under a trace takes Flax a time that
    grows with everything traced so far: minutes for a deep network.
    """

    def __call__(self) -> Any:
        return self.key[...]

    def fork(self, *, split: Any = None) -> nnx.RngStream:
        """An ordinary stream: what a layer keeps."""
        del split
        return nnx.RngStream(self(), tag=self.tag)


def abstract(name: str, **fields: Any) -> Any:
    """The model with ``ShapeDtypeStruct`` leaves: structure and counts without FLOPs or memory."""

    def build() -> Any:
        rngs = nnx.Rngs(0)
        rngs.default = _StillStream(rngs.default.key[...], tag="default")
        return create(name, rngs=rngs, **fields)

    with init.without_draws():
        return nnx.eval_shape(build)
