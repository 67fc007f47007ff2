"""Depth pruning: whole residual blocks go, by score, select, apply.

A residual block whose input reaches its output through additions alone can be replaced by the
identity: the network then computes what it computes when the block's branch is zero (after a ReLU,
the one behind the addition included).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from cnnjax import surgery
from cnnjax.errors import did_you_mean
from cnnjax.graph.profile import profile
from cnnjax.graph.tracing import evaluation_mode
from cnnjax.tree import Patterns, check_patterns, flatten, match_any

PyTree = Any
# operations that leave a residual stream what it is: additions, casts, and activations behind them
_ADD = {"add", "add_any"}
_PASS = {"max", "convert_element_type", "copy", "name", "stop_gradient", "sharding_constraint"}


def removable_blocks(model: nnx.Module, *inputs: Any, exclude: Patterns = ()) -> tuple[str, ...]:
    """The residual blocks that can be replaced by the identity, in the order of the call.

    A block counts if it holds parameters, is called with an array first and returns one array of
    the same shape and dtype, and its input reaches its output through additions (a ReLU or a cast
    may follow). The innermost such modules are given, never a stage of several.

    Args:
      model: any NNX module; leaves may be abstract.
      *inputs: example inputs (arrays or shapes).
      exclude: globs of module paths to leave out.

    Returns:
      Module paths for `surgery.remove` or `remove_blocks`.

    Raises:
      ValueError: if a glob in ``exclude`` matches no module.
    """
    if exclude:
        check_patterns(exclude, [p for p in surgery.modules(model) if p], what="exclude")
    with_parameters = {p.rpartition("/")[0] for p in flatten(nnx.state(model, nnx.Param))}
    good: dict[str, bool] = {}
    for path, module, args, kwargs, out in _calls(model, inputs):
        if not path or isinstance(module, nnx.List | nnx.Dict):
            continue
        if not any(p == path or p.startswith(f"{path}/") for p in with_parameters):
            continue
        fits = _same(args, out) and _is_residual(module, args, kwargs)
        good[path] = good.get(path, True) and fits
    found = [p for p, ok in good.items() if ok]
    inner = [p for p in found if not any(q.startswith(f"{p}/") for q in found)]
    return tuple(p for p in inner if not (exclude and match_any(exclude, p)))


def _abstract(x: Any) -> Any:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if hasattr(a, "shape") else a, x
    )


def _calls(model: nnx.Module, inputs: tuple[Any, ...]) -> list[tuple]:
    """(path, abstract module, args, kwargs, result) of every module call of one forward pass."""
    graphdef, state = nnx.split(evaluation_mode(model))
    blank = surgery.modules(surgery.abstract(evaluation_mode(model)))
    calls: list[tuple] = []

    def record(cls: type, path: str) -> type:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            at = len(calls)
            calls.append(())
            out = cls.__call__(self, *args, **kwargs)  # type: ignore[operator]
            given = (_abstract(args), _abstract(kwargs), _abstract(out))
            calls[at] = (path, blank[path], *given)
            return out

        return type(cls.__name__, (cls,), {"__call__": call})

    def forward(state: Any, inputs: Any) -> Any:
        # a copy that lives for this trace only, so its modules' classes may be swapped
        copy = nnx.merge(graphdef, state, copy=True)
        for path, module in surgery.modules(copy).items():
            if callable(module):
                object.__setattr__(module, "__class__", record(type(module), path))
        return copy(*inputs)

    jax.eval_shape(forward, _abstract(state), _abstract(inputs))
    return calls


def _same(args: tuple[Any, ...], out: Any) -> bool:
    if not args or not isinstance(args[0], jax.ShapeDtypeStruct):
        return False
    return (
        isinstance(out, jax.ShapeDtypeStruct)
        and out.shape == args[0].shape
        and out.dtype == args[0].dtype
    )


def _is_residual(module: nnx.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    graphdef, state = nnx.split(module)

    def call(x: Any, state: Any) -> Any:
        return nnx.merge(graphdef, state, copy=True)(x, *args[1:], **kwargs)

    try:
        closed = jax.make_jaxpr(call)(args[0], state)
    except (TypeError, ValueError):
        return False  # further arguments that aren't arrays of known values
    jaxpr = closed.jaxpr
    return _reaches(jaxpr, jaxpr.outvars[0], jaxpr.invars[0], added=False)


def _reaches(jaxpr: Jaxpr, var: Any, goal: Any, *, added: bool) -> bool:
    """Whether ``goal`` reaches ``var`` through additions and what may follow them."""
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    stack, seen = [(var, added)], set()
    while stack:
        v, plus = stack.pop()
        if isinstance(v, Literal) or (v, plus) in seen:
            continue
        seen.add((v, plus))
        if v is goal:
            if plus:
                return True
            continue
        eqn = made.get(v)
        if eqn is None:
            continue
        name = eqn.primitive.name
        if name in _ADD:
            stack += [(u, True) for u in eqn.invars]
            continue
        if name in _PASS and all(
            isinstance(u, Literal) or u.aval.shape == v.aval.shape or u.aval.shape == ()
            for u in eqn.invars
        ):
            stack += [(u, plus) for u in eqn.invars if getattr(u.aval, "shape", ()) == v.aval.shape]
            continue
        inner = next((p for p in eqn.params.values() if isinstance(p, ClosedJaxpr | Jaxpr)), None)
        if inner is None:
            continue
        body = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        if len(body.invars) != len(eqn.invars) or len(body.outvars) != len(eqn.outvars):
            continue
        result = body.outvars[eqn.outvars.index(v)]
        for outer, parameter in zip(eqn.invars, body.invars):
            # with the addition inside the call, or outside it
            if _reaches(body, result, parameter, added=False):
                stack.append((outer, True))
            elif _reaches(body, result, parameter, added=True):
                stack.append((outer, plus))
    return False


def block_scores(
    scores: PyTree, blocks: Sequence[str], *, reduce: str = "mean"
) -> dict[str, float]:
    """One score for each block from scores of its weights or channels; higher = keep.

    Args:
      scores: e.g. ``importance.l1(params)``.
      blocks: module paths.
      reduce: ``"mean"`` or ``"sum"`` over all numbers in the block.

    Raises:
      ValueError: for another ``reduce``, or a block without scores.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce {reduce!r} is unknown.{did_you_mean(reduce, ['mean', 'sum'])}")
    flat = {p: np.asarray(x, np.float64) for p, x in flatten(scores).items()}
    out = {}
    for block in blocks:
        mine = [x.ravel() for p, x in flat.items() if p.startswith(f"{block}/")]
        if not mine:
            raise ValueError(f"the scores hold nothing of the block {block!r}")
        numbers = np.concatenate(mine)
        out[block] = float(numbers.mean() if reduce == "mean" else numbers.sum())
    return out


def select_blocks(
    scores: Mapping[str, float],
    *,
    ratio: float | int | None = None,
    count: int | None = None,
    macs: float | int | None = None,
    model: nnx.Module | None = None,
    inputs: tuple[Any, ...] = (),
) -> tuple[str, ...]:
    """The blocks to remove: those with the lowest scores.

    Args:
      scores: ``{block: score}``, higher = keep, of the removable blocks.
      ratio: fraction of the blocks to remove (rounded up); or
      count: how many to remove; or
      macs: remove the lowest until at most this many multiply-accumulates are left (up to 1: this
        fraction of the original); needs ``model`` and ``inputs``.
      model: for ``macs``.
      inputs: for ``macs``: example inputs.

    Returns:
      Block paths, lowest score first.

    Raises:
      ValueError: unless exactly one of ratio, count, macs is given and within reach.
    """
    if sum(x is not None for x in (ratio, count, macs)) != 1:
        raise ValueError("give exactly one of ratio, count, macs")
    ranked = sorted(scores, key=lambda b: (scores[b], b))
    if macs is None:
        if ratio is not None:
            if not 0 <= ratio <= 1:
                raise ValueError(f"ratio is the fraction to remove, between 0 and 1; got {ratio}")
            count = math.ceil(ratio * len(ranked) - 1e-9)
        assert count is not None
        if not 0 <= count <= len(ranked):
            raise ValueError(f"count must be between 0 and {len(ranked)} blocks, got {count}")
        return tuple(ranked[:count])
    if model is None or not inputs:
        raise ValueError("macs= needs model= and inputs=")
    costs = profile(model, *inputs)
    limit = macs * costs.macs if macs <= 1 else macs
    left, gone = costs.macs, 0
    while left > limit:
        if gone == len(ranked):
            raise ValueError(
                f"macs={macs:g} (at most {limit:.6g}) is out of reach: without any of the "
                f"{len(ranked)} blocks {left:,} of {costs.macs:,} are left"
            )
        prefix = f"{ranked[gone]}/"
        left -= sum(c.macs for c in costs.layers if c.path.startswith(prefix))
        gone += 1
    return tuple(ranked[:gone])


def remove_blocks(model: nnx.Module, blocks: Sequence[str], *inputs: Any) -> Any:
    """A new model without the blocks: an identity stands for each.

    Args:
      model: any NNX module; untouched.
      blocks: from `select_blocks`.
      *inputs: example inputs (arrays or shapes): the result must run on them and give outputs of
        the same shapes.

    Raises:
      KeyError: if there is no module at a path.
      ValueError: if a block is not removable.
    """
    allowed = removable_blocks(model, *inputs)
    for block in blocks:
        if block not in allowed:
            surgery.module_at(model, block)
            raise ValueError(
                f"{block!r} is no residual block with an identity path and equal input and output "
                f"shapes.{did_you_mean(block, allowed)}"
            )
    out = model
    for block in blocks:
        out = surgery.remove(out, block)
    return out if blocks else surgery.copy(model)
