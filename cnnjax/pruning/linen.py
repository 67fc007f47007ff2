"""Shrinking a Linen model: its variables are cut, its layers' sizes overridden by module path.

A Linen module says ``nn.Conv(64, ...)`` in its code, so a smaller network can't be a copy with
other attributes. The shrunk model runs the same code under an interceptor that gives every layer
the sizes of its own (cut) kernel; it trains as usual, with ``mutable=["batch_stats"]`` and all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import surgery
from cnnjax.graph import Graph, label_check
from cnnjax.pruning.keep import Keep, check_keep
from cnnjax.pruning.proof import ProofError, gate
from cnnjax.pruning.shrink import _take_grouped
from cnnjax.tree import flatten, map_with_path

PyTree = Any
Shape = tuple[int, ...]


def _dense(module: Any, shapes: Mapping[str, Shape], old: Mapping[str, Shape]) -> dict[str, Any]:
    return {"features": shapes["kernel"][-1]}


def _conv(module: Any, shapes: Mapping[str, Shape], old: Mapping[str, Shape]) -> dict[str, Any]:
    out: dict[str, Any] = {"features": shapes["kernel"][-1]}
    groups = module.feature_group_count
    if groups > 1 and old["kernel"][-2] == 1:
        # depthwise: the multiplier stays
        out["feature_group_count"] = shapes["kernel"][-1] * groups // old["kernel"][-1]
    return out


def _conv_transpose(module: Any, shapes: Any, old: Any) -> dict[str, Any]:
    return {"features": shapes["kernel"][-2 if module.transpose_kernel else -1]}


def _dense_general(module: Any, shapes: Any, old: Any) -> dict[str, Any]:
    if isinstance(module.features, int):
        return {"features": shapes["kernel"][-1]}
    n = len(module.features)
    return {"features": tuple(shapes["kernel"][-n:])}


def _group_norm(module: Any, shapes: Any, old: Any) -> dict[str, Any]:
    name = "scale" if "scale" in shapes else "bias"
    size = module.group_size or old[name][0] // module.num_groups
    return {"group_size": None, "num_groups": shapes[name][0] // size}


_RULES: dict[type, Callable[..., dict[str, Any]]] = {
    nn.Conv: _conv,
    nn.ConvTranspose: _conv_transpose,
    nn.Dense: _dense,
    nn.DenseGeneral: _dense_general,
    nn.Embed: lambda m, s, o: {
        "num_embeddings": s["embedding"][0],
        "features": s["embedding"][1],
    },
    nn.GroupNorm: _group_norm,
}


def register_linen(cls: type, rule: Callable[..., dict[str, Any]]) -> None:
    """Tells the shrunk models about a Linen layer of your own.

    Args:
      cls: the layer's class (subclasses follow).
      rule: ``rule(module, shapes, old_shapes) -> {attribute: value}``, with the shapes of the
        layer's own variables by name, after and before.
    """
    _RULES[cls] = rule


@dataclasses.dataclass(frozen=True, eq=False)
class ShrunkLinen:
    """A Linen model whose layers have the sizes of cut variables.

    Attributes:
      model: the original module.
      shapes: ``{module path: {variable: shape}}`` of the layers that changed.
      old: the same of the original.
      static: attributes by module path that shapes don't tell.
    """

    model: nn.Module
    shapes: Mapping[str, Mapping[str, Shape]]
    old: Mapping[str, Mapping[str, Shape]]
    static: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def apply(self, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
        """Like the module's own ``apply``: with ``mutable=``, ``rngs=``, ``method=`` and so on.

        Raises:
          flax.errors.ScopeParamShapeError: if a layer of a type that isn't registered declares
            another shape than its cut variable has.
        """
        with nn.intercept_methods(self._intercept):
            return self.model.apply(variables, *args, **kwargs)

    def _intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        path = "/".join(module.path)
        if path not in self.shapes and path not in self.static:
            return call(*args, **kwargs)
        rule = next((_RULES[c] for c in type(module).__mro__ if c in _RULES), None)
        new: dict[str, Any] = {}
        if rule is not None and path in self.shapes:
            new = rule(module, {**self.old[path], **self.shapes[path]}, self.old[path])
        new.update(self.static.get(path, {}))
        before = {name: getattr(module, name) for name in new}
        # Linen modules are frozen; the values go back as soon as the call is over
        for name, value in new.items():
            object.__setattr__(module, name, value)
        try:
            return call(*args, **kwargs)
        finally:
            for name, value in before.items():
                object.__setattr__(module, name, value)


def _by_module(shapes: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    out: dict[str, dict[str, Shape]] = {}
    for path, shape in shapes.items():
        parts = path.split("/")
        out.setdefault("/".join(parts[1:-1]), {})[parts[-1]] = shape
    return out


def _blank(graph: Graph, alive: np.ndarray) -> dict[str, Shape]:
    return {
        path: tuple(graph.axes[path, d].kept(alive).shape[-1] for d in range(len(shape)))
        for path, shape in graph.shapes.items()
    }


def shrink_linen(
    model: nn.Module,
    variables: PyTree,
    graph: Graph,
    keep: Keep | np.ndarray,
    *,
    check: bool | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> tuple[ShrunkLinen, PyTree]:
    """A Linen model without the channels that the decision removes.

    Args:
      model: the Linen module.
      variables: its ``{"params": ..., "batch_stats": ...}``.
      graph: ``trace_fn(lambda v, x: model.apply(v, x, **kwargs), variables, x)``.
      keep: the decision.
      check: as in `cnnjax.pruning.shrink`: the numeric check "shrunk equals gated".
      seed: of its random inputs.
      **kwargs: for ``apply`` in evaluation mode, e.g. ``train=False``.

    Returns:
      The shrunk model and its variables, cut from those given.

    Raises:
      ValueError: if the decision can't be applied or ``check=True`` can't hold.
      cnnjax.graph.LabelError: if the shrunk program would join other channels.
      ProofError: if the numbers differ.
    """
    alive = np.asarray(keep.alive if isinstance(keep, Keep) else keep, bool)
    check_keep(graph, alive)
    new = _blank(graph, alive)
    changed = {p: s for p, s in new.items() if s != graph.shapes[p]}
    static: dict[str, dict[str, Any]] = {}
    for c in graph.constraints:
        if c.kind == "grouped" and c.path is not None:
            left = int((c.counts(alive)[0] > 0).sum())
            if left != len(c.parts):
                static[c.path.partition("/")[2]] = {"feature_group_count": left}
    small = ShrunkLinen(model, _by_module(changed), _by_module(dict(graph.shapes)), static)
    blank = map_with_path(lambda path, leaf: jax.ShapeDtypeStruct(new[path], leaf.dtype), variables)
    order = label_check(lambda v, *x: small.apply(v, *x, **kwargs), graph, alive, params=blank)

    def cut(path: str, leaf: Any) -> Any:
        axes: dict[int, np.ndarray] = {}
        for d, n in enumerate(graph.shapes[path]):
            rows = np.asarray(order[path, d])
            if rows.ndim == 2 and (rows == rows[0]).all():
                rows = rows[0]
            if rows.ndim == 2 or not np.array_equal(rows, np.arange(n)):
                axes[d] = rows
        for d, rows in axes.items():
            if rows.ndim == 2:
                outs = graph.axes[path, d].table_axis
                assert outs is not None
                return _take_grouped(leaf, axes, d, rows, outs)
        return surgery.take(leaf, axes) if axes else leaf

    out = map_with_path(cut, variables)
    statistic = next((g for g in graph.groups if g.statistic and not alive[g.atoms].all()), None)
    if check and statistic is not None:
        raise ValueError(f"check=True can't hold: {statistic.name!r} is under a statistic")
    abstract = any(isinstance(a, jax.ShapeDtypeStruct) for a in flatten(variables).values())
    if check is not False and statistic is None and not abstract:
        _prove(small, out, variables, graph, alive, seed, kwargs)
    return small, out


def _prove(small, cut, variables, graph, alive, seed, kwargs) -> None:
    rng = np.random.default_rng(seed)
    inputs = jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), graph.inputs
    )

    def big(v: Any, *x: Any) -> Any:
        return small.model.apply(v, *x, **kwargs)

    def little(v: Any, *x: Any) -> Any:
        return small.apply(v, *x, **kwargs)

    gated = map_with_path(lambda p, a: gate(p, a, graph, alive, producers=True), variables)
    pairs = zip(
        jax.tree.leaves(jax.jit(little)(cut, *inputs)),
        jax.tree.leaves(jax.jit(big)(gated, *inputs)),
    )
    for a, b in pairs:
        scale = float(jnp.max(jnp.abs(b))) or 1.0
        if not float(jnp.max(jnp.abs(a - b))) <= 1e-5 * max(scale, 1e-30):
            raise ProofError("the shrunk Linen model and the gated original give other numbers")
