"""Walking a module: its modules by path, their own leaves and static attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from cnnjax.errors import did_you_mean
from cnnjax.surgery.record import ATTRIBUTE
from cnnjax.tree import flatten, path_string

Shape = tuple[int, ...]


def modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """``{path: module}``, children before their parents; the root has the path ``""``."""
    return {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model)}


def module_at(model: nnx.Module, path: str) -> nnx.Module:
    """The module at a path such as ``"blocks/3/conv1"``.

    Raises:
      KeyError: if there is none; lists near matches.
    """
    found = modules(model)
    if path not in found:
        raise KeyError(f"no module at {path!r}.{did_you_mean(path, [p for p in found if p])}")
    return found[path]


def leaves(model: nnx.Module) -> dict[str, Any]:
    """``{path: array or ShapeDtypeStruct}`` of every variable of the model."""
    return flatten(nnx.state(model))


def by_module(all_leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``{module path: {path within the module: leaf}}``, for every module on the way to a leaf."""
    out: dict[str, dict[str, Any]] = {"": dict(all_leaves)}
    for path, leaf in all_leaves.items():
        parts = path.split("/")
        for i in range(1, len(parts)):
            out.setdefault("/".join(parts[:i]), {})["/".join(parts[i:])] = leaf
    return out


def statics(module: nnx.Module) -> dict[str, Any]:
    """The module's own static attributes: everything that is neither module, variable nor array."""
    return {
        name: value
        for name, value in vars(module).items()
        if not (name.startswith("_pytree__") or name == ATTRIBUTE or nnx.is_data(value))
        # a bare array of an abstract model
        and not isinstance(value, jax.ShapeDtypeStruct)
    }


def map_leaves(model: nnx.Module, fn: Callable[[str, Any], Any]) -> nnx.Module:
    """A new module of the same structure whose leaves are ``fn(path, leaf)``.

    No variable of the input is shared with the result.
    """
    graphdef, state = nnx.split(model)
    # the map rebuilds every variable: nnx.merge(graphdef, state) alone would share them
    state = jax.tree_util.tree_map_with_path(
        lambda keypath, leaf: fn(path_string(keypath), leaf), state
    )
    return nnx.merge(graphdef, state)


def abstract(model: nnx.Module) -> nnx.Module:
    """The same module with ``ShapeDtypeStruct`` leaves: structure without memory."""
    return map_leaves(model, lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def copy(model: nnx.Module) -> nnx.Module:
    """A new module with its own variables; the arrays, which are immutable, are shared."""
    return map_leaves(model, lambda _, leaf: leaf)
