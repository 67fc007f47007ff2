"""An NNX module taken apart and put together again: paths, leaves, copies with other leaves.

What `nnx.split` and `nnx.merge` do, for the plain case that every layer of a network is: nodes of
NNX's own kind that hold variables of arrays, bare arrays, other nodes and static attributes. There
it takes a fifth of their time, which for a network of hundreds of layers is more than reading it.
Anything else (containers of JAX's as data, references, hooks for flattening of a class's own) is
left to NNX: `take` says None.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

_STATE = "_pytree__state"
_NODES = "_pytree__nodes"
_HOOKS = ("_graph_node_flatten", "_graph_node_init", "_graph_node_create_empty", "__new__")
_EVALUATION = {"deterministic": True, "use_running_average": True}
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
_PLAIN = (bool, int, float, str, bytes, type(None), types.FunctionType, type, np.ndarray, jax.Array)
_VIEWS: tuple[Any, ...] = (nnx.BatchNorm.set_view,)


class Skeleton:
    """The structure of a module, and its leaves.

    Attributes:
      model: the module that was taken apart.
      leaves: ``{path: array or ShapeDtypeStruct}`` in the order of ``nnx.state``.
      kinds: for every leaf the class of its variable, None for a bare array.
      nodes: ``{path: node of model}``, parents before children; the root's path is ``""``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.leaves: dict[str, Any] = {}
        self.kinds: list[Any] = []
        self.nodes: dict[str, Any] = {}
        self._classes: list[type] = []
        self._static: list[dict[str, Any]] = []  # of every node, in NNX's order
        self._kids: list[list[tuple[str, int]]] = []
        self._slots: list[list[tuple[str, int]]] = []  # attributes that are leaves
        self._variables: list[tuple[Any, Any]] = []  # class and metadata of every leaf

    def build(self, leaves: Mapping[str, Any] | Iterable[Any], *, evaluate: bool = False) -> Any:
        """A new module of this structure with other leaves; shares no variable with the first.

        Args:
          leaves: by path, or all of them in order.
          evaluate: put the new module in evaluation mode, as ``nnx.view`` would.
        """
        made = self._make(leaves)
        if evaluate:
            for node, cls in zip(made, self._classes):
                set_evaluation(node, cls)
        return made[0]

    def build_nodes(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """`build`, with all nodes of the new module: ``{path: node}``, parents before children."""
        return dict(zip(self.nodes, self._make(leaves)))

    def _make(self, leaves: Mapping[str, Any] | Iterable[Any]) -> list[Any]:
        given = [leaves[p] for p in self.leaves] if isinstance(leaves, Mapping) else list(leaves)
        held = [
            value if kind is None else kind.from_metadata(value, metadata)
            for value, (kind, metadata) in zip(given, self._variables, strict=True)
        ]
        made = [object.__new__(cls) for cls in self._classes]
        for node, static, kids, slots in zip(made, self._static, self._kids, self._slots):
            attributes = node.__dict__
            attributes.update(static)
            state = static[_STATE]
            attributes[_STATE] = type(state)(state.initializing, state.is_setup)
            for name, i in kids:
                attributes[name] = made[i]
            for name, i in slots:
                attributes[name] = held[i]
        return made


def take(model: Any) -> Skeleton | None:
    """Takes an NNX module apart; None where only NNX can."""
    out = Skeleton(model)
    try:
        _visit(model, "", out, {}, {})
    except _Unusual:
        return None
    return out


class _Unusual(Exception):
    """Something that is left to NNX."""


def _visit(
    node: Any, path: str, out: Skeleton, nodes: dict[int, int], leaves: dict[int, int]
) -> int:
    cls = type(node)
    if not _is_plain(cls):
        raise _Unusual
    mine = nodes[id(node)] = len(out._classes)
    static: dict[str, Any] = {}
    kids: list[tuple[str, int]] = []
    slots: list[tuple[str, int]] = []
    out._classes.append(cls)
    out._static.append(static)
    out._kids.append(kids)
    out._slots.append(slots)
    out.nodes[path] = node
    attributes = vars(node)
    if _STATE not in attributes or _NODES not in attributes:
        raise _Unusual
    data = attributes[_NODES]
    prefix = path + "/" if path else ""
    for name in sorted(attributes, key=_order if cls._pytree__has_int_keys else None):
        value = attributes[name]
        static[name] = value
        if name not in data or not data[name] or name == _STATE or value is None:
            continue
        kind = type(value)
        if isinstance(kind, type(nnx.Variable)):
            if (at := leaves.get(id(value))) is None:
                at = leaves[id(value)] = len(out.kinds)
                _leaf(out, prefix + name, value.get_raw_value(), kind, value.get_metadata())
            slots.append((name, at))
        elif isinstance(value, nnx.Pytree):
            at = nodes.get(id(value))
            kids.append(
                (name, _visit(value, prefix + name, out, nodes, leaves) if at is None else at)
            )
        else:
            slots.append((name, len(out.kinds)))
            _leaf(out, prefix + name, value, None, None)
    return mine


def _leaf(out: Skeleton, path: str, value: Any, kind: Any, metadata: Any) -> None:
    if metadata is not None and (metadata.get("hijax") or metadata.get("ref")):
        raise _Unusual
    if not isinstance(value, _ARRAYS) or path in out.leaves:
        raise _Unusual
    out.leaves[path] = value
    out.kinds.append(kind)
    out._variables.append((kind, metadata))


def _order(name: str) -> tuple[int, int, str]:
    try:
        return (0, int(name), "")
    except ValueError:
        return (1, 0, name)


@functools.cache
def _is_plain(cls: type) -> bool:
    """Whether NNX flattens and makes objects of this class in its common way."""
    if not (issubclass(cls, nnx.Pytree) and getattr(cls, "_pytree__is_pytree", False)):
        return False
    return all(getattr(cls, h, None) is getattr(nnx.Pytree, h, None) for h in _HOOKS)


def set_evaluation(node: Any, cls: type) -> None:
    """What ``nnx.view`` would set on a node of this class that is the caller's own."""
    names = view_arguments(cls)
    if names is None:
        return
    if cls.set_view in _VIEWS:  # nothing but this attribute, which is static
        node.__dict__["use_running_average"] = True
        return
    node.set_view(**{k: v for k, v in _EVALUATION.items() if not names or k in names})


def evaluate(model: nnx.Module) -> None:
    """Puts a module that is the caller's own in evaluation mode, in place.

    A view (`nnx.view`) copies the whole module first and looks at every signature, which takes
    longer than a pass through the network.
    """
    for node in nodes(model):
        set_evaluation(node, type(node))


def nodes(model: nnx.Module) -> Iterator[Any]:
    """The module and everything in it that is a node of NNX's, each once."""
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo:
        node = todo.pop()
        if isinstance(node, (*_PLAIN, nnx.Variable)) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, nnx.Pytree):
            yield node
            todo.extend(v for k, v in vars(node).items() if not k.startswith("_pytree__"))
        elif isinstance(node, list | tuple):
            todo.extend(node)
        elif isinstance(node, dict):
            todo.extend(node.values())
        elif (one := jax.tree_util.default_registry.flatten_one_level(node)) is not None:
            todo.extend(one[0])


@functools.cache
def view_arguments(cls: type) -> frozenset[str] | None:
    """The arguments of ``set_view``; empty: any; None: there's no such method."""
    method: Callable[..., Any] | None = getattr(cls, "set_view", None)
    if method is None:
        return None
    found = inspect.signature(method).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in found):
        return frozenset()
    return frozenset(p.name for p in found) | {"self"}
