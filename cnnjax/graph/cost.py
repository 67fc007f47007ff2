"""Counts of a traced program: multiply-accumulates by layer, and activation memory by liveness.

Works on the jaxpr alone, so it also counts networks whose channels `trace` refuses to read.

Memory model: the program as written, in its own order, with elementwise operations done in place
where an operand of the same size dies (XLA fuses at least that much), and with reshapes and
broadcasts free. Parameters and what is computed from parameters alone don't count as activations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_ALIAS = {
    "reshape",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    "copy",
    "copy_p",
    "stop_gradient",
    "sharding_constraint",
    "optimization_barrier",
    "name",
}
# never in place, whatever the shapes
_FRESH = {
    "conv_general_dilated",
    "dot_general",
    "transpose",
    "rev",
    "gather",
    "sort",
    "concatenate",
    "pad",
    "slice",
    "dynamic_slice",
    "reduce_window",
    "reduce_window_sum",
    "reduce_window_max",
    "reduce_window_min",
    "select_and_scatter_add",
    "select_and_gather_add",
    "cumsum",
    "cumlogsumexp",
    "cummax",
    "cumprod",
    "fft",
    "scan",
    "while",
    "cond",
}
_SUBPROGRAM = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass
class Contraction:
    """One convolution or matrix product of the program.

    Attributes:
      path: path of its kernel, or None for a product of two activations.
      kind: ``"conv"``, ``"dense"`` or ``"matmul"``.
      macs: multiply-accumulates for the whole batch.
      shape: of the output.
      nbytes: of the output.
    """

    path: str | None
    kind: str
    macs: int
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass
class Count:
    """What `count_program` returns: contractions in order, memory in bytes, parameters in use."""

    contractions: list[Contraction]
    peak: int
    total: int
    order: dict[str, int]  # path of a parameter -> when it first meets an activation


@dataclasses.dataclass(frozen=True)
class _Value:
    buffer: int | None  # None: not an activation
    origins: tuple[str, ...] | None  # parameters it is made of; None once an activation is in it


@dataclasses.dataclass
class _Step:
    reads: list[int]
    makes: list[tuple[int, int]]  # (buffer, bytes)
    in_place: bool
    transient: int = 0


def conv_macs(
    input_shape: Sequence[int],
    kernel_shape: Sequence[int],
    output_spatial: Sequence[int],
    batch: int,
    input_dilation: Sequence[int] = (),
) -> int:
    """Multiply-accumulates of a convolution with kernel (*K, C/groups, O).

    A transposed convolution (``input_dilation`` > 1) multiplies its kernel once with every *input*
    position, not with the zeros between them.
    """
    positions = math.prod(output_spatial)
    if any(d > 1 for d in input_dilation):
        positions = math.prod(input_shape)
    return batch * positions * math.prod(kernel_shape)


def count_program(closed: ClosedJaxpr, paths: Sequence[str | None]) -> Count:
    """Counts a jaxpr.

    Args:
      closed: the program.
      paths: for each of its inputs, the parameter's path, or None for an activation.

    Returns:
      The `Count`, for the whole batch of the traced input.
    """
    walker = _Walker()
    values = []
    for var, path in zip(closed.jaxpr.invars, paths, strict=True):
        values.append(walker.input(var, path))
    outs = walker.run(closed.jaxpr, values, 1)
    peak, total = _liveness(walker.steps, walker.given, [v.buffer for v in outs])
    return Count(walker.contractions, peak, total, walker.order)


def _nbytes(aval: Any) -> int:
    itemsize = getattr(np.dtype(aval.dtype) if _plain(aval.dtype) else None, "itemsize", 8)
    return math.prod(aval.shape) * itemsize


def _plain(dtype: Any) -> bool:
    try:
        np.dtype(dtype)
    except TypeError:
        return False
    return True


class _Walker:
    """Inlines the program into a straight list of steps on buffers."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.contractions: list[Contraction] = []
        self.order: dict[str, int] = {}
        self.given: dict[int, int] = {}
        self.count = 0

    def buffer(self) -> int:
        self.count += 1
        return self.count

    def input(self, var: Any, path: str | None) -> _Value:
        if path is not None:
            return _Value(None, (path,))
        buffer = self.buffer()
        self.given[buffer] = _nbytes(var.aval)
        return _Value(buffer, None)

    def run(self, jaxpr: Jaxpr, args: Sequence[_Value], times: int) -> list[_Value]:
        env: dict[Any, _Value] = {v: _Value(None, ()) for v in jaxpr.constvars}
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> _Value:
            return _Value(None, ()) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(a) for a in eqn.invars], times)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def equation(self, eqn: Any, args: list[_Value], times: int) -> list[_Value]:
        name = eqn.primitive.name
        called = str(eqn.params.get("name", name))
        if called.startswith("cnnjax_") and "conv" in called and "grad" not in called:
            return self.contraction(eqn, args, times, self.opaque_conv(eqn))
        if name == "conv_general_dilated":
            return self.contraction(eqn, args, times, self.conv(eqn))
        if name == "dot_general":
            return self.contraction(eqn, args, times, self.dot(eqn))
        if name == "scan":
            return self.scan(eqn, args, times)
        if name == "while":
            return self.loop(eqn, args, times)
        if name == "cond":
            return self.cond(eqn, args, times)
        for key in _SUBPROGRAM:
            inner = eqn.params.get(key)
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                if len(jaxpr.invars) == len(args) and len(jaxpr.outvars) == len(eqn.outvars):
                    return self.run(jaxpr, args, times)
        return self.plain(eqn, args)

    def plain(self, eqn: Any, args: list[_Value], transient: int = 0) -> list[_Value]:
        name = eqn.primitive.name
        if all(a.origins is not None for a in args):
            origins = tuple(dict.fromkeys(p for a in args for p in a.origins or ()))
            return [_Value(None, origins)] * len(eqn.outvars)
        for a in args:
            for path in a.origins or ():
                self.order.setdefault(path, len(self.steps))
        reads = [a.buffer for a in args if a.buffer is not None]
        if name in _ALIAS and len(reads) == 1 and len(eqn.outvars) == 1:
            return [_Value(reads[0], None)]
        makes = [(self.buffer(), _nbytes(v.aval)) for v in eqn.outvars]
        self.steps.append(_Step(reads, makes, name not in _FRESH, transient))
        return [_Value(buffer, None) for buffer, _ in makes]

    def contraction(
        self, eqn: Any, args: list[_Value], times: int, found: tuple[str, int]
    ) -> list[_Value]:
        kind, macs = found
        kernels = [a.origins for a in args[:2] if a.origins is not None]
        if len(kernels) < 2:
            # a kernel made of several parameters counts for the first of them
            path = kernels[0][0] if kernels and kernels[0] else None
            if path is None:
                kind = "matmul"
            aval = eqn.outvars[0].aval
            self.contractions.append(
                Contraction(path, kind, macs * times, tuple(aval.shape), _nbytes(aval))
            )
        outs = self.plain(eqn, args)
        if self.steps and outs[0].buffer is not None:
            self.steps[-1].in_place = False
        return outs

    def conv(self, eqn: Any) -> tuple[str, int]:
        dims = eqn.params["dimension_numbers"]
        x, kernel = (a.aval.shape for a in eqn.invars[:2])
        out = eqn.outvars[0].aval.shape
        kernel = [kernel[d] for d in (*dims.rhs_spec[2:], dims.rhs_spec[1], dims.rhs_spec[0])]
        macs = conv_macs(
            [x[d] for d in dims.lhs_spec[2:]],
            kernel,
            [out[d] for d in dims.out_spec[2:]],
            out[dims.out_spec[0]],
            eqn.params["lhs_dilation"],
        )
        return "conv", macs

    def opaque_conv(self, eqn: Any) -> tuple[str, int]:
        x, kernel = (a.aval.shape for a in eqn.invars[:2])
        out = eqn.outvars[0].aval.shape
        return "conv", conv_macs(x[1:-1], kernel, out[1:-1], out[0])

    def dot(self, eqn: Any) -> tuple[str, int]:
        (lhs_contract, _), _ = eqn.params["dimension_numbers"]
        contracted = math.prod(eqn.invars[0].aval.shape[d] for d in lhs_contract)
        return "dense", contracted * math.prod(eqn.outvars[0].aval.shape)

    def inner(self, jaxpr: Jaxpr, args: list[_Value], times: int) -> tuple[int, list[_Value]]:
        """Runs a loop's or branch's body apart; returns its own peak and its results."""
        body = _Walker()
        given = []
        for var, a in zip(jaxpr.invars, args, strict=True):
            given.append(a if a.origins is not None else body.input(var, None))
        outs = body.run(jaxpr, given, times)
        self.contractions += body.contractions
        for path in body.order:
            self.order.setdefault(path, len(self.steps))
        held = sum(body.given.values())
        peak, _ = _liveness(body.steps, body.given, [v.buffer for v in outs])
        return max(0, peak - held), outs

    def scan(self, eqn: Any, args: list[_Value], times: int) -> list[_Value]:
        peak, outs = self.inner(eqn.params["jaxpr"].jaxpr, args, times * eqn.params["length"])
        return self.after(eqn, args, outs, peak)

    def loop(self, eqn: Any, args: list[_Value], times: int) -> list[_Value]:
        # how often it runs is not known before it runs: its body counts once
        skip = eqn.params["cond_nconsts"]
        peak, outs = self.inner(eqn.params["body_jaxpr"].jaxpr, args[skip:], times)
        return self.after(eqn, args, outs, peak)

    def cond(self, eqn: Any, args: list[_Value], times: int) -> list[_Value]:
        best: tuple[int, list[Contraction]] | None = None
        before, peak, outs = self.contractions, 0, []
        for branch in eqn.params["branches"]:
            self.contractions = []
            p, outs = self.inner(branch.jaxpr, args[1:], times)
            peak = max(peak, p)
            macs = sum(c.macs for c in self.contractions)
            if best is None or macs > best[0]:
                best = (macs, self.contractions)
        self.contractions = before + (best[1] if best else [])
        return self.after(eqn, args, outs, peak)

    def after(
        self, eqn: Any, args: list[_Value], outs: list[_Value], transient: int
    ) -> list[_Value]:
        if all(a.origins is not None for a in args) and all(o.origins is not None for o in outs):
            return [_Value(None, o.origins) for o in outs]
        reads = [a.buffer for a in args if a.buffer is not None]
        makes = [(self.buffer(), _nbytes(v.aval)) for v in eqn.outvars]
        self.steps.append(_Step(reads, makes, False, transient))
        return [_Value(buffer, None) for buffer, _ in makes]


def _liveness(
    steps: list[_Step], given: dict[int, int], results: list[int | None]
) -> tuple[int, int]:
    """(peak, total) bytes: the most that is alive at once, and all that is ever allocated."""
    last = dict.fromkeys(given, -1)
    for i, step in enumerate(steps):
        for b in step.reads:
            last[b] = i
        for b, _ in step.makes:
            last[b] = i
    for b in results:
        if b is not None:
            last[b] = len(steps)
    size = dict(given)
    live = peak = sum(given.values())
    total = 0
    for i, step in enumerate(steps):
        dying = [b for b in set(step.reads) if last[b] == i]
        new = sum(n for _, n in step.makes)
        if step.in_place and any(size[b] >= new for b in dying):
            peak = max(peak, live + step.transient)
        else:
            peak = max(peak, live + new + step.transient)
            total += new
        for b, n in step.makes:
            size[b] = n
        live += new - sum(size[b] for b in dying)
        live -= sum(n for b, n in step.makes if last[b] == i)
    return peak, total
