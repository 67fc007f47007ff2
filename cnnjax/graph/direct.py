"""Runs a model on labels: the label algebra as a JAX trace of its own, without a jaxpr in between.

`cnnjax.graph.walk` reads equations; to get them, JAX and Flax spend several times as long as the
analysis itself. Here the model runs on tracers that carry a `Value` each, and every primitive is
handed to the same rules as it is met. Called programs (``jit``, ``scan``, ``cond``) come as jaxprs
and are walked as such; functions with a rule of their own for derivatives are run.

Sums, products and reshapes of two such tracers go straight to their rule where no promotion is
involved: what jax.numpy would add there is nothing but time.

This builds on JAX's own classes for transformations, which are not public. `available` says
whether they are what this file expects; `cnnjax.graph.tracing` reads the jaxpr where they aren't,
and wherever a run fails for whatever reason.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from cnnjax.graph import elementwise, reshaping
from cnnjax.graph.ledger import HERE, Ledger
from cnnjax.graph.values import Value, constant, opaque
from cnnjax.graph.walk import constant_of, equation

core: Any
_Trace: Any
_Tracer: Any
try:
    from jax._src import core

    _Trace, _Tracer = core.Trace, core.Tracer
    available = all(hasattr(core, n) for n in ("set_current_trace", "typeof", "ShapedArray"))
except (ImportError, AttributeError):  # another JAX
    available = False
    core = None
    _Trace = _Tracer = object


class _Out:
    """An equation's output variable."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any) -> None:
        self.aval = aval


class _Equation:
    """What the rules ask of an equation."""

    __slots__ = ("outvars", "params", "primitive")

    def __init__(self, primitive: Any, params: dict[str, Any], avals: list[Any]) -> None:
        self.primitive, self.params = primitive, params
        self.outvars = [_Out(a) for a in avals]


class LabelTrace(_Trace):
    """The trace: a ledger, and the abstract values met so far."""

    __slots__ = ("avals", "ledger")

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.avals: dict[Any, Any] = {}

    def tracer(self, aval: Any, value: Value) -> Labelled:
        return Labelled(self, aval, value)

    def value(self, x: Any) -> Value:
        if type(x) is Labelled:
            return x.value
        if isinstance(x, _Tracer):
            raise TypeError("a tracer of another transformation")
        return constant_of(x)

    def aval(self, shape: tuple[int, ...], like: Any) -> Any:
        """The abstract array of another shape."""
        key = (shape, like.dtype)
        found = self.avals.get(key)
        if found is None:
            found = self.avals[key] = core.ShapedArray(shape, like.dtype)
        return found

    def stage_value(self, val: Any) -> Any:
        if type(val) is Labelled:
            return val
        return Labelled(self, core.typeof(val), self.value(val))

    def process_primitive(self, primitive: Any, tracers: Any, params: Any, /) -> Any:
        avals, _ = primitive.abstract_eval(*map(core.typeof, tracers), **params)
        many = primitive.multiple_results
        avals = list(avals) if many else [avals]
        vals = [*map(self.value, tracers)]
        if primitive.name in ("slice", "split"):
            _whole(vals[0], avals)
        ledger = self.ledger
        ledger.info = HERE
        outs = equation(ledger, _Equation(primitive, params, avals), vals)
        out = [Labelled(self, a, v) for a, v in zip(avals, outs)]
        return out if many else out[0]

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, tracers: Any, /, **_: Any
    ) -> Any:
        # what is called inside is JAX's or the user's, and is run here once: no need to cache it
        with core.set_current_trace(self), jax.disable_jit():
            return fun.call_wrapped(*tracers)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, /, **_: Any
    ) -> Any:
        with core.set_current_trace(self), jax.disable_jit():
            return fun.call_wrapped(*tracers)


def _binary(name: str, method: str, swap: bool = False) -> Any:
    slow = getattr(_Tracer, method, None)

    def op(self: Any, other: Any) -> Any:
        mine = self.aval
        if type(other) is Labelled:
            theirs = other.aval
            if (
                mine.dtype == theirs.dtype
                and mine.dtype in _FLOATS
                and not mine.weak_type
                and not theirs.weak_type
                and len(mine.shape) == len(theirs.shape)
                and (self.value.const is None or other.value.const is None)
            ):
                shape = _broadcast(mine.shape, theirs.shape)
                if shape is not None:
                    pair = [other.value, self.value] if swap else [self.value, other.value]
                    return apply_elementwise(self._trace, name, pair, shape, mine)
        elif (
            (type(other) is float or type(other) is int)
            and mine.dtype in _FLOATS
            and not mine.weak_type
            and mine.shape
            and self.value.const is None
        ):
            scalar = constant(np.asarray(other, mine.dtype))
            pair = [scalar, self.value] if swap else [self.value, scalar]
            return apply_elementwise(self._trace, name, pair, mine.shape, mine)
        return slow(self, other)  # type: ignore[misc]

    return op


def apply_elementwise(
    trace: LabelTrace, name: str, vals: list[Value], shape: Any, like: Any
) -> Any:
    """An elementwise operation of operands that need no promotion; the result is like ``like``."""
    ledger = trace.ledger
    ledger.info = HERE
    for v in vals:
        if v.const is not None and v.const.size == 1:
            ledger.literals.append((float(v.const.reshape(-1)[0]), ledger.info))
    out = elementwise.rule(ledger, name, {}, vals, shape)
    aval = like if shape == like.shape else trace.aval(shape, like)
    return Labelled(trace, aval, out)


def _whole(val: Value, parts: list[Any]) -> None:
    """Raises where channels are cut: what comes of the pieces later says whether that's exact.

    Raises:
      NotImplementedError: the jaxpr is read instead, all of which is there at once.
    """
    for c in val.comps:
        for d in c.dims:
            if any(part.shape[d] != val.shape[d] for part in parts):
                raise NotImplementedError("channels are cut")


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    if a == b:
        return a
    out = []
    for m, n in zip(a, b):
        if m != n and m != 1 and n != 1:
            return None
        out.append(n if m == 1 else m)
    return tuple(out)


_reshape: Any = getattr(_Tracer, "reshape", None)
_FLOATS = frozenset([np.dtype(np.float32), np.dtype(np.float64)])


class Labelled(_Tracer):
    """An array of the program that stands for its labels."""

    __slots__ = ("value",)

    def __init__(self, trace: LabelTrace, aval: Any, value: Value) -> None:
        self._trace = trace
        self.aval = aval
        self.value = value

    __add__ = _binary("add", "__add__")
    __radd__ = _binary("add", "__radd__", True)
    __sub__ = _binary("sub", "__sub__")
    __rsub__ = _binary("sub", "__rsub__", True)
    __mul__ = _binary("mul", "__mul__")
    __rmul__ = _binary("mul", "__rmul__", True)
    __truediv__ = _binary("div", "__truediv__")
    __rtruediv__ = _binary("div", "__rtruediv__", True)

    def reshape(self, *args: Any, **kwargs: Any) -> Any:
        new = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
        old = self.aval.shape
        plain = not kwargs and old and self.value.const is None
        if not plain or not all(type(n) is int and n > 0 for n in new):
            return _reshape(self, *args, **kwargs)
        new = tuple(new)
        if math.prod(new) != math.prod(old):
            return _reshape(self, *args, **kwargs)
        if new == old:
            return self
        trace = self._trace
        trace.ledger.info = HERE
        out = reshaping.reshape(trace.ledger, {}, [self.value], new)
        return Labelled(trace, trace.aval(new, self.aval), out)


def run(
    ledger: Ledger,
    call: Callable[..., Any],
    variables: list[tuple[str, Any]],
    inputs: tuple[Any, ...],
) -> list[Value] | None:
    """Runs ``call(values, *inputs)`` on labels.

    Args:
      ledger: written to; throw it away where None is returned.
      call: the model as a function of its variables, in order, and its inputs.
      variables: the path and the (abstract) array of every variable.
      inputs: abstract.

    Returns:
      The values of the outputs' leaves, or None where the model can't be run this way: read its
      jaxpr then.
    """
    arrays, inner = jax.tree.flatten(inputs)
    if not available or not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in arrays):
        return None
    trace = LabelTrace(ledger)
    kinds: dict[Any, Any] = {}

    def tracer(a: Any, value: Value) -> Labelled:
        dtype = kinds.get(a.dtype)
        if dtype is None:
            dtype = a.dtype
            if not jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
                dtype = jax.dtypes.canonicalize_dtype(dtype)
            kinds[a.dtype] = dtype
        if getattr(a, "weak_type", False):
            return Labelled(trace, core.ShapedArray(value.shape, dtype, weak_type=True), value)
        key = (value.shape, dtype)
        if (aval := trace.avals.get(key)) is None:
            aval = trace.avals[key] = core.ShapedArray(value.shape, dtype)
        return Labelled(trace, aval, value)

    from cnnjax.graph.shortcuts import shortcuts  # which needs this file's classes

    try:
        values = [tracer(a, ledger.variable(path, tuple(a.shape))) for path, a in variables]
        args = [tracer(a, opaque(tuple(a.shape), "the model's input", act=True)) for a in arrays]
        with core.set_current_trace(trace), shortcuts():
            outs = call(values, *jax.tree.unflatten(inner, args))
        return [trace.value(out) for out in jax.tree.leaves(outs)]
    except Exception:  # whatever it is, the jaxpr's own reading says it better, or has none
        return None


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector, which would walk all of JAX's objects again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
