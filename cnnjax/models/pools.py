"""Pools with torch-style padding, response normalisation, flattening."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import ops


def flatten(x: Any) -> Any:
    """(N, H, W, C) -> (N, H*W*C), in (h, w, c) order."""
    return x.reshape(x.shape[0], -1)


def global_avg_pool(x: Any) -> Any:
    """(N, H, W, C) -> (N, C), the mean over positions."""
    return jnp.mean(x, (1, 2))


def _pool_pads(size: int, window: int, stride: int, pad: int, ceil: bool) -> tuple[int, int]:
    if not ceil:
        return pad, pad
    out = math.ceil((size + 2 * pad - window) / stride) + 1
    if (out - 1) * stride >= size + pad:
        # torch and Caffe drop a window that would start in the right padding
        out -= 1
    return pad, max(pad, (out - 1) * stride + window - size - pad)


def max_pool(
    x: Any, window: int, stride: int | None = None, *, pad: int = 0, ceil: bool = False
) -> Any:
    """Max pooling, square window, torch-style padding; ``ceil`` rounds the output size up."""
    stride = stride or window
    pads: Any = [_pool_pads(n, window, stride, pad, ceil) for n in x.shape[1:3]]
    return ops.max_pool(x, (window, window), (stride, stride), pads)


def avg_pool(
    x: Any,
    window: int,
    stride: int | None = None,
    *,
    pad: int | str = 0,
    ceil: bool = False,
    count_include_pad: bool = True,
) -> Any:
    """Average pooling, square window; ``pad`` zeros per side or ``"SAME"``."""
    stride = stride or window
    pads: Any = pad
    if not isinstance(pad, str):
        pads = [_pool_pads(n, window, stride, pad, ceil) for n in x.shape[1:3]]
    return nnx.avg_pool(
        x,
        (window, window),
        (stride, stride),
        padding=pads,
        count_include_pad=count_include_pad,
    )


def adaptive_avg_pool(x: Any, size: int) -> Any:
    """Average pooling to ``size`` x ``size`` with torch's bins; the identity when it already is.

    Bin i covers rows floor(i H / size) to ceil((i + 1) H / size).
    """
    for axis in (1, 2):
        n = x.shape[axis]
        if n == size:
            continue
        bins = [
            jnp.mean(
                jax.lax.slice_in_dim(x, i * n // size, -(-(i + 1) * n // size), axis=axis),
                axis,
                keepdims=True,
            )
            for i in range(size)
        ]
        x = jnp.concatenate(bins, axis)
    return x


def local_response_norm(
    x: Any, *, window: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Any:
    """Response normalisation across channels, x / (k + alpha * S)^beta.

    S is the sum of squares over ``window`` neighbouring channels. ``alpha`` isn't divided by the
    window here (the AlexNet paper's form); Caffe and torch divide it.
    """
    sums = jax.lax.reduce_window(
        jnp.square(x),
        # a concrete zero: with a traced one JAX does not see a sum, and cannot differentiate it
        np.zeros((), x.dtype),
        jax.lax.add,
        (1, 1, 1, window),
        (1, 1, 1, 1),
        ((0, 0), (0, 0), (0, 0), (window // 2, window - 1 - window // 2)),
    )
    return x / (k + alpha * sums) ** beta
