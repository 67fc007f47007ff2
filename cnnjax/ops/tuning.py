"""Autotuning: times the forms of a network's convolutions on the present device."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax.ops import choice, primitives, shuffle
from cnnjax.ops.geometry import PARTS, ConvCase, ShuffleCase
from cnnjax.ops.table import Case, FormTable, Key, kind_of_case, present_device, use_table

# seconds of one form in one round: neither timer nor dispatch decides, and on a busy host some
# rounds pass undisturbed
_ROUND = 0.004
_MOST = 1000  # repetitions in a round
_HOPELESS, _COSTLY = 3.0, 0.02  # times the fastest, and seconds: no more rounds
_TOLERANCE = 1e-5  # of the largest value, as of all forms


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """One form of one part, compiled for arrays that it holds; calling it runs it once."""

    case: Case
    part: str
    form: str
    call: Callable[[], Any]

    def __call__(self) -> Any:
        return self.call()


Timer = Callable[[Candidate, int], float]


def seconds(candidate: Candidate, repeats: int) -> float:
    """Wall-clock seconds of one call, of ``repeats`` dispatched one after another."""
    start, out = time.perf_counter(), None
    for _ in range(repeats):
        out = candidate()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


# --- what a program chooses forms for -------------------------------------------------------------


def _equations(jaxpr: Any, seen: set[int]) -> Iterator[Any]:
    if id(jaxpr) in seen:
        return
    seen.add(id(jaxpr))
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive is shuffle.SHUFFLE:
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner, seen)


_PART_OF = {
    primitive: part
    for triple in primitives.TRIPLES.values()
    for part, primitive in zip(PARTS, triple)
}


def chosen_parts(fn: Callable[..., Any], *args: Any) -> list[Key]:
    """Every distinct (part, case) that ``fn(*args)`` leaves to the choice, in order; no FLOPs.

    Args:
      fn: traceable function; convolutions in its loops, branches and gradients count.
      args: arrays or ``jax.ShapeDtypeStruct`` trees.
    """
    with use_table(None):
        closed = jax.make_jaxpr(fn)(*args)
    found: dict[Key, None] = {}
    for eqn in _equations(closed.jaxpr, set()):
        a = eqn.invars[0].aval if eqn.invars else None
        if eqn.primitive is shuffle.SHUFFLE:
            found[("forward", shuffle.case_of(a, eqn.params["groups"]))] = None
        elif eqn.primitive in _PART_OF and eqn.params["form"] == "auto":
            part = _PART_OF[eqn.primitive]
            found[(part, primitives.case_of(part, a, eqn.invars[1].aval, eqn.params))] = None
    return list(found)


def _is_weight(_: Any, value: Any) -> bool:
    return isinstance(value, nnx.Param) and jnp.issubdtype(value.dtype, jnp.inexact)


def _program(model: nnx.Module, train: bool) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """A network's evaluation, or the gradient of its weights in training mode."""
    graphdef, weights, rest = nnx.split(model, _is_weight, ...)

    def run(weights: Any, rest: Any, *inputs: Any) -> Any:
        copy = nnx.merge(graphdef, weights, rest, copy=True)
        copy.train() if train else copy.eval()
        return copy(*inputs)

    def loss(weights: Any, rest: Any, *inputs: Any) -> Any:
        leaves = jax.tree.leaves(run(weights, rest, *inputs))
        floats = [v for v in leaves if jnp.issubdtype(v.dtype, jnp.inexact)]
        return sum(jnp.sum(jnp.square(v.astype(jnp.float32))) for v in floats)

    return (jax.grad(loss) if train else run), (weights, rest)


# --- one part -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1_000_003, np.float32)


def _array(shape: tuple[int, ...], dtype: str, shift: int) -> jax.Array:
    return jnp.asarray(np.resize(np.roll(_noise(), shift), shape), dtype)


def _arrays(case: Case, part: str) -> tuple[jax.Array, ...]:
    """A norm's scale and bias (2, C) for the first array of the part, and the part's arrays."""
    x = functools.partial(_array, case.x, case.dtype, 0)
    if isinstance(case, ShuffleCase):
        return _array((2, case.x[-1]), case.dtype, 3), x()
    kernel = functools.partial(_array, case.kernel, case.dtype, 1)
    ct = functools.partial(_array, case.out, case.dtype, 2)
    pairs = {"forward": (x, kernel), "input_grad": (ct, kernel), "kernel_grad": (x, ct)}
    arrays = tuple(make() for make in pairs[part])
    return (_array((2, arrays[0].shape[-1]), case.dtype, 3), *arrays)


def _compiled(case: Case, part: str, form: str) -> Callable[..., Any]:
    """One form behind a norm and a ReLU and before a product, as networks have it: a form that
    fuses with its neighbours saves passes over memory, which alone it does not show (a shuffle of
    60 channels by slices is slower alone than a transposition, and 2.5 times faster here)."""

    def between(run: Callable[..., Any]) -> Callable[..., Any]:
        def fn(norm: Any, first: Any, *rest: Any) -> Any:
            return run(jax.nn.relu(first * norm[0] + norm[1]), *rest) * 1.5

        return jax.jit(fn)

    if isinstance(case, ShuffleCase):
        return between(lambda x: shuffle.FORMS[form](x, case.groups))
    primitive = primitives.TRIPLES[case.kind][PARTS.index(part)]
    precision = case.precision
    params: dict[str, Any] = {
        "spec": case.spec,
        "form": form,
        "precision": tuple(precision.split(",")) if precision and "," in precision else precision,
    }
    if part == "input_grad":
        params["size"] = case.x[1:3]
    elif part == "kernel_grad":
        params["kernel_size"] = case.kernel[:2]
    return between(lambda a, b: primitive.bind(a, b, **params))


def _agrees(case: Case, part: str, arrays: tuple[jax.Array, ...], got: Any, native: Any) -> bool:
    """Whether numbers are as near to the exact ones as the tolerance or the native form's are."""
    want = native.astype(jnp.float32)
    if isinstance(case, ConvCase):
        exact = dataclasses.replace(case, dtype="float32", precision="highest")
        want = _compiled(exact, part, "native")(*(a.astype(jnp.float32) for a in arrays))

    def error(value: Any) -> float:
        return float(jnp.max(jnp.abs(value.astype(jnp.float32) - want), initial=0.0))

    scale = float(jnp.max(jnp.abs(want), initial=0.0))
    return error(got) <= max(_TOLERANCE * scale, 2 * error(native))  # False for NaN


def _warm_times(candidates: dict[str, Candidate], timer: Timer) -> dict[str, float]:
    """Compiles; first times by form. What fails on this device is left out."""
    best: dict[str, float] = {}
    for form, candidate in candidates.items():
        try:
            jax.block_until_ready(candidate())
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"form {form!r} of {candidate.part} of {candidate.case} fails here: {reason}",
                stacklevel=4,
            )
            continue
        best[form] = min(timer(candidate, 1) for _ in range(2))
    return best


def _improve(
    best: dict[str, float],
    forms: Iterable[str],
    candidates: dict[str, Candidate],
    rounds: int,
    timer: Timer,
) -> None:
    """Least times of some forms, measured in turns, in place."""
    repeats = {f: min(_MOST, max(1, math.ceil(_ROUND / max(best[f], 1e-9)))) for f in forms}
    for _ in range(rounds):
        for form, count in repeats.items():
            if best[form] <= max(_COSTLY, _HOPELESS * min(best.values())):
                best[form] = min(best[form], timer(candidates[form], count))


def _tune_part(
    part: str, case: Case, rule: str, *, rounds: int, margin: float, timer: Timer
) -> tuple[str, dict[str, float]] | None:
    """The winner and the ratios native time / form time; None if no form runs."""
    arrays = _arrays(case, part)
    candidates = {
        form: Candidate(case, part, form, functools.partial(_compiled(case, part, form), *arrays))
        for form in choice.BY_KIND[kind_of_case(case)]
    }
    best = _warm_times(candidates, timer)
    if not best:
        return None
    _improve(best, best, candidates, rounds, timer)

    def beats_the_rule(form: str) -> bool:
        return rule not in best or best[form] <= (1 - margin) * best[rule]

    winner = rule
    for form in sorted(best, key=best.__getitem__):
        if form == rule:
            break
        if beats_the_rule(form) and rule in best:  # once more, between the two
            _improve(best, (rule, form), candidates, rounds, timer)
        if not beats_the_rule(form):
            continue
        # native is the yardstick itself
        if form == "native" or (
            "native" in best
            and _agrees(case, part, arrays, candidates[form](), candidates["native"]())
        ):
            winner = form
            break
    if winner not in best:
        return None
    gains = {f: round(best["native"] / t, 3) for f, t in best.items() if "native" in best}
    gains.pop("native", None)
    return winner, gains


def tune(
    model: Callable[..., Any],
    *inputs: Any,
    train: bool | None = None,
    rounds: int = 20,
    margin: float = 0.2,
    shards: int = 1,
    cache: str | os.PathLike[str] | None = None,
    timer: Timer = seconds,
) -> FormTable:
    """Measures the fastest form of every convolution and channel shuffle of a network.

    The network is traced once, abstractly. For each distinct convolution and each part of it that
    is met (forward, gradient of the input, of the kernel), the forms run in turn on the default
    device, behind a norm and a ReLU, and the least time of all rounds counts. A form
    replaces the one that the rules choose if it is faster by the margin and its numbers are the
    native form's to 1e-5 (or, in lower precision, no farther from the exact ones than twice the
    native form's). Work that takes less time than its own dispatch shows no difference and stays
    with the rules. On the device that measured, put the table in force where functions are traced::

        table = ops.tune(model, x, cache="forms.json")
        with ops.use_table(table):
            train(...)

    Args:
      model: an NNX module, or any function that JAX can trace, such as a training step.
      inputs: arguments, arrays or ``jax.ShapeDtypeStruct``; an input of a network is (N, H, W, C),
        with the batch that will run: shapes are part of what is measured.
      train: of a module, the gradient of its weights in training mode as well as the forward pass
        (the default), or evaluation alone. A function is traced as it is.
      rounds: number of turns.
      margin: fraction of the time of the rules' choice that must be saved. On CPU gains of
        6 to 18 % a part were none in whole networks (``benchmarks/results/tuned_forms.json``).
      shards: devices that batches will be split over under ``jax.jit``: each form is timed on one
        device's share (on the whole where they don't divide it).
      cache: file of a table; what it holds is not measured again, what is measured is added to it.
      timer: ``(candidate, repeats) -> seconds for one call``.

    Returns:
      The table: that of the file, if there is one, and what was measured.

    Raises:
      ValueError: arguments out of range, a cache that is no table or of another kind of device.
    """
    if rounds < 1 or shards < 1 or not 0 <= margin < 1:
        raise ValueError(
            f"rounds and shards must be 1 or more, the margin in [0, 1): got rounds={rounds}, "
            f"shards={shards}, margin={margin}"
        )
    fn, first = model, ()
    if isinstance(model, nnx.Module):
        fn, first = _program(model, train is not False)
    elif train is not None:
        raise ValueError("train= is for modules; a function is traced as it is")
    here = present_device()
    table = FormTable(*here, {})
    if cache is not None and pathlib.Path(cache).exists():
        table = FormTable.load(cache)
        use_table(table)  # refuses another device's
    forms, gains = dict(table.forms), dict(table.gains)
    for part, case in chosen_parts(fn, *first, *inputs):
        if (part, case) in forms:
            continue
        batch, apart = divmod(case.x[0], shards)
        share = case if apart else dataclasses.replace(case, x=(batch, *case.x[1:]))
        if isinstance(case, ConvCase):
            rule = choice.choose(case, part, platform=here[0])
        else:
            rule = choice.choose_shuffle(case, platform=here[0])
        found = _tune_part(part, share, rule, rounds=rounds, margin=margin, timer=timer)
        if found is None:
            continue
        forms[(part, case)], gains[(part, case)] = found
        table = FormTable(*here, forms, gains)
        if cache is not None:
            table.save(cache)
    return table
