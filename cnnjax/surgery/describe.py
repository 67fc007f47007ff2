"""Modules as JSON and back: a registered class's name and its constructor's arguments."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax.errors import did_you_mean
from cnnjax.surgery import layers, walk
from cnnjax.surgery.encode import NotEncodable, decode, encode, same

# arguments that leave no trace in the finished layer, so nothing is lost by leaving them out
_SPENT = ("rngs", "kernel_init", "bias_init", "scale_init", "embedding_init", "out_kernel_init")
_SPENT += ("out_bias_init", "kernel_metadata", "bias_metadata", "scale_metadata")


_ROOMS_WITH_LAYERS = ("factorization", "models", "pruning", "distillation")


class Identity(nnx.Module):
    """Returns its first argument; what a removed block leaves behind."""

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns ``x``."""
        return x


layers.register(Identity, attributes={})


def _group_norm_args(layer: nnx.GroupNorm) -> dict[str, Any]:
    return {"num_features": layer.num_groups * layer.group_size, "group_size": None}


def _prelu_args(layer: nnx.PReLU) -> dict[str, Any]:
    return {"negative_slope_init": 0.01}


_SPECIAL: dict[type, Any] = {nnx.GroupNorm: _group_norm_args, nnx.PReLU: _prelu_args}


def describe(module: Any) -> dict[str, Any]:
    """The JSON description of a module from which `build` makes it again (without its numbers).

    Args:
      module: a layer of a registered type whose constructor's arguments are attributes of the same
        names, an ``nnx.Sequential`` or ``nnx.List`` of such, or a public activation function.

    Raises:
      NotEncodable: says what cannot be described, and what to do.
    """
    if isinstance(module, nnx.Sequential):
        return {"layer": "Sequential", "layers": [describe(m) for m in module.layers]}
    if not isinstance(module, nnx.Module):
        return encode_function(module)
    name = layers.name_of(type(module))
    if name is None:
        raise NotEncodable(
            f"the layer type {type(module).__name__} is not registered; "
            f"surgery.register({type(module).__name__}, attributes={{...}}) makes it known"
        )
    special = _SPECIAL.get(type(module), lambda _: {})(module)
    args = {}
    for key, parameter in _parameters(type(module)).items():
        if key in _SPENT or key.endswith(("_init", "_metadata")):
            if key in special:
                args[key] = encode(special[key])
            continue
        if key in special:
            args[key] = encode(special[key])
            continue
        required = parameter.default is parameter.empty
        if not hasattr(module, key):
            if required:
                raise NotEncodable(
                    f"{type(module).__name__} does not keep its argument {key!r} as an attribute"
                )
            continue
        value = getattr(module, key)
        if required or not same(value, parameter.default):
            try:
                args[key] = encode(value)
            except NotEncodable as error:
                raise NotEncodable(f"argument {key!r} of {type(module).__name__}: {error}") from (
                    error
                )
    description: dict[str, Any] = {"layer": name, "args": args}
    if getattr(module, "rngs", None) is not None:
        description["rngs"] = True  # the layer draws random numbers when it is called
    _check(module, description)
    return description


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's parameters, with those that it passes on to its bases as ``**kwargs``."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]
        stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        found = {**{p.name: p for p in own if p.kind not in stars}, **found}
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own):
            break
    return found


def encode_function(value: Any) -> dict[str, Any]:
    """The description of an activation function.

    Raises:
      NotEncodable: unless it is a public function of jax.nn, jax.numpy or flax.nnx.
    """
    coded = encode(value)
    if not (isinstance(coded, dict) and "function" in coded):
        raise NotEncodable(f"{value!r} is neither a module nor a public function")
    return coded


def build(description: dict[str, Any]) -> Any:
    """The abstract module (``ShapeDtypeStruct`` leaves) of a description.

    Raises:
      ValueError: for a layer name that is not registered.
    """
    return (
        nnx.eval_shape(lambda: _make(description))
        if "layer" in description
        else decode(description)
    )


def _make(description: dict[str, Any]) -> Any:
    if "layer" not in description:
        return decode(description)
    name = description["layer"]
    if name == "Sequential":
        return nnx.Sequential(*(_make(d) for d in description["layers"]))
    known = layers.registered()
    if name not in known:
        # a layer of one of our own rooms that nothing has imported yet
        for room in _ROOMS_WITH_LAYERS:
            importlib.import_module(f"cnnjax.{room}")
        known = layers.registered()
    if name not in known:
        raise ValueError(
            f"the layer type {name!r} is not registered here.{did_you_mean(name, known)} "
            "Import the module that registers it before loading"
        )
    cls = known[name]
    args = {key: decode(value) for key, value in description["args"].items()}
    rngs = _parameters(cls).get("rngs")
    if rngs is not None and (rngs.default is rngs.empty or description.get("rngs")):
        args["rngs"] = nnx.Rngs(0)
    if cls is nnx.PReLU:
        args.pop("negative_slope_init")
    return cls(**args)


def _check(module: nnx.Module, description: dict[str, Any]) -> None:
    """A description is only as good as what it rebuilds: compare at once."""
    problems, _ = differences(module, build(description))
    if problems:
        raise NotEncodable(
            f"{type(module).__name__} cannot be made again from its constructor's arguments: "
            + "; ".join(problems[:4])
        )


def differences(
    model: nnx.Module, other: nnx.Module
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Compares two models as structures.

    Args:
      model: the reference.
      other: a model that should be the same, e.g. one replayed from a record.

    Returns:
      ``(problems, settings)``: what differs beyond repair (modules, types, leaves, attributes
      without a JSON form), and the static attributes ``{path: {name: value}}`` of ``model`` that
      ``other`` must take over to be the same (mode flags, for example).
    """
    problems: list[str] = []
    settings: dict[str, dict[str, Any]] = {}
    a, b = walk.modules(model), walk.modules(other)
    problems += [f"no module at {p!r}" for p in a if p not in b]
    problems += [f"unexpected module at {p!r}" for p in b if p not in a]
    for path in a:
        if path not in b:
            continue
        if type(a[path]) is not type(b[path]):
            problems.append(
                f"{path!r} is a {type(a[path]).__name__}, not a {type(b[path]).__name__}"
            )
            continue
        ours, theirs = walk.statics(a[path]), walk.statics(b[path])
        for name in sorted({*ours, *theirs}):
            if name in ours and name in theirs and same(ours[name], theirs[name]):
                continue
            if name not in ours:
                # an attribute that is a child module or a variable on one side shows up there
                if theirs[name] is not None:
                    problems.append(f"{path!r} has no attribute {name!r}")
                continue
            try:
                encode(ours[name])
            except NotEncodable as error:
                problems.append(f"attribute {name!r} of {path!r} differs: {error}")
                continue
            settings.setdefault(path, {})[name] = ours[name]
    x, y = walk.leaves(model), walk.leaves(other)
    problems += [f"no variable {p!r}" for p in x if p not in y]
    problems += [f"unexpected variable {p!r}" for p in y if p not in x]
    for p in x:
        if p in y and (x[p].shape != y[p].shape or not _same_dtype(x[p].dtype, y[p].dtype)):
            problems.append(f"{p!r} is {x[p].shape} {x[p].dtype}, not {y[p].shape} {y[p].dtype}")
    return problems, settings


def _same_dtype(a: Any, b: Any) -> bool:
    # a numpy attribute may be 64 bit where an abstract model shows what JAX makes of it
    canonical = jax.dtypes.canonicalize_dtype
    return a == b or (
        isinstance(a, np.dtype) and isinstance(b, np.dtype) and canonical(a) == canonical(b)
    )
