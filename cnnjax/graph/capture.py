"""Inputs and outputs of any layer as extra outputs of the same function; nothing is patched."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from cnnjax.errors import did_you_mean
from cnnjax.tree import check_patterns, glob_match

SIDES = ("input", "output", "both")


class _Recorder:
    """What one call of the model has seen so far."""

    def __init__(self, sides: dict[int, tuple[str, str]], add: Mapping[str, Any]) -> None:
        self.sides, self.add = sides, add
        self.found: dict[str, Any] = {}

    def __call__(self, module: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        entry = self.sides.get(id(module))
        if entry is None:
            return call(module, *args, **kwargs)
        path, side = entry
        out = call(module, *args, **kwargs)
        if path in self.add:
            out = out + self.add[path]
        given = args[0] if len(args) == 1 else args or tuple(kwargs.values())
        value = {"input": given, "output": out, "both": (given, out)}[side]
        key, n = path, 1
        while key in self.found:
            key, n = f"{path}#{n}", n + 1
        self.found[key] = value
        return out


_ACTIVE: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("tap", default=None)


@functools.lru_cache(maxsize=512)
def _tapped(cls: type) -> type:
    """A subclass whose calls go by the active recorder."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = _ACTIVE.get()
        if recorder is None:
            return cls.__call__(self, *args, **kwargs)  # type: ignore[operator]
        return recorder(self, cls.__call__, args, kwargs)  # type: ignore[attr-defined]

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    for path, module in nnx.iter_modules(model):
        yield "/".join(map(str, path)), module


def capture(
    model: nnx.Module,
    taps: Mapping[str, str] | str,
    *,
    add: Mapping[str, Any] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A function like the model that returns inputs or outputs of inner modules as well.

    It works on a view that shares the model's variables (so BatchNorm's statistics are updated as
    usual in training mode) and changes nothing on the model or its classes. Use it inside ``jit``
    and ``grad`` where you'd call the model::

        y, features = graph.capture(model, {"layer*/*/conv2": "output"})(x)

    Args:
      model: an NNX module, in the mode it's to be run in.
      taps: ``{glob of module paths: "input" | "output" | "both"}``, or a glob (of outputs).
      add: ``{path: array}`` added to the outputs of tapped modules; differentiate with respect to
        zeros here for the gradient of a loss by a feature map.

    Returns:
      ``fn(*args, **kwargs) -> (output, {path: value})``, with (input, output) pairs for "both".
      The second call of a module has the key ``"path#1"``, and so on.

    Raises:
      ValueError: if a glob matches no module, a side is unknown, or a tapped module isn't called
        (or only inside a transformation of the model's own, whose values can't leave it).
    """
    if isinstance(taps, str):
        taps = {taps: "output"}
    paths = [path for path, _ in _modules(model) if path]
    check_patterns(tuple(taps), paths, what="module")
    chosen: dict[str, str] = {}
    for pattern, side in taps.items():
        if side not in SIDES:
            raise ValueError(f"unknown side {side!r} of {pattern!r}.{did_you_mean(side, SIDES)}")
        chosen.update(dict.fromkeys((p for p in paths if glob_match(pattern, p)), side))
    add = dict(add or {})
    for path in add:
        if path not in chosen:
            raise ValueError(f"add: {path!r} isn't tapped.{did_you_mean(path, chosen)}")

    def fn(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        view: Any = nnx.clone(model, variables=False)
        sides: dict[int, tuple[str, str]] = {}
        for path, module in _modules(view):
            if path in chosen:
                module.__class__ = _tapped(type(module))
                sides[id(module)] = (path, chosen[path])
        recorder = _Recorder(sides, add)
        token = _ACTIVE.set(recorder)
        try:
            out = view(*args, **kwargs)
        finally:
            _ACTIVE.reset(token)
        missing = [p for p in chosen if p not in recorder.found]
        if missing:
            raise ValueError(
                f"{missing[0]!r} isn't called by the model (or only inside a transformation "
                "such as nnx.remat or nnx.scan): its values can't be captured"
            )
        return out, recorder.found

    return fn


def captured_program(
    model: nnx.Module, taps: Mapping[str, str] | str, *examples: Any
) -> tuple[Any, dict[str, Any]]:
    """The program that a model is, and the places in it that the taps see.

    Two taps that name the same variable (``is``) have nothing between them.

    Args:
      model: an NNX module, in the mode it's to be read in.
      taps: as for `capture`.
      examples: inputs, abstract or not.

    Returns:
      The jaxpr, and ``{path: variable of it}``, (input, output) pairs of variables for "both".

    Raises:
      ValueError: as `capture`.
    """
    graphdef, state = nnx.split(model)

    def run(state: Any, *inputs: Any) -> Any:
        return capture(nnx.merge(graphdef, state), taps)(*inputs)[1]

    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), examples)
    closed, shapes = jax.make_jaxpr(run, return_shape=True)(state, *abstract)
    variables = closed.jaxpr.outvars
    return closed.jaxpr, jax.tree.unflatten(jax.tree.structure(shapes), variables)
