"""Run configurations: frozen dataclasses inside, ml_collections in config files, dotted overrides.

A config file defines ``get_config() -> ConfigDict``; `config_dict` makes one that holds every
setting with its default, so that ``--config.stages.prune.sparsity=0.95`` has something to
override and a typo has a neighbour to suggest.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import pathlib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from cnnjax.data import Augment
from cnnjax.errors import did_you_mean
from cnnjax.pipeline import registry


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images.

    Attributes:
      name: TFDS name.
      data_dir: folder of prepared data; empty: ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      train: split, slices allowed (``"train[:90%]"``).
      test: split that accuracies are measured on.
      batch_size: over all processes.
      eval_batch_size: over all processes.
      augment: see `cnnjax.data.Augment`.
      workers: parallel readers.
    """

    name: str = "digits"
    data_dir: str = ""
    train: str = "train"
    test: str = "test"
    batch_size: int = 128
    eval_batch_size: int = 500
    augment: Augment = dataclasses.field(default_factory=Augment)
    workers: int = 2


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which network.

    Attributes:
      name: of the registry, see ``cnnjax.models.names()``.
      fields: its configuration; number of classes, channels and image size come from the data
        unless they are given here.
    """

    name: str = "plain_cnn"
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A compression run.

    Attributes:
      name: of the run, in reports.
      model: the network to start from.
      data: the images.
      stages: ``{name: stage}`` in order.
      seeds: one whole run for each; results are reported as mean, min and max.
      data_parallel: use all devices of all processes.
      tune_forms: measure on the device which form each convolution of training and evaluation runs
        fastest in, before the first step (`cnnjax.ops.tune`); ``forms.json`` in the work folder
        keeps them. One process only.
      note: free text for the result file.
      expected: published figures to show beside the measured ones, by stage:
        ``{"error": fraction, "compression": ratio, "source": text}``.
    """

    name: str
    stages: Mapping[str, Any]
    model: ModelSpec = ModelSpec()
    data: DataConfig = DataConfig()
    seeds: tuple[int, ...] = (0,)
    data_parallel: bool = True
    tune_forms: bool = False
    note: str = ""
    expected: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a run needs at least one stage")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be distinct integers >= 0, got {self.seeds}")


def config_dict(
    name: str,
    *,
    model: ModelSpec,
    data: DataConfig,
    stages: Mapping[str, Any],
    seeds: Sequence[int] = (0,),
    note: str = "",
    expected: Mapping[str, Any] | None = None,
) -> Any:
    """The ml_collections ConfigDict of a run, every setting included.

    Args:
      name: of the run.
      model: the network.
      data: the images.
      stages: ``{name: stage dataclass instance}`` in order.
      seeds: of the runs.
      note: free text.
      expected: published figures by stage, see `RunConfig`.
    """
    run = RunConfig(
        name=name,
        stages=dict(stages),
        model=model,
        data=data,
        seeds=tuple(seeds),
        note=note,
        expected=dict(expected or {}),
    )
    return _nested(to_plain(run))


def _nested(plain: Mapping[str, Any]) -> Any:
    """ConfigDicts all the way down that keep the order of their keys (stages run in order)."""
    import ml_collections

    return ml_collections.ConfigDict(
        {k: _nested(v) if isinstance(v, Mapping) else v for k, v in plain.items()},
        sort_keys=False,
    )


def to_plain(value: Any) -> Any:
    """Nested plain dicts of a configuration; a stage carries its kind under ``"stage"``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = registry.kind_of(type(value))
        return {"stage": kind, **out} if kind else out
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(to_plain(v) for v in value)
    return value


def from_config(config: Any) -> RunConfig:
    """The validated `RunConfig` of a ConfigDict or a plain dict.

    Raises:
      ValueError: an unknown key (with the right one suggested), stage or value.
      TypeError: a value of the wrong type, named by its dotted key.
    """
    plain = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    stages = plain.get("stages", {})
    if not isinstance(stages, Mapping):
        raise TypeError(f"stages must map names to stages, got {type(stages).__name__}")
    plain["stages"] = {}
    built = {}
    for name, fields in stages.items():
        fields = dict(fields)
        kind = fields.pop("stage", name)
        built[name] = _build(registry.get(kind), fields, f"stages.{name}")
    plain["stages"] = built
    return _build(RunConfig, plain, "")


def _build(cls: type, fields: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    values = {}
    for key, value in fields.items():
        if key not in known:
            raise ValueError(f"unknown config key {prefix}{key}.{did_you_mean(key, known)}")
        values[key] = _coerce(value, hints[key], prefix + key)
    required = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [
        prefix + n
        for n, f in known.items()
        if n not in values and (f.default, f.default_factory) == required
    ]
    if missing:
        raise ValueError(f"missing config key {missing[0]}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where or 'config'}: {error}") from error


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        errors = []
        # exact types first: 1 stays an int where both int and float are allowed
        for option in sorted(args, key=lambda a: a is not type(value)):
            try:
                return _coerce(value, option, where)
            except (TypeError, ValueError) as error:
                errors.append(error)
        raise errors[0]
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        if isinstance(value, Mapping):
            return _build(typing.cast(type, hint), value, where)
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif origin in (tuple, list, Sequence):
        if isinstance(value, list | tuple):
            if len(args) == 2 and args[1] is not Ellipsis and len(value) != 2:
                raise TypeError(f"config key {where} needs 2 values, got {value!r}")
            return tuple(_coerce(v, args[0], where) for v in value)
    elif origin is not None and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return {k: _coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
    elif isinstance(value, origin or hint):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise TypeError(f"config key {where} must be {name}, got {type(value).__name__} {value!r}")


def apply_overrides(config: Any, overrides: Sequence[tuple[str, str]]) -> None:
    """Sets dotted keys of a ConfigDict from text, in place.

    Text is read as a Python literal where it is one (``1e-3``, ``(1, 2)``, ``None``, ``True``) and
    as a string otherwise; a key that holds a string takes the text as it is.

    Args:
      config: a ConfigDict.
      overrides: pairs like ``("stages.prune.sparsity", "0.95")``.

    Raises:
      ValueError: a key that does not exist, with the right one suggested.
    """
    for dotted, text in overrides:
        node, done = config, []
        *parents, last = dotted.split(".")
        for part in [*parents, last]:
            if not hasattr(node, "keys"):
                raise ValueError(f"config key {'.'.join(done)} is a value, it has no {part!r}")
            if part not in node:
                where = ".".join([*done, part])
                every = [k for k in _dotted(config) if k.endswith("." + part) or k == part]
                hint = did_you_mean(part, list(node.keys()))
                if every and not hint.startswith(" Did"):
                    hint = f" Did you mean {every[0]!r}?"
                raise ValueError(f"unknown config key {where}.{hint}")
            done.append(part)
            if part is not last or len(done) <= len(parents):
                node = node[part]
        old = node[last]
        if hasattr(old, "keys"):
            raise ValueError(
                f"config key {dotted} is a group of settings; set one of "
                + ", ".join(f"{dotted}.{k}" for k in list(old.keys())[:8])
            )
        with config.ignore_type():
            node[last] = text if isinstance(old, str) else _literal(text)


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _dotted(config: Any, prefix: str = "") -> list[str]:
    out = []
    for key in config.keys():  # noqa: SIM118  (a ConfigDict)
        out.append(prefix + key)
        if hasattr(config[key], "keys"):
            out += _dotted(config[key], f"{prefix}{key}.")
    return out


def load_config(path: str | os.PathLike[str]) -> Any:
    """The ConfigDict of a config file.

    Raises:
      FileNotFoundError: no such file; names the ones beside it.
      ValueError: the file has no ``get_config``.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        beside = [p.as_posix() for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise FileNotFoundError(f"no config file {path}.{did_you_mean(file.as_posix(), beside)}")
    spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in a config file look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"config file {path} defines no get_config()")
    return module.get_config()
