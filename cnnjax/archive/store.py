"""Save and load any compressed network: base model, edits and arrays; no pickle, no code.

An archive is a directory::

    manifest.json   format version, the base model (a registry name or an importable factory, and
                    its JSON arguments), the edits, static attributes that were set by hand (mode
                    flags), and name, shape, dtype and CRC-32 of every array
    arrays/         the arrays, an Orbax checkpoint

Loading makes the base model's structure (no numbers), replays the edits on it and puts the arrays
in. Registry models load freely. A factory of yours is imported and called only when you say so:
``load(path, trust={"my.module:make"})`` or ``load(path, factory=make)``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx

import cnnjax
from cnnjax import surgery
from cnnjax.archive import arrays
from cnnjax.archive.arrays import ArchiveError
from cnnjax.errors import did_you_mean
from cnnjax.surgery.encode import encode
from cnnjax.surgery.record import ATTRIBUTE, Record, dumps, record_of

FORMAT = "cnnjax"
VERSION = 1

Factory = Callable[..., Any]


def save(
    path: str | os.PathLike[str],
    model: nnx.Module,
    *,
    factory: str | Factory | None = None,
    kwargs: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Saves a model, however compressed, as an archive.

    The archive is checked before it is written: the base model is made again (structure only), the
    edits are replayed, and the result must be the model.

    Args:
      path: the directory to write.
      model: a model from ``cnnjax.models.create`` or from a factory of yours, and what surgery made
        of it.
      factory: for a model of your own, the function that makes the unedited model:
        ``"package.module:function"`` or the function itself. Called with ``kwargs``, and with
        ``rngs=`` if it takes that.
      kwargs: JSON-able keyword arguments of ``factory``.
      metadata: anything JSON-able to keep with the model, e.g. its accuracy.
      overwrite: replace an archive that exists; it stays whole until the new one is complete.

    Returns:
      The path.

    Raises:
      FileExistsError: if ``path`` exists and ``overwrite`` is False.
      ArchiveError: if the base is unknown, or the model was changed by other means than surgery.
    """
    path = pathlib.Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    if path.exists() and not (path / "manifest.json").is_file():
        raise FileExistsError(f"{path} exists and is not an archive; it is not overwritten")
    base, maker = _base_for_saving(model, factory, kwargs)
    edits = surgery.edits_of(model)
    try:
        again = surgery.replay(_make_abstract(maker, base["kwargs"]), edits)
    except (ValueError, KeyError) as error:
        raise ArchiveError(f"the model's edits cannot be replayed: {error}") from error
    problems, settings = surgery.differences(model, again)
    if problems:
        raise ArchiveError(
            f"the model is not what its factory {base['factory']!r} and {len(edits)} recorded "
            f"edits make ({len(problems)} differences): {'; '.join(problems[:5])}. Change models "
            "with cnnjax.surgery only, or pass factory= and kwargs= of the unedited model"
        )
    values, entries = arrays.collect(model)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "made_with": {"cnnjax": cnnjax.__version__, "jax": jax.__version__},
        "base": base,
        "edits": edits,
        "settings": {p: {k: encode(v) for k, v in s.items()} for p, s in settings.items()},
        "arrays": entries,
        "metadata": dict(metadata or {}),
    }
    text = dumps(manifest)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        made = scratch / "new"
        made.mkdir()
        (made / "manifest.json").write_text(json.dumps(json.loads(text), indent=1))
        if values:
            arrays.write(made / "arrays", values)
        _swap(made, path, scratch / "old")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _swap(made: pathlib.Path, path: pathlib.Path, old: pathlib.Path) -> None:
    if not path.exists():
        os.rename(made, path)
        return
    os.rename(path, old)
    try:
        os.rename(made, path)
    except BaseException:
        os.rename(old, path)
        raise


def load(
    path: str | os.PathLike[str],
    *,
    trust: Collection[str] = (),
    factory: Factory | None = None,
) -> Any:
    """Loads a model that `save` wrote.

    Args:
      path: the archive.
      trust: names ``"package.module:function"`` of factories that may be imported and called.
      factory: the factory itself, for an archive of a model of your own.

    Returns:
      The NNX module, with the mode flags that it had, ready to run or to train further.

    Raises:
      FileNotFoundError: if there is no archive, or a file of it is missing.
      ArchiveError: for another format version, an unknown model, a factory that is not trusted,
        and arrays that are damaged or don't fit the model.
    """
    path = pathlib.Path(path)
    manifest = read_manifest(path)
    base = manifest["base"]
    maker = factory if factory is not None else _resolve(base["factory"], trust)
    try:
        model = surgery.replay(_make_abstract(maker, base["kwargs"]), manifest["edits"])
        surgery.set_statics(model, manifest["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArchiveError(
            f"{path}: the model {base['factory']!r} cannot be made again: {error}"
        ) from error
    values = arrays.read(path, model, manifest["arrays"])
    model = surgery.map_leaves(model, lambda name, _: values[name])
    edits = tuple(dumps(edit) for edit in manifest["edits"])
    registered = ":" not in base["factory"]
    if edits or not registered:
        setattr(model, ATTRIBUTE, Record("" if registered else dumps(base), edits))
    return model


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The archive's manifest as data: base, edits, settings, arrays, metadata. Runs nothing.

    Raises:
      FileNotFoundError: if there is no archive at ``path``.
      ArchiveError: if it is no archive of this format and version.
    """
    file = pathlib.Path(path) / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(f"no archive at {path}: {file} is missing")
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise ArchiveError(f"{file} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArchiveError(f"{file} is not the manifest of a cnnjax archive")
    if manifest.get("version") != VERSION:
        raise ArchiveError(
            f"{path} has format version {manifest.get('version')!r}; this cnnjax "
            f"({cnnjax.__version__}) reads version {VERSION}. Install the cnnjax that wrote it "
            f"({manifest.get('made_with', {}).get('cnnjax')}) or save it again"
        )
    missing = [k for k in ("base", "edits", "settings", "arrays") if k not in manifest]
    if missing:
        raise ArchiveError(f"{file} lacks {', '.join(missing)}")
    return manifest


def _base_for_saving(
    model: nnx.Module, factory: str | Factory | None, kwargs: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Factory]:
    if factory is None:
        if kwargs is not None:
            raise TypeError("kwargs= belongs to factory=, which is missing")
        base = surgery.base_of(model)
        if base is None:
            raise ArchiveError(
                "where the model came from is unknown. Make it with cnnjax.models.create, or pass "
                'factory="package.module:function" and its kwargs='
            )
        return base, _resolve(base["factory"], {base["factory"]})
    if callable(factory):
        name = f"{factory.__module__}:{factory.__qualname__}"
        maker = factory
        if "<locals>" in name or "<lambda>" in name:
            raise ArchiveError(f"{name} cannot be imported; use a function at a module's top level")
    else:
        name = factory
        if ":" not in name:
            raise ArchiveError(f'factory {name!r} is not of the form "package.module:function"')
        maker = _resolve(name, {name})
    base = {"factory": name, "kwargs": dict(kwargs or {})}
    known = record_of(model).base
    if known and json.loads(known) != json.loads(dumps(base)):
        raise ArchiveError(f"the model came from {known}, not from {base}")
    return json.loads(dumps(base)), maker


def _resolve(name: str, trust: Collection[str]) -> Factory:
    if ":" not in name:
        # by name, because the registry lives on a floor above; it holds only what is installed
        models = importlib.import_module("cnnjax.models")
        if name not in models.names():
            raise ArchiveError(
                f"unknown model {name!r} in the registry.{did_you_mean(name, models.names())}"
            )
        return lambda **fields: models.abstract(name, **fields)
    if name not in ({trust} if isinstance(trust, str) else trust):
        raise ArchiveError(
            f"the archive's model is made by {name!r}, which is not trusted; loading would import "
            f"and run it. If you know it, pass trust={{{name!r}}} or factory="
        )
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ArchiveError(f"the factory {name!r} cannot be imported: {error}") from error
    return found


def _make_abstract(maker: Factory, kwargs: Mapping[str, Any]) -> nnx.Module:
    def make() -> Any:
        takes_rngs = "rngs" in inspect.signature(maker).parameters and "rngs" not in kwargs
        return maker(**kwargs, **({"rngs": nnx.Rngs(0)} if takes_rngs else {}))

    try:
        return nnx.eval_shape(make)
    except jax.errors.ConcretizationTypeError:
        # the factory looks at its numbers; make them, and drop them
        return surgery.abstract(make())
