"""Proximal operators on parameter trees, and proximal training as an optax transformation.

Duchi & Singer, "Efficient online and batch learning using forward backward splitting", JMLR 10,
2009 (FOBOS); on the neurons of CNNs: Zhou, Alvarez, Porikli, "Less is more: towards compact CNNs",
ECCV 2016.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from cnnjax import tree
from cnnjax.errors import did_you_mean
from cnnjax.pruning import granularity as grain
from cnnjax.pruning import prox

PyTree = Any
KINDS = ("l1", "squared_l2", "group_l2", "sparse_group", "l0", "l0_ball", "nuclear", "nested")
_ONE_STEP = ("nuclear", "nested")  # no closed form with a step for every coordinate


@dataclasses.dataclass(frozen=True)
class Prox:
    """The operator of one set of leaves.

    Attributes:
      kind: one of `KINDS`.
      strength: lambda; the threshold is ``step * strength`` (``l0_ball`` needs none).
      group: granularity of the groups (``filter``, ``channel``, ``column``, ``kernel``, ``layer``)
        for ``group_l2`` and ``sparse_group``; for ``nested`` a tuple from fine to coarse.
      l1_strength: the lambda of the l1 part of ``sparse_group``.
      keep: number of weights that ``l0_ball`` keeps of each leaf.
      bias: a filter's group holds its bias too: a filter of zeros that still emits its bias is not
        dead.
      by_size: multiply a group's strength by the square root of its size.
    """

    kind: str
    strength: float = 0.0
    group: str | tuple[str, ...] = "filter"
    l1_strength: float = 0.0
    keep: int | None = None
    bias: bool = True
    by_size: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown operator {self.kind!r}.{did_you_mean(self.kind, KINDS)}")
        if self.strength < 0 or self.l1_strength < 0:
            raise ValueError(
                f"strengths must not be negative, got {self.strength} and {self.l1_strength}"
            )
        if (self.kind == "l0_ball") != (self.keep is not None):
            raise ValueError("l0_ball, and it alone, needs keep: how many weights stay")
        names = (self.group,) if isinstance(self.group, str) else self.group
        for name in names:
            grain.canonical(name)
        if (self.kind == "nested") != (not isinstance(self.group, str)):
            raise ValueError("nested, and it alone, needs group as a tuple, from fine to coarse")


Spec = Mapping[str, "Prox | Sequence[Prox]"]


def prox_tree(params: PyTree, step: Any, spec: Spec) -> PyTree:
    """Applies the operators that a spec names to the leaves of a tree.

    Args:
      params: any Flax tree.
      step: eta, a number, or a tree like ``params`` with a step for every coordinate.
      spec: ``{glob of paths: Prox}``; the first glob that matches a leaf counts, leaves that none
        matches stay as they are. A sequence of operators is applied in order: exact if their groups
        are nested from fine to coarse, an approximation if they overlap (no closed form exists).

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: a glob that matches nothing; a step per coordinate for ``nuclear`` or ``nested``;
        a step tree that does not match.
    """
    flat = tree.flatten(params)
    tree.check_patterns(tuple(spec), flat, what="prox pattern")
    steps = _steps(step, params, flat)
    out = dict(flat)
    for path, ops in _assign(spec, flat).items():
        for op in ops:
            beside = _bias_of(path, out) if _joins_bias(op) else None
            if beside is None:
                out[path] = _apply(op, out[path], steps(path))
                continue
            # rows of the lowered kernel and the bias as one more row; a group is a column
            rows = jnp.concatenate([_rows(out[path]), out[beside][None]])
            eta = steps(path)
            if jnp.ndim(eta):
                eta = jnp.concatenate([_rows(eta), steps(beside)[None]])
            rows = _apply(op, rows, eta)
            out[path], out[beside] = rows[:-1].reshape(out[path].shape), rows[-1]
    return tree.map_with_path(lambda path, _: out[path], params)


def penalty_tree(params: PyTree, spec: Spec) -> Any:
    """``sum strength * g(w)`` of the same spec: what the operators minimize.

    Gradients are sub-gradients, 0 at zero groups.

    Raises:
      ValueError: a glob that matches nothing.
    """
    flat = tree.flatten(params)
    tree.check_patterns(tuple(spec), flat, what="penalty pattern")
    total = jnp.zeros((), jnp.float32)
    for path, ops in _assign(spec, flat).items():
        for op in ops:
            v = flat[path]
            beside = _bias_of(path, flat) if _joins_bias(op) else None
            if beside is not None:
                v = jnp.concatenate([_rows(v), flat[beside][None]])
            total = total + _value(op, v)
    return total


class PerCoordinate(NamedTuple):
    """Steps of every coordinate, ``fn(optimizer state, updates done) -> tree``."""

    fn: Callable[[PyTree, Any], PyTree]


def adam_steps(
    learning_rate: float | int | Callable[[Any], Any], b2: float = 0.999, eps: float = 1e-8
) -> PerCoordinate:
    """Adam's own step of every coordinate, ``lr / (sqrt(nu / (1 - b2^t)) + eps)``.

    Args:
      learning_rate: Adam's, a number or a schedule.
      b2: Adam's.
      eps: Adam's.

    Returns:
      For `forward_backward_splitting`'s ``step``.
    """

    def steps(state: PyTree, count: Any) -> PyTree:
        nu = optax.tree_utils.tree_get(state, "nu")
        if nu is None:
            raise ValueError("the optimizer's state holds no second moments (nu): not Adam")
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        correct = 1 - b2 ** (jnp.asarray(count, jnp.float32) + 1)
        return jax.tree.map(lambda n: rate / (jnp.sqrt(n / correct) + eps), nu)

    return PerCoordinate(steps)


class SplittingState(NamedTuple):
    """State of a proximal optimizer: updates done and the optimizer's own state."""

    count: Int[Array, ""]
    inner: PyTree


def forward_backward_splitting(
    optimizer: optax.GradientTransformation,
    spec: Spec,
    step: float | int | PerCoordinate | Callable[[Any], Any],
    *,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer's step, then the proximal step: exact zeros while training.

    The operator acts after the whole update (momentum included), on ``params + updates``. With SGD
    and ``step`` the learning rate this is FOBOS. With an adaptive optimizer there are two forms:
    ``step=adam_steps(...)`` is the exact operator in Adam's metric; a number is another algorithm
    with one threshold for all coordinates, usable and often better behaved.

    Args:
      optimizer: any optax transformation, complete (learning rate included).
      spec: see `prox_tree`.
      step: eta of the backward step: a number, a schedule ``count -> eta``, or `adam_steps`
        (`PerCoordinate`). Learning-rate decay decays the threshold with it.
      every: the backward step is made after every so many updates, with ``every * eta``.

    Raises:
      ValueError: ``every`` below 1; at ``update``, without ``params``; see also `prox_tree`.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        tree.check_patterns(tuple(spec), tree.flatten(params), what="prox pattern")
        return SplittingState(jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SplittingState]:
        if params is None:
            raise ValueError("a proximal optimizer needs update(grads, state, params)")
        updates, inner = optimizer.update(updates, state.inner, params, **extra)
        if isinstance(step, PerCoordinate):
            eta = step.fn(inner, state.count)
        else:
            eta = step(state.count) if callable(step) else step

        def back(updates: PyTree) -> PyTree:
            ahead = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
            scaled = jax.tree.map(lambda e: e * every, eta)
            target = prox_tree(ahead, scaled, spec)
            # p + (0 - p) is exactly +0.0; leaves without operator keep their own update
            return tree.map_with_path(
                lambda path, u, p, new, old: u if new is old else (new - p).astype(u.dtype),
                updates,
                params,
                target,
                ahead,
            )

        if every == 1:
            updates = back(updates)
        else:
            due = (state.count + 1) % every == 0
            updates = jax.lax.cond(due, back, lambda u: u, updates)
        return updates, SplittingState(state.count + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _steps(step: Any, params: PyTree, flat: Mapping[str, Any]) -> Callable[[str], Any]:
    leaves = jax.tree.leaves(step)
    if jax.tree.structure(step) == jax.tree.structure(0) and jnp.ndim(leaves[0]) == 0:
        return lambda path: step
    tree.check_same_structure(params, step, what="step")
    by_path = tree.flatten(step)
    return lambda path: by_path[path]


def _assign(spec: Spec, flat: Mapping[str, Any]) -> dict[str, tuple[Prox, ...]]:
    out = {}
    for path in flat:
        for pattern, ops in spec.items():
            if tree.glob_match(pattern, path):
                out[path] = (ops,) if isinstance(ops, Prox) else tuple(ops)
                break
    # a kernel's joint group takes the bias along: it isn't treated by itself as well
    taken = {
        _bias_of(path, flat) for path, ops in out.items() if any(_joins_bias(op) for op in ops)
    }
    return {path: ops for path, ops in out.items() if path not in taken}


def _joins_bias(op: Prox) -> bool:
    grouped = op.kind in ("group_l2", "sparse_group")
    return op.bias and grouped and grain.canonical(str(op.group)) == "filter"


def _bias_of(path: str, flat: Mapping[str, Any]) -> str | None:
    beside = path.rpartition("/")[0] + "/bias" if "/" in path else "bias"
    leaf, kernel = flat.get(beside), flat[path]
    fits = leaf is not None and kernel.ndim >= 2 and leaf.shape == kernel.shape[-1:]
    return beside if fits else None


def _rows(kernel: Any) -> Any:
    return kernel.reshape(-1, kernel.shape[-1])


def _group_axes(v: Any, name: str) -> tuple[int, ...]:
    shape = grain.group_shape(v.shape, name)
    return tuple(a for a in range(v.ndim) if shape[a] == 1 and v.shape[a] != 1)


def _weight(op: Prox, v: Any, axes: Sequence[int]) -> float:
    size = 1
    for a in axes:
        size *= v.shape[a]
    return op.strength * (size**0.5 if op.by_size else 1.0)


def _apply(op: Prox, v: Any, eta: Any) -> Any:
    if op.kind == "l1":
        return prox.l1(v, eta * op.strength)
    if op.kind == "squared_l2":
        return prox.squared_l2(v, eta * op.strength)
    if op.kind == "l0":
        return prox.l0(v, eta * op.strength)
    if op.kind == "l0_ball":
        return prox.l0_ball(v, op.keep)
    if op.kind in _ONE_STEP and jnp.ndim(eta):
        raise ValueError(f"the operator {op.kind!r} needs one step for the whole leaf")
    if op.kind == "nuclear":
        return prox.nuclear(_rows(v), eta * op.strength).reshape(v.shape)
    if op.kind == "nested":
        for name in op.group:
            axes = _group_axes(v, name)
            t = eta * _weight(op, v, axes)
            v = prox.group_l2(v, t, axes) if axes else prox.l1(v, t)
        return v
    axes = _group_axes(v, str(op.group))
    if op.kind == "sparse_group":
        v = prox.l1(v, eta * op.l1_strength)
    return prox.group_l2(v, eta * _weight(op, v, axes), axes)


def _value(op: Prox, v: Any) -> Any:
    if op.kind == "l1":
        return op.strength * jnp.sum(jnp.abs(v))
    if op.kind == "squared_l2":
        return op.strength * 0.5 * jnp.sum(jnp.square(v))
    if op.kind == "l0":
        return op.strength * jnp.sum(v != 0).astype(v.dtype)
    if op.kind == "l0_ball":
        return jnp.zeros((), v.dtype)
    if op.kind == "nuclear":
        return op.strength * jnp.sum(jnp.linalg.svd(_rows(v), compute_uv=False))
    names = (op.group,) if isinstance(op.group, str) else op.group
    total = op.l1_strength * jnp.sum(jnp.abs(v)) if op.kind == "sparse_group" else 0.0
    for name in names:
        axes = _group_axes(v, name)
        size = jnp.abs(v) if not axes else prox.norms(v, axes)
        total = total + _weight(op, v, axes) * jnp.sum(size)
    return total
