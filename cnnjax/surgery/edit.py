"""Edits of a model: rebuild with other leaves, replace a module, remove a block, replay.

Each takes a model and gives a new one; the input keeps its variables and its attributes. Each
leaves a JSON-able edit on the result, so that the result can be saved without code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import cnnjax
from cnnjax.errors import did_you_mean
from cnnjax.surgery import layers, walk
from cnnjax.surgery.describe import Identity, build, describe
from cnnjax.surgery.encode import NotEncodable, decode, encode
from cnnjax.surgery.record import ATTRIBUTE, Record, add_edit, copy_record, dumps, record_of

PyTree = Any
Replay = Callable[..., nnx.Module]

_KINDS: dict[str, Replay] = {}


def edit(kind: str) -> Callable[[Replay], Replay]:
    """Decorator that registers how an edit of this kind is replayed.

    The function gets a model with abstract leaves and the edit's payload as keyword arguments, and
    returns the edited model, abstract too. It must not run anything that the payload names other
    than registered things. A kind of another room is named ``"<room>.<kind>"``: loading imports
    ``cnnjax.<room>`` to find it.

    Raises:
      ValueError: if the kind is taken by another function.
    """

    def put(fn: Replay) -> Replay:
        known = _KINDS.get(kind)
        if known is not None and known.__qualname__ != fn.__qualname__:
            raise ValueError(f"the edit kind {kind!r} is taken by {known.__qualname__}")
        _KINDS[kind] = fn
        return fn

    return put


def kinds() -> tuple[str, ...]:
    """The registered edit kinds."""
    return tuple(sorted(_KINDS))


def rebuild(
    model: nnx.Module | walk.Parts,
    leaves: Mapping[str, Any],
    *,
    static: Mapping[str, Mapping[str, Any]] | None = None,
    why: str = "rebuild",
    abstract: bool = False,
) -> nnx.Module:
    """A new model with other leaves and the static attributes that follow from them.

    Args:
      model: any NNX module (or what `parts` made of it); untouched.
      leaves: ``{path: array}`` (or ``ShapeDtypeStruct``) of the variables that change, of any shape
        with the same rank and dtype.
      static: ``{module path: {attribute: value}}`` to set where the shapes alone don't say it, e.g.
        the ``feature_group_count`` after whole groups were removed.
      why: a word for the record, e.g. ``"shrink"``.
      abstract: give the result ``ShapeDtypeStruct`` leaves throughout; `fill` puts numbers in.

    Returns:
      The new model. Its edit ``"rebuild"`` holds the new shapes and attributes.

    Raises:
      KeyError: if a path names no variable or module; lists near matches.
      ValueError: if a leaf has another rank or dtype, or a layer can't take its new shape, or its
        type is unknown and would go stale (see `register`).
    """
    taken = model if isinstance(model, walk.Parts) else walk.parts(model)
    old = taken.leaves
    for path, leaf in leaves.items():
        if path not in old:
            raise KeyError(f"no variable at {path!r}.{did_you_mean(path, old)}")
        if len(leaf.shape) != len(old[path].shape):
            raise ValueError(
                f"{path}: the new array has shape {tuple(leaf.shape)}, the old one "
                f"{tuple(old[path].shape)}; the rank must stay"
            )
        if leaf.dtype != old[path].dtype:
            raise ValueError(f"{path}: dtype {leaf.dtype}, expected {old[path].dtype}")
    after = {**old, **leaves}
    if abstract:
        after = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in after.items()}
    new, found = taken.build_modules(after)
    changed = layers.mend(new, old, after, static, found)
    shapes = {
        p: list(map(int, leaf.shape))
        for p, leaf in leaves.items()
        if tuple(leaf.shape) != tuple(old[p].shape)
    }
    if shapes or changed:
        add_edit(new, "rebuild", shapes=shapes, static=_encode_static(changed), why=why)
    return new


def fill(model: nnx.Module, leaves: Mapping[str, Any]) -> nnx.Module:
    """A new model with the same structure and record and other leaves of the same shapes.

    Args:
      model: e.g. the abstract result of a `rebuild`; untouched.
      leaves: ``{path: array}``; leaves that it lacks stay as they are.
    """
    return walk.map_leaves(model, lambda path, leaf: leaves.get(path, leaf))


@edit("rebuild")
def _replay_rebuild(
    model: nnx.Module, *, shapes: dict[str, list[int]], static: dict[str, Any], why: str = ""
) -> nnx.Module:
    known = walk.leaves(model)
    for path in shapes:
        if path not in known:
            raise ValueError(f"the edit changes {path!r}, which the model does not have")
    out = walk.map_leaves(
        model,
        lambda path, leaf: jax.ShapeDtypeStruct(
            tuple(shapes[path]) if path in shapes else leaf.shape, leaf.dtype
        ),
    )
    set_statics(out, static)
    return out


def _encode_static(static: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {p: {k: encode(v) for k, v in attrs.items()} for p, attrs in static.items()}


def set_statics(model: nnx.Module, static: Mapping[str, Mapping[str, Any]]) -> None:
    """Sets encoded static attributes, ``{module path: {name: JSON}}``, in place.

    Raises:
      ValueError: if there is no such module.
    """
    found = walk.modules(model)
    for path, attrs in static.items():
        if path not in found:
            raise ValueError(f"no module at {path!r}.{did_you_mean(path, found)}")
        for name, value in attrs.items():
            setattr(found[path], name, decode(value))


def replace(
    model: nnx.Module,
    path: str,
    module: Any,
    *,
    record: Mapping[str, Any] | None = None,
) -> nnx.Module:
    """A new model with ``module`` in the place of the one at ``path``.

    Args:
      model: any NNX module; untouched.
      path: the path of a module, e.g. ``"layer1/0/conv2"``.
      module: the new module (copied), or a public activation function.
      record: the edit to record, ``{"kind": ..., **payload}``, for kinds that know how to replay
        themselves; by default the new module is described by `describe`. Where that is impossible
        the edit is recorded as opaque: the model works, and saving it says what to register.

    Raises:
      KeyError: if there is no module at ``path``; lists near matches.
    """
    if path == "":
        raise KeyError("the root cannot be replaced; use the new module itself")
    walk.module_at(model, path)
    if record is not None:
        payload = dict(record)
        if "kind" not in payload:
            raise ValueError("record= needs a 'kind'")
    else:
        try:
            payload = {"kind": "replace", "path": path, "module": describe(module)}
        except NotEncodable as error:
            payload = {"kind": "opaque", "path": path, "reason": str(error)}
    out = _put(model, path, module)
    add_edit(out, payload.pop("kind"), **payload)
    return out


def _put(model: nnx.Module, path: str, module: Any) -> nnx.Module:
    out = walk.copy(model)
    if isinstance(module, nnx.Module):
        module = walk.copy(module)
    *parents, last = path.split("/")
    parent: Any = out
    for part in parents:
        parent = _child(parent, part)
    if isinstance(parent, nnx.List | list):
        parent[int(last)] = module
    elif isinstance(parent, nnx.Dict | dict):
        parent[last] = module
    else:
        # a later assignment of the same kind (data or static) is what NNX expects
        setattr(parent, last, module if isinstance(module, nnx.Module) else nnx.static(module))
    return out


def _child(parent: Any, part: str) -> Any:
    if isinstance(parent, nnx.List | list | tuple):
        return parent[int(part)]
    if isinstance(parent, nnx.Dict | dict):
        return parent[part]
    return getattr(parent, part)


@edit("replace")
def _replay_replace(model: nnx.Module, *, path: str, module: dict[str, Any]) -> nnx.Module:
    return _put(model, path, build(module))


@edit("opaque")
def _replay_opaque(model: nnx.Module, *, path: str, reason: str) -> nnx.Module:
    raise ValueError(f"the module put at {path!r} cannot be made again: {reason}")


def remove(model: nnx.Module, path: str) -> nnx.Module:
    """A new model without the block at ``path``: an `Identity` stands there.

    Only right where the block maps its first input to something of the same shape, as a residual
    block without projection does; `cnnjax.pruning.removable_blocks` finds those.

    Raises:
      KeyError: if there is no module at ``path``; lists near matches.
    """
    return replace(model, path, Identity())


def replay(model: nnx.Module, edits: Sequence[Mapping[str, Any]]) -> nnx.Module:
    """Applies recorded edits to an abstract base model.

    Args:
      model: the base model, abstract or not; untouched.
      edits: what `edits_of` gave.

    Returns:
      The edited model with ``ShapeDtypeStruct`` leaves and the same record.

    Raises:
      ValueError: for an unknown kind, or an edit that does not fit the model.
    """
    base = record_of(model).base
    out = walk.abstract(model)
    copy_record(model, out)
    for entry in edits:
        payload = dict(entry)
        kind = payload.pop("kind", None)
        if kind not in _KINDS:
            _import_room(str(kind))
        if kind not in _KINDS:
            raise ValueError(
                f"unknown edit kind {kind!r}.{did_you_mean(str(kind), _KINDS)} "
                "Import the module that registers it first"
            )
        try:
            out = _KINDS[kind](out, **payload)
        except TypeError as error:
            raise ValueError(f"edit {kind!r} does not fit: {error}") from error
    out = walk.abstract(out)
    setattr(out, ATTRIBUTE, Record(base, tuple(dumps(dict(entry)) for entry in edits)))
    return out


def _import_room(kind: str) -> None:
    room = kind.partition(".")[0]
    if "." in kind and room in cnnjax._ROOMS:
        importlib.import_module(f"cnnjax.{room}")


def take(leaf: Any, axes: Mapping[int, Any]) -> Any:
    """Slices a leaf along axes: ``{axis: kept positions}``; works on abstract leaves too.

    Concrete arrays are sliced on the host (one compilation per shape would cost more) and go back
    to where they were.
    """
    axes = {axis % len(leaf.shape): np.asarray(kept, np.int64) for axis, kept in axes.items()}
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = tuple(len(axes[i]) if i in axes else n for i, n in enumerate(leaf.shape))
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    if isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "is_fully_addressable", True):
        for axis, kept in axes.items():
            leaf = jnp.take(leaf, kept, axis=axis)
        return leaf
    out = np.asarray(leaf)
    for axis, kept in axes.items():
        out = np.take(out, kept, axis=axis)
    if not isinstance(leaf, jax.Array):
        return out
    if leaf.sharding.is_fully_replicated:
        return jax.device_put(out, leaf.sharding)
    return jnp.asarray(out)
