"""Grouped and 1x1 convolution as matrix products; the maps of :mod:`cnnjax.ops.formulas`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax.ops.formulas import pad_input, window_of
from cnnjax.ops.geometry import ConvSpec

Array = jax.Array

# above this many groups one batched product compiles faster than a product a group
_UNROLL = 32


def _products(a: Array, b: Array, groups: int, contract: tuple[int, int], precision: Any) -> Array:
    """For each group the matrix product of its columns of ``a`` and ``b``, side by side.

    Args:
      a: (P, groups * A).
      b: (Q, groups * B).
      groups: the number of groups.
      contract: which axis of a group's (P, A) and of its (Q, B) is summed over.

    Returns:
      (the other axis of a, groups * the other axis of b).
    """
    if groups <= _UNROLL:
        width = a.shape[1] // groups, b.shape[1] // groups
        parts = [
            lax.dot_general(
                a[:, g * width[0] : (g + 1) * width[0]],
                b[:, g * width[1] : (g + 1) * width[1]],
                (((contract[0],), (contract[1],)), ((), ())),
                precision=precision,
            )
            for g in range(groups)
        ]
        return parts[0] if groups == 1 else jnp.concatenate(parts, axis=1)
    a3, b3 = a.reshape(a.shape[0], groups, -1), b.reshape(b.shape[0], groups, -1)
    axes = ((2 * contract[0],), (2 * contract[1],))
    out = lax.dot_general(a3, b3, (axes, ((1,), (1,))), precision=precision)
    return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], -1)


def dot_forward(x: Array, kernel: Array, spec: ConvSpec, precision: Any = None) -> Array:
    """Any grouped convolution as one matrix product a tap and group (one a group for 1x1)."""
    kh, kw, _, c_out = kernel.shape
    n, h, w, _ = x.shape
    out = spec.out_size((h, w), (kh, kw))
    xp = pad_input(x, spec)
    total = None
    for i in range(kh):
        for j in range(kw):
            window = window_of(xp, i, j, out, spec)
            flat = window.reshape(-1, window.shape[-1])
            term = _products(flat, kernel[i, j], spec.groups, (1, 0), precision)
            total = term if total is None else total + term
    assert total is not None
    return total.reshape(n, *out, c_out)


def dot_input_grad(
    ct: Array, kernel: Array, spec: ConvSpec, size: tuple[int, int], precision: Any = None
) -> Array:
    """The transpose of :func:`dot_forward` in ``x``: products, then shifted sums for k > 1."""
    kh, kw, c_group, _ = kernel.shape
    n, ho, wo, _ = ct.shape
    (sh, sw), (dh, dw) = spec.strides, spec.dilation
    top, left = spec.padding[0][0], spec.padding[1][0]
    flat = ct.reshape(-1, ct.shape[-1])
    total = None
    for i in range(kh):
        for j in range(kw):
            # (pixels, C_out) x (C_in / groups, C_out): per group, summed over its outputs
            term = _products(flat, kernel[i, j], spec.groups, (1, 1), precision)
            term = term.reshape(n, ho, wo, c_group * spec.groups)
            low = (i * dh - top, j * dw - left)
            config = (
                (0, 0, 0),
                (low[0], size[0] - low[0] - ((ho - 1) * sh + 1), sh - 1),
                (low[1], size[1] - low[1] - ((wo - 1) * sw + 1), sw - 1),
                (0, 0, 0),
            )
            if config[1:3] != ((0, 0, 0), (0, 0, 0)):
                term = lax.pad(term, jnp.zeros((), term.dtype), config)
            total = term if total is None else total + term
    assert total is not None
    return total


def dot_kernel_grad(
    x: Array, ct: Array, spec: ConvSpec, kernel_size: tuple[int, int], precision: Any = None
) -> Array:
    """The transpose of :func:`dot_forward` in ``kernel``: one product over all pixels a tap."""
    kh, kw = kernel_size
    out = (ct.shape[1], ct.shape[2])
    xp = pad_input(x, spec)
    flat_ct = ct.reshape(-1, ct.shape[-1])
    taps = []
    for i in range(kh):
        for j in range(kw):
            window = window_of(xp, i, j, out, spec)
            flat = window.reshape(-1, window.shape[-1])
            taps.append(_products(flat, flat_ct, spec.groups, (0, 0), precision))
    return jnp.stack(taps).reshape(kh, kw, x.shape[-1] // spec.groups, ct.shape[-1])
