"""Convolution as matrix products: grouped, 1x1 and on small maps.

The maps are those of :mod:`cnnjax.ops.formulas`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax.ops.formulas import pad_input, window_of
from cnnjax.ops.geometry import ConvSpec

Array = jax.Array

# a product a group is quick to run and slow to compile: with more groups than this (of k x k and of
# 1x1 kernels) the groups become the batch axis of one product, which costs a transposition
_UNROLL, _UNROLL_1X1 = 4, 8


def _batched(spec: ConvSpec, kernel: tuple[int, int]) -> bool:
    return spec.groups > (_UNROLL_1X1 if kernel == (1, 1) else _UNROLL)


def _split(a: Array, groups: int) -> Array:
    """(..., groups * c) -> (groups, ..., c)."""
    return jnp.moveaxis(a.reshape(*a.shape[:-1], groups, a.shape[-1] // groups), -2, 0)


def _join(a: Array) -> Array:
    """The inverse of `_split`."""
    a = jnp.moveaxis(a, 0, -2)
    return a.reshape(*a.shape[:-2], -1)


def _taps(spec: ConvSpec, size: tuple[int, int], kernel: tuple[int, int]) -> list[tuple[int, int]]:
    """The kernel's positions (i, j) that see a pixel of the image somewhere: on a map smaller than
    the kernel many see padding alone."""
    out = spec.out_size(size, kernel)
    axes = []
    for n, k, m, s, d, (low, _) in zip(
        size, kernel, out, spec.strides, spec.dilation, spec.padding
    ):
        seen = [any(0 <= i * d - low + t * s < n for t in range(m)) for i in range(k)]
        axes.append([i for i in range(k) if seen[i]])
    return [(i, j) for i in axes[0] for j in axes[1]]


def _products(
    a: Array, b: Array, spec: ConvSpec, contract: tuple[int, int], batched: bool, precision: Any
) -> Array:
    """For each group the matrix product of its part of ``a`` and of ``b``.

    Args:
      a: (P, groups * A), or (groups, P, A) if batched.
      b: (Q, groups * B), or (groups, Q, B) if batched.
      spec: has the number of groups.
      contract: which axis of a group's (P, A) and of its (Q, B) is summed over.
      batched: one product with a batch axis instead of a product a group.
      precision: as in ``lax``.

    Returns:
      (the other axis of a, groups * the other axis of b), or with the groups in front if batched.
    """
    if batched:
        axes = ((1 + contract[0],), (1 + contract[1],))
        return lax.dot_general(a, b, (axes, ((0,), (0,))), precision=precision)
    groups = spec.groups
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


def _flat(a: Array, batched: bool) -> Array:
    """All pixels on one axis: (N, H, W, C) -> (P, C), or (g, N, H, W, C) -> (g, P, C)."""
    return a.reshape(a.shape[0], -1, a.shape[-1]) if batched else a.reshape(-1, a.shape[-1])


def _window(
    xp: Array, i: int, j: int, out: tuple[int, int], spec: ConvSpec, batched: bool
) -> Array:
    """What tap (i, j) sees, flat; the groups and images of a batched layout are one axis first."""
    if not batched:
        return _flat(window_of(xp, i, j, out, spec), False)
    merged = xp.reshape(-1, *xp.shape[2:])
    return window_of(merged, i, j, out, spec).reshape(xp.shape[0], -1, xp.shape[-1])


def dot_forward(x: Array, kernel: Array, spec: ConvSpec, precision: Any = None) -> Array:
    """Any convolution as one matrix product a tap and group (one a group for 1x1)."""
    kh, kw, _, c_out = kernel.shape
    n, h, w, _ = x.shape
    out = spec.out_size((h, w), (kh, kw))
    batched = _batched(spec, (kh, kw))
    xp = pad_input(x, spec)
    if batched:
        xp, kernel = _split(xp, spec.groups), jnp.moveaxis(_split(kernel, spec.groups), 0, 2)
    total = None
    for i, j in _taps(spec, (h, w), (kh, kw)):
        window = _window(xp, i, j, out, spec, batched)
        term = _products(window, kernel[i, j], spec, (1, 0), batched, precision)
        total = term if total is None else total + term
    if total is None:
        return jnp.zeros((n, *out, c_out), x.dtype)
    return (_join(total) if batched else total).reshape(n, *out, c_out)


def dot_input_grad(
    ct: Array, kernel: Array, spec: ConvSpec, size: tuple[int, int], precision: Any = None
) -> Array:
    """The transpose of :func:`dot_forward` in ``x``: products, then shifted sums for k > 1."""
    kh, kw, c_group, _ = kernel.shape
    n, ho, wo, _ = ct.shape
    (sh, sw), (dh, dw) = spec.strides, spec.dilation
    top, left = spec.padding[0][0], spec.padding[1][0]
    batched = _batched(spec, (kh, kw))
    if batched:
        ct, kernel = _split(ct, spec.groups), jnp.moveaxis(_split(kernel, spec.groups), 0, 2)
    flat = _flat(ct, batched)
    total = None
    for i, j in _taps(spec, size, (kh, kw)):
        # (pixels, C_out) x (C_in / groups, C_out): per group, summed over its outputs
        term = _products(flat, kernel[i, j], spec, (1, 1), batched, precision)
        term = term.reshape(-1, ho, wo, term.shape[-1])
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
    if total is None:
        return jnp.zeros((n, *size, c_group * spec.groups), ct.dtype)
    return _join(total.reshape(spec.groups, n, *size, c_group)) if batched else total


def dot_kernel_grad(
    x: Array, ct: Array, spec: ConvSpec, kernel_size: tuple[int, int], precision: Any = None
) -> Array:
    """The transpose of :func:`dot_forward` in ``kernel``: one product over all pixels a tap."""
    kh, kw = kernel_size
    out = (ct.shape[1], ct.shape[2])
    batched = _batched(spec, (kh, kw))
    seen = _taps(spec, (x.shape[1], x.shape[2]), (kh, kw))
    shape = (x.shape[-1] // spec.groups, ct.shape[-1])
    xp = pad_input(x, spec)
    if batched:
        xp, ct = _split(xp, spec.groups), _split(ct, spec.groups)
    flat_ct = _flat(ct, batched)
    taps = []
    for i in range(kh):
        for j in range(kw):
            if (i, j) not in seen:
                taps.append(jnp.zeros(shape, ct.dtype))
                continue
            window = _window(xp, i, j, out, spec, batched)
            term = _products(window, flat_ct, spec, (0, 0), batched, precision)
            taps.append(_join(term) if batched else term)
    return jnp.stack(taps).reshape(kh, kw, *shape)
