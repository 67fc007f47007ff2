"""Entry points: from a model, or a function of variables and inputs, to its graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from cnnjax import modules
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
    graphdef, state = nnx.split(model)

    def fn(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        module = nnx.merge(graphdef, variables, copy=True)
        modules.evaluate(module)
        return module(*inputs, **kwargs)

    return fn, state


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model as a function of its variables, one by one.

    Attributes:
      call: ``call(values, *inputs)`` with the values of all variables in order.
      variables: ``{path: array or ShapeDtypeStruct}``.
      parameters: the paths that are trained.
    """

    call: Callable[..., Any]
    variables: Mapping[str, Any]
    parameters: frozenset[str]


def program_of(model: nnx.Module | modules.Skeleton) -> Program:
    """A module in evaluation mode, or one that was taken apart, as a `Program`."""
    taken = model if isinstance(model, modules.Skeleton) else modules.take(model)
    if taken is None:
        fn, state = functional(model)  # type: ignore[arg-type]
        kinds = jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        found = function_program(fn, state)
        if len(kinds) != len(found.variables):
            return found
        trained = [p for p, v in zip(found.variables, kinds) if isinstance(v, nnx.Param)]
        return dataclasses.replace(found, parameters=frozenset(trained))

    def call(values: list[Any], *inputs: Any) -> Any:
        return taken.build(values, evaluate=True)(*inputs)

    kinds = zip(taken.leaves, taken.kinds)
    trained = [p for p, kind in kinds if kind is not None and issubclass(kind, nnx.Param)]
    return Program(call, taken.leaves, frozenset(trained))


def function_program(fn: Callable[..., Any], variables: PyTree) -> Program:
    """A function ``fn(variables, *inputs)`` as a `Program`.

    Raises:
      GraphError: if two variables have the same path.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract(variables))
    named = {path_string(k): leaf for k, leaf in leaves}
    if len(named) != len(leaves):
        raise GraphError("two variables have the same path")

    def call(values: list[Any], *inputs: Any) -> Any:
        return fn(jax.tree.unflatten(treedef, values), *inputs)

    trained = frozenset(p for p in named if not p.startswith("batch_stats/"))
    return Program(call, named, trained)


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
            return _trace(program_of(model), example_inputs, mode, _module_ties(model))
    if not callable(model):
        raise TypeError(f"trace takes an NNX module or a function, not {type(model).__name__}")
    if params is None:
        raise TypeError("to trace a function fn(params, *inputs), give params=...")
    return _trace(function_program(model, params), example_inputs, mode, ())


def trace_fn(
    apply_fn: Callable[..., Any], variables: PyTree, *example_inputs: Any, mode: str = "flexible"
) -> Graph:
    """`trace` of ``apply_fn(variables, *inputs)``: Linen's ``model.apply`` or any function.

    For a Linen dict ``{"params": ..., "batch_stats": ...}`` the paths begin with the collection.
    """
    return _trace(function_program(apply_fn, variables), example_inputs, mode, ())


def jaxpr_of(program: Program, inputs: tuple[Any, ...]) -> Any:
    """The closed jaxpr of ``program.call(values, *inputs)``.

    Raises:
      GraphError: if the program can't be traced on these inputs.
    """
    shown = ", ".join(str(getattr(a, "shape", a)) for a in jax.tree.leaves(inputs))
    values = [abstract(leaf) for leaf in program.variables.values()]
    try:
        return jax.make_jaxpr(program.call)(values, *abstract(inputs))
    except (TypeError, ValueError, IndexError, AssertionError, ZeroDivisionError) as error:
        raise GraphError(f"the model can't run on inputs of shape {shown}: {error}") from error


def analyse(
    program: Program, inputs: tuple[Any, ...], *, original: Graph | None = None
) -> tuple[Ledger, dict[str, tuple[int, ...]], dict[str, Any]]:
    """Walks a program: its ledger, shapes and dtypes by path.

    ``original``: the graph of the network that this one was shrunk from: grouped kernels are read
    as such even where one group is left, and dims of length 1 as what they were.
    """
    if not inputs:
        raise TypeError("give at least one example input")
    shapes = {path: tuple(leaf.shape) for path, leaf in program.variables.items()}
    dtypes = {path: leaf.dtype for path, leaf in program.variables.items()}
    ledger = _ledger(program.parameters, original)
    named = list(program.variables.items())
    outs = direct.run(ledger, program.call, named, abstract(inputs)) if DIRECT else None
    if outs is None:
        closed = jaxpr_of(program, inputs)
        ledger = _ledger(program.parameters, original)
        args = [ledger.variable(path, shape) for path, shape in shapes.items()]
        for aval in closed.in_avals[len(args) :]:
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
    if not any(isinstance(node, nnx.MultiHeadAttention) for node in modules.nodes(model)):
        return ()
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.MultiHeadAttention):
            at = "/".join(map(str, path))
            start = f"{at}/" if at else ""
            out.append((f"{start}query/kernel", f"{start}value/kernel", 2, "attention heads"))
    return tuple(out)


def _trace(
    program: Program,
    inputs: tuple[Any, ...],
    mode: str,
    ties: tuple[tuple[str, str, int, str], ...],
) -> Graph:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}.{did_you_mean(mode, MODES)}")
    with direct.no_collection():
        ledger, shapes, dtypes = analyse(program, inputs)
        for one, other, axis, reason in ties:
            if (one, axis) in ledger.starts and (other, axis) in ledger.starts:
                ledger.tie(ledger.nodes((one, axis)), ledger.nodes((other, axis)), reason)
        graph = solve(ledger, shapes, dtypes, mode)
        return dataclasses.replace(graph, inputs=tuple(abstract(inputs)))
