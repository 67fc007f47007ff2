"""What a network costs: parameters, multiply-accumulates, bytes and activation memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax.errors import did_you_mean
from cnnjax.graph.cost import Contraction, Count, count_program
from cnnjax.tree import PyTree, flatten

_HEAD = ("layer", "kind", "output", "params", "MACs", "activation")


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The cost of one module that holds parameters, or of one product of two activations.

    Attributes:
      path: the module's path (``""`` for a product of two activations).
      kind: ``"conv"``, ``"dense"``, ``"matmul"``, or ``"params"`` (a normalization, a bare scale).
      type: the module's class name, where the model is an NNX module.
      output_shape: of its last convolution or matrix product, batch included.
      params: trainable scalars, the module's own.
      macs: per example; summed over ``calls``.
      output_bytes: of its outputs, whole batch; summed over ``calls``.
      calls: how often it is applied.
    """

    path: str
    kind: str
    type: str
    output_shape: tuple[int, ...]
    params: int
    macs: int
    output_bytes: int
    calls: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """The cost of a network; ``str()`` is a table, `to_json` a dict for programs.

    Attributes:
      params: trainable scalars (running statistics are not counted).
      macs: multiply-accumulates of convolutions and dense layers for one example; bias,
        normalization, pooling, activation and products of two activations are excluded.
      matmul_macs: multiply-accumulates of products of two activations (attention), one example.
      param_bytes: of the trainable scalars.
      state_bytes: of all other variables (running statistics, random keys).
      activation_peak: bytes alive at once, for the whole batch (see `cnnjax.graph.cost`).
      activation_total: bytes of all activations that are written, for the whole batch.
      batch: examples in the input.
      layers: in program order.
    """

    params: int
    macs: int
    matmul_macs: int
    param_bytes: int
    state_bytes: int
    activation_peak: int
    activation_total: int
    batch: int
    layers: tuple[LayerCost, ...]

    def layer(self, path: str) -> LayerCost:
        """The cost of the module at ``path``.

        Raises:
          KeyError: if no module with parameters is there; lists near matches.
        """
        for layer in self.layers:
            if layer.path == path:
                return layer
        paths = [layer.path for layer in self.layers if layer.path]
        raise KeyError(f"no layer at {path!r}.{did_you_mean(path, paths)}")

    def to_json(self) -> dict[str, Any]:
        """All figures as a JSON-able dict."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [_HEAD]
        for c in self.layers:
            rows.append(
                (
                    c.path or "(product)",
                    c.type or c.kind,
                    "x".join(map(str, c.output_shape)) or "-",
                    f"{c.params:,}",
                    f"{c.macs:,}" if c.kind != "matmul" else f"({c.macs:,})",
                    _bytes(c.output_bytes),
                )
            )
        rows.append(("total", "", "", f"{self.params:,}", f"{self.macs:,}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths))
            ).rstrip()
            for row in rows
        ]
        lines.append(
            f"parameters {_bytes(self.param_bytes)}, other state {_bytes(self.state_bytes)}, "
            f"activations (batch {self.batch}) peak {_bytes(self.activation_peak)}, "
            f"total {_bytes(self.activation_total)}"
        )
        return "\n".join(lines)


def _bytes(n: int) -> str:
    if n < 1024:
        return f"{n} B"
    power = min(3, int(np.log2(n)) // 10)
    return f"{n / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def profile(
    model: nnx.Module | Callable[..., Any], *inputs: PyTree, variables: PyTree = None
) -> Profile:
    """Counts a network's cost without running it.

    Args:
      model: an NNX module (its leaves may be abstract), or with ``variables`` a function
        ``fn(variables, *inputs)`` such as a Linen model's ``apply``.
      *inputs: example inputs or ``jax.ShapeDtypeStruct``; the first axis of the first one is the
        batch. MACs are reported for one example, memory for the batch.
      variables: for a function: its parameters; a Linen tree's ``"params"`` collection, where there
        is one, are the trainable ones.

    Returns:
      The `Profile`, by the usual counting rule (see `Profile`).

    Raises:
      ValueError: without inputs, or if the model can't be traced on inputs of these shapes.
      TypeError: if ``model`` is a function and ``variables`` is missing.
    """
    if not inputs:
        raise ValueError(
            "profile(model, *inputs) needs an example input, e.g. "
            "jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)"
        )
    fn, leaves, trainable, types, masks = _program(model, variables)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), _dtype(x)), inputs)
    try:
        closed = jax.make_jaxpr(fn)(list(leaves.values()), *abstract)
    except (TypeError, ValueError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in jax.tree.leaves(abstract))
        raise ValueError(f"the model can't be traced on inputs {shapes}: {error}") from error
    extra = len(closed.jaxpr.invars) - len(leaves)
    found = count_program(closed, [*leaves, *([None] * extra)])
    first = jax.tree.leaves(abstract)[0]
    batch = max(1, first.shape[0] if first.shape else 1)
    sizes = {p: int(np.prod(leaf.shape)) for p, leaf in leaves.items()}
    counts = {p: masks.get(p, sizes[p]) for p in trainable}
    itemsize = {p: _itemsize(leaf) for p, leaf in leaves.items()}
    return Profile(
        params=sum(counts.values()),
        macs=sum(_macs(c, sizes, masks) for c in found.contractions if c.path) // batch,
        matmul_macs=sum(c.macs for c in found.contractions if c.path is None) // batch,
        param_bytes=sum(sizes[p] * itemsize[p] for p in trainable),
        state_bytes=sum(sizes[p] * itemsize[p] for p in leaves if p not in trainable),
        activation_peak=found.peak,
        activation_total=found.total,
        batch=batch,
        layers=_layers(found, counts, types, batch, sizes, masks),
    )


def _macs(c: Contraction, sizes: dict[str, int], masks: dict[str, int]) -> int:
    # a convolution with a connection table multiplies only along its connections
    if c.path in masks:
        return c.macs * masks[c.path] // sizes[c.path]
    return c.macs


def _layers(
    found: Count,
    counts: dict[str, int],
    types: dict[str, str],
    batch: int,
    sizes: dict[str, int],
    masks: dict[str, int],
) -> tuple[LayerCost, ...]:
    rows: dict[str, dict[str, Any]] = {}
    when: dict[str, float] = {}
    for path in counts:
        module = path.rpartition("/")[0]
        row = rows.setdefault(module, _row(module, types))
        row["params"] += counts[path]
        when[module] = min(when.get(module, np.inf), found.order.get(path, np.inf))
    for i, c in enumerate(found.contractions):
        module = c.path.rpartition("/")[0] if c.path else f"\0{i}"
        row = rows.setdefault(module, _row(module, types))
        row["kind"] = c.kind
        row["macs"] += _macs(c, sizes, masks) // batch
        row["output_shape"] = c.shape
        row["output_bytes"] += c.nbytes
        row["calls"] += 1
        if c.path:
            when.setdefault(module, np.inf)
        else:
            before = [found.order.get(o.path, 0) for o in found.contractions[:i] if o.path]
            when[module] = max(before, default=-1) + 0.5
            row["path"] = row["type"] = ""
    return tuple(LayerCost(**rows[m]) for m in sorted(rows, key=lambda m: when[m]))


def _row(module: str, types: dict[str, str]) -> dict[str, Any]:
    return {
        "path": module,
        "kind": "params",
        "type": types.get(module, ""),
        "output_shape": (),
        "params": 0,
        "macs": 0,
        "output_bytes": 0,
        "calls": 0,
    }


def _program(model: Any, variables: PyTree) -> tuple[Callable[..., Any], dict, set, dict, dict]:
    """(fn(list of leaves, *inputs), leaves by path, trainable paths, module types, mask counts)."""
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        treedef = jax.tree.structure(shapes)
        trainable = set(flatten(nnx.state(model, nnx.Param)))
        types, masks = {}, {}
        for path, module in nnx.iter_modules(model):
            name = "/".join(map(str, path))
            types[name] = type(module).__name__
            mask = getattr(module, "mask", None)
            convolution = isinstance(module, nnx.Conv | nnx.ConvTranspose)
            if convolution and isinstance(mask, jax.Array | np.ndarray):
                full = np.broadcast_to(np.asarray(mask), module.kernel.shape)
                masks[f"{name}/kernel" if name else "kernel"] = int(np.count_nonzero(full))

        def fn(leaves: Any, *inputs: Any) -> Any:
            return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves), copy=True)(*inputs)

        return fn, flatten(shapes), trainable, types, masks
    if variables is None:
        raise TypeError(
            "profile needs an nnx.Module, or a function with variables=; got "
            f"{type(model).__name__}"
        )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), _dtype(x)), variables)
    treedef = jax.tree.structure(shapes)
    leaves = flatten(shapes)
    trainable = {p for p in leaves if p.startswith("params/")} or set(leaves)

    def apply(leaves: Any, *inputs: Any) -> Any:
        return model(jax.tree.unflatten(treedef, leaves), *inputs)

    return apply, leaves, trainable, {}, {}


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _itemsize(leaf: Any) -> int:
    try:
        return np.dtype(leaf.dtype).itemsize
    except TypeError:
        return 8  # a random key: two 32-bit words
