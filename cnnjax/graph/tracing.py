"""Entry points: from a model, or a function of variables and inputs, to its graph."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax.errors import did_you_mean
from cnnjax.graph import direct
from cnnjax.graph.ledger import Ledger
from cnnjax.graph.network import Graph
from cnnjax.graph.solve import solve
from cnnjax.graph.types import GraphError
from cnnjax.graph.values import opaque
from cnnjax.graph.walk import constant_of, walk
from cnnjax.tree import path_string

PyTree = Any
MODES = ("flexible", "tied", "whole")
DIRECT = True  # whether models are run on labels where possible; False reads every jaxpr


def abstract(tree: PyTree) -> PyTree:
    """Shapes and dtypes of a tree; what isn't an array stays as it is."""

    def leaf(a: Any) -> Any:
        if hasattr(a, "shape") and hasattr(a, "dtype"):
            return jax.ShapeDtypeStruct(a.shape, a.dtype)
        return a

    return jax.tree.map(leaf, tree)


def evaluation_mode(model: nnx.Module) -> nnx.Module:
    """A view of an NNX module in evaluation mode; the module itself is left as it is."""
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


def functional(model: nnx.Module) -> tuple[Callable[..., Any], PyTree]:
    """``(fn, variables)`` of an NNX module in evaluation mode: ``fn(variables, *inputs)``."""
    return functional_parts(*nnx.split(model))


def functional_parts(graphdef: Any, state: PyTree) -> tuple[Callable[..., Any], PyTree]:
    """`functional` of a module that ``nnx.split`` has taken apart already."""

    def fn(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        module = nnx.merge(graphdef, variables, copy=True)
        _evaluate(module)
        return module(*inputs, **kwargs)

    return fn, state


_EVALUATION = {"deterministic": True, "use_running_average": True}
_PLAIN = (bool, int, float, str, bytes, type(None), types.FunctionType, type, np.ndarray, jax.Array)


def _evaluate(model: nnx.Module) -> None:
    """`evaluation_mode` of a module that is the caller's own, in place: what `nnx.view` would set.

    A view copies the whole module first and looks at every signature, which takes longer than a
    pass through the network.
    """
    for node in _nodes(model):
        if (names := _view_arguments(type(node))) is not None:
            node.set_view(**{k: v for k, v in _EVALUATION.items() if not names or k in names})


def _nodes(model: nnx.Module) -> list[Any]:
    """The module and everything in it that is a node of NNX's, each once."""
    found: list[Any] = []
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo:
        node = todo.pop()
        if isinstance(node, (*_PLAIN, nnx.Variable)) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, nnx.Pytree):
            found.append(node)
            todo.extend(v for k, v in vars(node).items() if not k.startswith("_pytree__"))
        elif isinstance(node, list | tuple):
            todo.extend(node)
        elif isinstance(node, dict):
            todo.extend(node.values())
        elif (one := jax.tree_util.default_registry.flatten_one_level(node)) is not None:
            todo.extend(one[0])
    return found


@functools.cache
def _view_arguments(cls: type) -> frozenset[str] | None:
    """The arguments of ``set_view``; empty: any; None: there's no such method."""
    method = getattr(cls, "set_view", None)
    if method is None:
        return None
    found = inspect.signature(method).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in found):
        return frozenset()
    return frozenset(p.name for p in found) | {"self"}


def trace(
    model: Any,
    *example_inputs: Any,
    params: PyTree | None = None,
    mode: str = "flexible",
) -> Graph:
    """Reads a network off its jaxpr: no weights are looked at and nothing is computed.

    Args:
      model: an NNX module (read in evaluation mode, left untouched; its leaves may be abstract),
        or a function ``fn(params, *inputs)``, then ``params`` must be given.
      *example_inputs: arrays or ``jax.ShapeDtypeStruct``s, or pytrees of them.
      params: the variables of a function.
      mode: grouped convolutions and split dims: ``"flexible"`` (each part keeps its own channels,
        equally many), ``"tied"`` (the same positions in every part), ``"whole"`` (conv-groups go
        as a whole).

    Returns:
      The `Graph`.

    Raises:
      TypeError: if ``model`` is neither, or no example is given.
      GraphError: if the model can't be run on the example.
    """
    if isinstance(model, nnx.Module):
        if params is not None:
            raise TypeError("params is for functions; an NNX module carries its own variables")
        with direct.no_collection():
            fn, state = functional(model)
        kinds = jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        flags = [isinstance(v, nnx.Param) for v in kinds]
        return _trace(fn, state, example_inputs, mode, flags, _module_ties(model))
    if not callable(model):
        raise TypeError(f"trace takes an NNX module or a function, not {type(model).__name__}")
    if params is None:
        raise TypeError("to trace a function fn(params, *inputs), give params=...")
    return _trace(model, params, example_inputs, mode, None, ())


def trace_fn(
    apply_fn: Callable[..., Any], variables: PyTree, *example_inputs: Any, mode: str = "flexible"
) -> Graph:
    """`trace` of ``apply_fn(variables, *inputs)``: Linen's ``model.apply`` or any function.

    For a Linen dict ``{"params": ..., "batch_stats": ...}`` the paths begin with the collection.
    """
    return _trace(apply_fn, variables, example_inputs, mode, None, ())


def program(
    fn: Callable[..., Any], variables: PyTree, inputs: tuple[Any, ...]
) -> tuple[Any, list[str], Any]:
    """The closed jaxpr of ``fn(variables, *inputs)`` and the path of every variable leaf.

    Raises:
      GraphError: if the function can't be traced on these inputs.
    """
    if not inputs:
        raise TypeError("give at least one example input")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract(variables))
    paths = [path_string(k) for k, _ in leaves]
    if len(set(paths)) != len(paths):
        raise GraphError("two variables have the same path")

    def flat(variables: list[Any], *inputs: Any) -> Any:
        return fn(jax.tree.unflatten(treedef, variables), *inputs)

    shown = ", ".join(str(getattr(a, "shape", a)) for a in jax.tree.leaves(inputs))
    try:
        closed = jax.make_jaxpr(flat)([leaf for _, leaf in leaves], *abstract(inputs))
    except (TypeError, ValueError, IndexError, AssertionError, ZeroDivisionError) as error:
        raise GraphError(f"the model can't run on inputs of shape {shown}: {error}") from error
    return closed, paths, leaves


def analyse(
    fn: Callable[..., Any],
    variables: PyTree,
    inputs: tuple[Any, ...],
    parameters: list[bool] | None = None,
    *,
    original: Graph | None = None,
) -> tuple[Ledger, dict[str, tuple[int, ...]], dict[str, Any]]:
    """Walks the program of ``fn(variables, *inputs)``: its ledger, shapes and dtypes by path.

    ``original``: the graph of the network that this one was shrunk from: grouped kernels are read
    as such even where one group is left, and dims of length 1 as what they were.
    """
    if not inputs:
        raise TypeError("give at least one example input")
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract(variables))
    paths = [path_string(k) for k, _ in leaves]
    if len(set(paths)) != len(paths):
        raise GraphError("two variables have the same path")
    if parameters is None:
        parameters = [not p.startswith("batch_stats/") for p in paths]
    trainable = frozenset(p for p, yes in zip(paths, parameters) if yes)
    shapes = {path: tuple(leaf.shape) for path, (_, leaf) in zip(paths, leaves)}
    dtypes = {path: leaf.dtype for path, (_, leaf) in zip(paths, leaves)}
    named = [(path, leaf) for path, (_, leaf) in zip(paths, leaves)]
    ledger = _ledger(trainable, original)
    outs = direct.run(ledger, fn, treedef, named, abstract(inputs)) if DIRECT else None
    if outs is None:
        closed, _, _ = program(fn, variables, inputs)
        ledger = _ledger(trainable, original)
        args = [ledger.variable(path, shapes[path]) for path in paths]
        for aval in closed.in_avals[len(paths) :]:
            args.append(opaque(aval.shape, "the model's input", act=True))
        outs = walk(ledger, closed.jaxpr, [constant_of(c) for c in closed.consts], args)
    ledger.info = None
    for out in outs:
        ledger.fix_all(out, "the model's output")
    return ledger, shapes, dtypes


def _ledger(trainable: frozenset[str], original: Graph | None) -> Ledger:
    ledger = Ledger(trainable)
    if original is not None:
        tables = frozenset(path for path, _ in original.tables)
        ledger.always_grouped = tables
        ledger.always_depthwise = frozenset(
            layer.kernel
            for layer in original.layers
            if layer.groups > 1 and layer.kernel is not None and layer.kernel not in tables
        )
        ledger.hints = list(original.notes)
    return ledger


def _module_ties(model: nnx.Module) -> tuple[tuple[str, str, int, str], ...]:
    """Axes that a layer of Flax's insists on being equally long, though its program doesn't.

    ``MultiHeadAttention`` refuses values with another head size than the queries.
    """
    out = []
    if not any(isinstance(node, nnx.MultiHeadAttention) for node in _nodes(model)):
        return ()
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.MultiHeadAttention):
            at = "/".join(map(str, path))
            start = f"{at}/" if at else ""
            out.append((f"{start}query/kernel", f"{start}value/kernel", 2, "attention heads"))
    return tuple(out)


def _trace(
    fn: Callable[..., Any],
    variables: PyTree,
    inputs: tuple[Any, ...],
    mode: str,
    parameters: list[bool] | None,
    ties: tuple[tuple[str, str, int, str], ...],
) -> Graph:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}.{did_you_mean(mode, MODES)}")
    with direct.no_collection():
        ledger, shapes, dtypes = analyse(fn, variables, inputs, parameters)
        for one, other, axis, reason in ties:
            if (one, axis) in ledger.starts and (other, axis) in ledger.starts:
                ledger.tie(ledger.nodes((one, axis)), ledger.nodes((other, axis)), reason)
        graph = solve(ledger, shapes, dtypes, mode)
        return dataclasses.replace(graph, inputs=tuple(abstract(inputs)))
