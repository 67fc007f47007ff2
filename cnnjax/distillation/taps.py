"""Feature taps: which of the student's layers meet which of the teacher's, and by what adapter.

Features are extra outputs of the same compiled function (`cnnjax.graph.capture`): the models stay
as they are. Maps of different shapes are bridged by explicit adapters, modules that train with the
student (`WithAdapters`) and are dropped afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from cnnjax.distillation.adapters import ChannelAdapter, HintRegressor
from cnnjax.errors import did_you_mean
from cnnjax.graph import capture
from cnnjax.graph.tracing import evaluation_mode
from cnnjax.tree import check_patterns, glob_match

Shape = tuple[int, ...]
SIDES = ("input", "output")


@dataclasses.dataclass(frozen=True)
class Tapped:
    """A model's tapped layers, by a dry run.

    Attributes:
      paths: matching module paths (with the side) in the model's order.
      shapes: of their outputs, by path, for the example's batch.
      logits: shape of the model's own output.
    """

    paths: tuple[str, ...]
    shapes: Mapping[str, Shape]
    logits: Shape

    def only(self, glob: str) -> str:
        """The single path; raises ValueError if the glob matched several."""
        if len(self.paths) > 1:
            raise ValueError(
                f"tap {glob!r} matches {len(self.paths)} layers ({', '.join(self.paths[:6])}): "
                "a pair of features needs one on each side"
            )
        return next(iter(self.paths))


def tap_shapes(model: nnx.Module, glob: str, *example: Any) -> Tapped:
    """Which layers a glob taps and what they give; nothing is computed.

    Args:
      model: any NNX module; its leaves may be abstract.
      glob: of module paths, ``"layer1/**/conv2"``; with ``":input"`` behind it, what goes in
        (behind an activation that is a function, that is the input of the next layer).
      *example: inputs or ``jax.ShapeDtypeStruct`` s.

    Raises:
      ValueError: the glob matches no module (names near ones), or one whose output can't be had.
    """
    return _tapped(model, [glob], example)[glob]


def _tapped(model: nnx.Module, globs: Sequence[str], example: tuple[Any, ...]) -> dict[str, Tapped]:
    """`tap_shapes` of several globs by one dry run."""
    graphdef, state = nnx.split(evaluation_mode(model))
    paths = ["/".join(map(str, path)) for path, _ in nnx.iter_modules(model) if path]
    chosen: dict[str, list[str]] = {}
    for glob in globs:
        pattern, side = split_tap(glob)
        check_patterns(pattern, paths, what="module")
        suffix = "" if side == "output" else f":{side}"
        chosen[glob] = [p + suffix for p in paths if glob_match(pattern, p)]
    taps = tuple(dict.fromkeys(t for found in chosen.values() for t in found))

    def call(state: Any, *x: Any) -> Any:
        return features_of(nnx.merge(graphdef, state, copy=True), taps)(*x)

    out, found = jax.eval_shape(call, state, *example)
    logits = tuple(getattr(out, "shape", ()))
    shapes = {t: tuple(getattr(found[t], "shape", ())) for t in taps}
    return {g: Tapped(tuple(ts), {t: shapes[t] for t in ts}, logits) for g, ts in chosen.items()}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One layer of the student and one of the teacher.

    Attributes:
      student: module path.
      teacher: module path.
      student_shape: (n, h, w, c) or (n, c).
      teacher_shape: likewise.
    """

    student: str
    teacher: str
    student_shape: Shape
    teacher_shape: Shape

    @property
    def equal(self) -> bool:
        """Whether the features can be compared as they are."""
        return self.student_shape == self.teacher_shape


def pair_features(
    student: nnx.Module,
    teacher: nnx.Module,
    pairs: Sequence[tuple[str, str]],
    *example: Any,
) -> tuple[Pair, ...]:
    """Resolves pairs of globs to pairs of layers, with their shapes.

    Args:
      student: NNX module.
      teacher: NNX module.
      pairs: (glob of the student's layer, glob of the teacher's layer), each matching one module.
      *example: inputs of both, arrays or shapes.

    Raises:
      ValueError: a glob that matches nothing or several layers.
    """
    sides: list[list[tuple[str, Shape]]] = []
    for i, (who, model) in enumerate((("student", student), ("teacher", teacher))):
        globs = [pair[i] for pair in pairs]
        try:
            found = _tapped(model, globs, example) if globs else {}
            taps = [found[g].only(g) for g in globs]
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from error
        sides.append([(t, found[g].shapes[t]) for t, g in zip(taps, globs, strict=True)])
    return tuple(Pair(a, b, x, y) for (a, x), (b, y) in zip(*sides, strict=True))


def make_adapter(pair: Pair, *, activation: Any = jax.nn.relu, rngs: nnx.Rngs) -> nnx.Module:
    """The regressor from the student's features to the teacher's shape.

    Maps (n, h, w, c) get FitNets' VALID convolution, vectors (n, c) a dense layer.

    Raises:
      ValueError: ranks differ, or the student's map is smaller than the teacher's.
    """
    ours, theirs = pair.student_shape, pair.teacher_shape
    if len(ours) == len(theirs) == 4:
        shapes = (ours[1], ours[2], ours[3]), (theirs[1], theirs[2], theirs[3])
        return HintRegressor(*shapes, activation=activation, rngs=rngs)
    if len(ours) == len(theirs) == 2:
        return nnx.Linear(ours[1], theirs[1], rngs=rngs)
    raise ValueError(
        f"no adapter from {pair.student!r} {ours} to {pair.teacher!r} {theirs}: tap layers that "
        "both give maps (n, h, w, c), or both vectors (n, c)"
    )


class WithAdapters(nnx.Module):
    """A student and its adapters, trained together; called, it is the student.

    Args:
      student: NNX module (not copied).
      adapters: by name.
    """

    def __init__(self, student: nnx.Module, adapters: Mapping[str, nnx.Module]):
        self.student = student
        self.adapters = nnx.Dict(dict(adapters))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output."""
        return self.student(*args, **kwargs)


def adapter_name(student: str, teacher: str) -> str:
    """The key of a pair's adapter (module paths hold slashes, keys do not)."""
    return f"{student}--{teacher}".replace("/", ".").replace(":", ".")


def adapted(
    pair: tuple[str, str], features: Any, target_shape: Shape, adapters: Mapping[str, Any] | None
) -> Any:
    """The student's features in the teacher's shape, by the pair's adapter where there is one.

    Raises:
      ValueError: shapes differ and there is no adapter, or the adapter gives another shape.
    """
    name = adapter_name(*pair)
    if adapters is not None and name in adapters:
        features = adapters[name](features)
        if tuple(features.shape) != tuple(target_shape):
            raise ValueError(
                f"the adapter {name!r} gives {tuple(features.shape)}, the teacher's features are "
                f"{tuple(target_shape)}"
            )
    elif tuple(features.shape) != tuple(target_shape):
        raise ValueError(
            f"the student's {pair[0]!r} gives {tuple(features.shape)} and the teacher's "
            f"{pair[1]!r} {tuple(target_shape)}: an adapter is needed; make it with make_adapter "
            f"and train WithAdapters(student, {{{name!r}: adapter}})"
        )
    return features


def fsp_adapter(pair: Pair, *, rngs: nnx.Rngs) -> nnx.Module:
    """1x1 convolution to the teacher's channel count, for Gram matrices of unequal widths."""
    return ChannelAdapter(pair.student_shape[-1], pair.teacher_shape[-1], rngs=rngs)


def features_of(
    model: nnx.Module, taps: Sequence[str]
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """``fn(*inputs) -> (output, {tap: features})``; no taps: the model with an empty dict.

    Args:
      model: NNX module, in the mode it's to be run in.
      taps: module paths, ``"path"`` for the output, ``"path:input"`` for the input.
    """
    if not taps:
        return lambda *x, **kw: (model(*x, **kw), {})
    sides: dict[str, str] = {}
    for tap in taps:
        path, side = split_tap(tap)
        sides[path] = side if sides.get(path, side) == side else "both"
    run = capture(model, sides)

    def fn(*x: Any, **kw: Any) -> tuple[Any, dict[str, Any]]:
        out, found = run(*x, **kw)
        features = {}
        for tap in taps:
            path, side = split_tap(tap)
            value = found[path]
            features[tap] = value[SIDES.index(side)] if sides[path] == "both" else value
        return out, features

    return fn


def split_tap(tap: str) -> tuple[str, str]:
    """``"layer1:input"`` -> ``("layer1", "input")``; the side is ``"output"`` where none is given.

    Raises:
      ValueError: an unknown side.
    """
    path, colon, side = tap.partition(":")
    side = side if colon else "output"
    if side not in SIDES:
        raise ValueError(f"tap {tap!r}: unknown side {side!r}.{did_you_mean(side, SIDES)}")
    return path, side
