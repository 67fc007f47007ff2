"""NumPy transcriptions that the model tests compare with; float64, no JAX convolution."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax import models, ops

Pads = tuple[tuple[int, int], tuple[int, int]]


def same_pads(size: tuple[int, ...], kernel: tuple[int, ...], stride: int) -> Pads:
    """TensorFlow's SAME: total padding split low/high with the odd pixel high."""
    out = []
    for n, k in zip(size, kernel):
        total = max((math.ceil(n / stride) - 1) * stride + k - n, 0)
        out.append((total // 2, total - total // 2))
    return out[0], out[1]


def conv(x: Any, kernel: Any, stride: int = 1, pads: Any = None, groups: int = 1) -> np.ndarray:
    """Direct convolution, one tap after the other; pads None keeps odd kernels' size."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    kh, kw, per_group, c_out = kernel.shape
    if pads is None:
        pads = ((kh // 2, kh // 2), (kw // 2, kw // 2))
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    ho, wo = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    y = np.zeros((x.shape[0], ho, wo, c_out))
    per_out = c_out // groups
    for g in range(groups):
        xs = x[..., g * per_group : (g + 1) * per_group]
        ks = kernel[..., g * per_out : (g + 1) * per_out]
        for i in range(kh):
            for j in range(kw):
                window = xs[:, i : i + stride * ho : stride, j : j + stride * wo : stride]
                y[..., g * per_out : (g + 1) * per_out] += window @ ks[i, j]
    return y


def norm(x: np.ndarray, bn: nnx.BatchNorm) -> np.ndarray:
    """Batch norm at evaluation."""
    mean, var = np.asarray(bn.mean[...]), np.asarray(bn.var[...])
    y = (x - mean) / np.sqrt(var + bn.epsilon)
    if bn.scale is not None:
        y = y * np.asarray(bn.scale[...])
    return y + np.asarray(bn.bias[...])


def unit(x: Any, layer: Any, stride: int = 1, pads: Any = None, groups: int = 1) -> np.ndarray:
    """A ConvNorm without its activation."""
    return norm(conv(x, layer.conv.kernel[...], stride, pads, groups), layer.bn)


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0)."""
    return np.maximum(x, 0.0)


def relu6(x: np.ndarray) -> np.ndarray:
    """min(max(x, 0), 6)."""
    return np.clip(x, 0.0, 6.0)


def pool(x: np.ndarray, window: int, stride: int, pads: Pads, kind: str) -> np.ndarray:
    """Direct pooling: ``max``, ``avg`` (pad counted) or ``avg_valid`` (pad left out)."""
    fill = -np.inf if kind == "max" else np.nan if kind == "avg_valid" else 0.0
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)), constant_values=fill)
    ho, wo = (x.shape[1] - window) // stride + 1, (x.shape[2] - window) // stride + 1
    y = np.empty((x.shape[0], ho, wo, x.shape[3]))
    reduce = {"max": np.max, "avg": np.mean, "avg_valid": np.nanmean}[kind]
    for i in range(ho):
        for j in range(wo):
            s = stride
            y[:, i, j] = reduce(x[:, i * s : i * s + window, j * s : j * s + window], axis=(1, 2))
    return y


def randomise(module: Any, seed: int = 0) -> Any:
    """Random parameters and statistics, so that no scale of 1 or mean of 0 hides an error."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if leaf.dtype != np.float32:
            return leaf
        x = rng.standard_normal(leaf.shape).astype(np.float32)
        if "var" in name or "scale" in name:
            return np.abs(x) * 0.3 + 0.7
        if "kernel" in name:
            return x / np.float32(math.sqrt(max(1, math.prod(leaf.shape[:-1]))))
        return 0.3 * x

    state = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.update(module, jax.tree_util.tree_map_with_path(draw, state))
    module.eval()
    return module


def count_macs(jaxpr: Any) -> int:
    """Multiply-accumulates of the convolutions and products in a jaxpr."""
    total = 0
    for eqn in jaxpr.eqns:
        shapes = [getattr(v.aval, "shape", ()) for v in eqn.invars]
        out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if ops.recognise(eqn) is not None or eqn.primitive.name == "conv_general_dilated":
            total += out * math.prod(shapes[1][:-1])
        elif eqn.primitive.name == "dot_general":
            (axes, _), _ = eqn.params["dimension_numbers"]
            total += out * math.prod(shapes[0][a] for a in axes)
        else:
            for value in eqn.params.values():
                for part in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(part, "jaxpr", part)
                    if hasattr(inner, "eqns"):
                        total += count_macs(inner)
    return total


def counts(name: str, size: int | None = None, call: Any = None, **fields: Any) -> tuple[int, int]:
    """(parameters, MACs) of a registered model at batch 1, from abstract values."""
    model = models.abstract(name, **fields)
    model.eval()
    params = sum(math.prod(v.shape) for v in jax.tree.leaves(nnx.state(model, nnx.Param)))
    height, width, channels = models.input_shape(name, **fields)
    shape = (1, size or height, size or width, channels)
    graphdef, state = nnx.split(model)
    run = call or (lambda m, x: m(x))
    jaxpr = jax.make_jaxpr(lambda s, x: run(nnx.merge(graphdef, s), x))(
        state, jax.ShapeDtypeStruct(shape, np.float32)
    )
    return params, count_macs(jaxpr.jaxpr)
