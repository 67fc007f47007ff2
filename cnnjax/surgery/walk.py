"""Walking a module: its modules by path, their own leaves and static attributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from cnnjax.errors import did_you_mean
from cnnjax.modules import Skeleton, take
from cnnjax.surgery.record import ATTRIBUTE
from cnnjax.tree import flatten

Shape = tuple[int, ...]


def modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """``{path: module}``, children before their parents; the root has the path ``""``.

    A module that sits at several places has the path of the first.
    """
    found: dict[str, nnx.Module] = {}
    seen: set[int] = set()

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, nnx.Module):
            if id(node) in seen:
                return
            seen.add(id(node))
            # names in order, as NNX walks them
            for name in sorted(vars(node), key=_order):
                if not name.startswith("_pytree__"):
                    visit(vars(node)[name], (*path, name))
            found["/".join(path)] = node
        elif isinstance(node, list | tuple):
            for i, child in enumerate(node):
                visit(child, (*path, str(i)))
        elif isinstance(node, dict):
            for name, child in node.items():
                visit(child, (*path, str(name)))

    visit(model, ())
    return found


def _order(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdigit() else (1, 0, name)


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
    return parts(model).leaves


def statics(module: nnx.Module) -> dict[str, Any]:
    """The module's own static attributes: everything that is neither module, variable nor array."""
    return {
        name: value
        for name, value in vars(module).items()
        if not (name.startswith("_pytree__") or name == ATTRIBUTE or nnx.is_data(value))
        # a bare array of an abstract model
        and not isinstance(value, jax.ShapeDtypeStruct)
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """A model taken apart once.

    Attributes:
      model: the one taken apart.
      leaves: ``{path: array or ShapeDtypeStruct}`` of its variables.
      skeleton: its structure, or None where NNX has to take it apart:
      split: what ``nnx.split`` gave then.
    """

    model: nnx.Module
    leaves: dict[str, Any]
    skeleton: Skeleton | None
    split: tuple[Any, Any] | None = None

    def build(self, leaves: Mapping[str, Any]) -> nnx.Module:
        """A new module of the same structure; shares no variable with the original."""
        if self.skeleton is not None:
            return self.skeleton.build(leaves)
        assert self.split is not None
        graphdef, state = self.split
        # the unflattening rebuilds every variable: nnx.merge(graphdef, state) would share them
        state = jax.tree.unflatten(jax.tree.structure(state), [leaves[p] for p in self.leaves])
        return nnx.merge(graphdef, state)

    def modules(self) -> Mapping[str, nnx.Module]:
        """The modules of ``model`` by path, children before their parents."""
        return (
            modules(self.model) if self.skeleton is None else _children_first(self.skeleton.nodes)
        )

    def build_modules(
        self, leaves: Mapping[str, Any]
    ) -> tuple[nnx.Module, Mapping[str, nnx.Module]]:
        """`build`, and the modules of the result by path, children before their parents."""
        if self.skeleton is None:
            model = self.build(leaves)
            return model, modules(model)
        made = self.skeleton.build_nodes(leaves)
        return made[""], _children_first(made)


def _children_first(nodes: dict[str, Any]) -> dict[str, nnx.Module]:
    return {p: n for p, n in reversed(nodes.items()) if isinstance(n, nnx.Module)}


def parts(model: nnx.Module) -> Parts:
    """Takes a model apart."""
    skeleton = take(model)
    if skeleton is not None:
        return Parts(model, skeleton.leaves, skeleton)
    graphdef, state = nnx.split(model)
    return Parts(model, flatten(state), None, (graphdef, state))


def map_leaves(model: nnx.Module, fn: Callable[[str, Any], Any]) -> nnx.Module:
    """A new module of the same structure whose leaves are ``fn(path, leaf)``.

    No variable of the input is shared with the result.
    """
    taken = parts(model)
    return taken.build({path: fn(path, leaf) for path, leaf in taken.leaves.items()})


def abstract(model: nnx.Module) -> nnx.Module:
    """The same module with ``ShapeDtypeStruct`` leaves: structure without memory."""
    return map_leaves(model, lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def copy(model: nnx.Module) -> nnx.Module:
    """A new module with its own variables; the arrays, which are immutable, are shared."""
    return map_leaves(model, lambda _, leaf: leaf)
