"""Folding batch normalisation into the convolutions and dense layers before it, for inference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.models import registry


class Identity(nnx.Module):
    """Returns its input: what stays in a folded batch norm's place."""

    def __call__(self, x: Any) -> Any:
        """x, unchanged."""
        return x


def _module(model: Any, path: str) -> tuple[Any, str | int]:
    """The parent of the module at a path and its key there."""
    *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
    for part in parents:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    return model, last


def _get(parent: Any, key: str | int) -> Any:
    return parent[key] if isinstance(key, int) else getattr(parent, key)


def fold_batchnorm(model: Any, example: Any = None, *, tolerance: float = 1e-4) -> Any:
    """A copy of the network whose batch norms are folded into the layers before them.

    A norm is folded where the network's dataflow shows that it alone reads one convolution's or
    dense layer's output, with nothing between: kernel * s and (bias - mean) * s + beta,
    s = gamma / sqrt(var + epsilon).
    Norms elsewhere (first in a pre-activation or dense unit, inside scanned blocks) stay. The
    result is compared with the original on random images.

    Args:
      model: an NNX network; it isn't changed.
      example: an input, abstract or not; by default the model's own standard input. The check runs
        at its size.
      tolerance: largest allowed difference of the outputs, relative to their largest value.

    Returns:
      the folded network, in evaluation mode; folded norms are replaced by `Identity`. It saves and
      loads like any other.

    Raises:
      ValueError: if no example is given or known, or if the outputs differ (an operation that this
        folding doesn't see sits between a layer and its norm).
    """
    # not at the top: creating a model shouldn't wait for the graph room's imports
    from cnnjax import graph

    if example is None:
        provenance = getattr(model, "provenance", None)
        if provenance is None:
            raise ValueError("give an example input: the model isn't from cnnjax.models.create")
        shape = registry.input_shape(provenance.name, **dict(provenance.fields))
        example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    original = nnx.clone(model)
    original.eval()
    folded = nnx.clone(original)
    candidates = []
    abstract = jax.ShapeDtypeStruct(example.shape, example.dtype)
    read = graph.trace(original, abstract)
    for path in dict.fromkeys(layer.path for layer in read.layers if layer.path):
        if read.layer(path).kind not in ("conv", "dense"):
            continue
        norm = read.bn_of(path)
        if norm is None or len(read.prev_layers(norm.path)) != 1:
            continue
        if sum(layer.path in (path, norm.path) for layer in read.layers) == 2:
            # each of the two is applied once
            candidates.append((path, norm.path))
    pairs: list[list[str]] = []
    for path, norm_path in _side_by_side(original, candidates, abstract):
        layer_parent, layer_key = _module(folded, path)
        norm_parent, norm_key = _module(folded, norm_path)
        layer, bn = _get(layer_parent, layer_key), _get(norm_parent, norm_key)
        if not isinstance(bn, nnx.BatchNorm) or not isinstance(layer, nnx.Conv | nnx.Linear):
            continue
        _fold(layer, bn)
        _take_out(norm_parent, norm_key)
        pairs.append([path, norm_path])
    _check(original, folded, example, tolerance)
    if pairs:
        surgery.add_edit(folded, "models.fold_batchnorm", pairs=pairs)
    return folded


def _side_by_side(
    model: nnx.Module, pairs: list[tuple[str, str]], example: jax.ShapeDtypeStruct
) -> list[tuple[str, str]]:
    """The pairs whose norm reads the layer's very output: no ReLU, no pooling between."""
    from cnnjax import graph

    if not pairs:
        return []
    taps = {path: "output" for path, _ in pairs} | {norm: "input" for _, norm in pairs}
    try:
        _, values = graph.captured_program(model, taps, example)
    except ValueError:  # values can't leave nnx.remat: the comparison at the end decides
        return pairs
    return [(path, norm) for path, norm in pairs if values[path] is values[norm]]


def _take_out(parent: Any, key: str | int) -> None:
    if isinstance(key, int):
        parent[key] = Identity()
    else:
        setattr(parent, key, Identity())


@surgery.edit("models.fold_batchnorm")
def _replay(model: nnx.Module, *, pairs: list[list[str]]) -> nnx.Module:
    """The folded structure, without numbers: biases where there were none, no norms."""
    folded, leaves = surgery.copy(model), surgery.leaves(model)
    for layer_path, norm_path in pairs:
        layer: Any = surgery.module_at(folded, layer_path)
        kernel = leaves[f"{layer_path}/kernel"]
        layer.bias = nnx.Param(jax.ShapeDtypeStruct(kernel.shape[-1:], kernel.dtype))
        layer.use_bias = True
        _take_out(*_module(folded, norm_path))
    return folded


def _fold(layer: Any, bn: Any) -> None:
    def values(variable: Any, default: float) -> np.ndarray:
        if variable is None:
            return np.full(bn.num_features, default)
        return np.asarray(variable[...], np.float64)

    scale = values(bn.scale, 1.0) / np.sqrt(values(bn.var, 1.0) + bn.epsilon)
    bias = (values(layer.bias, 0.0) - values(bn.mean, 0.0)) * scale + values(bn.bias, 0.0)
    kernel = layer.kernel[...]
    # the output channels are a kernel's last axis
    layer.kernel[...] = jnp.asarray(np.asarray(kernel, np.float64) * scale, kernel.dtype)
    layer.bias = nnx.Param(jnp.asarray(bias, kernel.dtype))
    layer.use_bias = True


def _check(original: Any, folded: Any, example: Any, tolerance: float) -> None:
    x = np.random.default_rng(0).standard_normal(example.shape).astype(example.dtype)
    nets = [nnx.split(m) for m in (original, folded)]

    @jax.jit
    def both(states: Any, x: Any) -> Any:
        pairs = zip(nets, states, strict=True)
        return [jax.tree.leaves(nnx.merge(g, s)(x)) for (g, _), s in pairs]

    want, got = both([s for _, s in nets], x)
    for a, b in zip(want, got, strict=True):
        difference = float(jnp.max(jnp.abs(a - b)))
        if not difference <= tolerance * float(jnp.max(jnp.abs(a))):
            raise ValueError(
                f"the folded network's output differs by {difference:.3g}: an operation sits "
                "between a layer and its batch norm; don't fold this network"
            )
