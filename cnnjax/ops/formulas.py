"""Convolution as ``lax`` has it, and depthwise convolution as shifted multiply-adds.

Each formula computes one of the three bilinear maps of a convolution:

* ``forward(x, kernel) -> y``
* ``input_grad(ct, kernel, input_size) -> dx`` (the transpose in ``x``)
* ``kernel_grad(x, ct, kernel_size) -> dkernel`` (the transpose in ``kernel``)

All arrays are NHWC and HWIO. They are ordinary JAX code, right on every platform; which one runs
where is decided in :mod:`cnnjax.ops.choice`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax.ops.geometry import ConvSpec

Array = jax.Array
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def _wide(*arrays: Array) -> tuple[Array, ...]:
    """Sums of many terms run in float32 at least; the caller casts back."""
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return tuple(a.astype(dtype) for a in arrays)


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """Within ``jax.shard_map``: both arrays vary over the same mesh axes, as ``lax`` sees to."""
    axes = []
    for a in arrays:
        kind = jax.typeof(a)
        manual = getattr(kind, "manual_axis_type", None)
        axes.append(getattr(kind, "vma", frozenset()) if manual is None else manual.varying)
    union = frozenset().union(*axes)
    return tuple(
        lax.pcast(a, tuple(sorted(union - own)), to="varying") if union - own else a
        for a, own in zip(arrays, axes)
    )


def pad_input(x: Array, spec: ConvSpec) -> Array:
    """Spatial zero padding (or cropping, for negative pads)."""
    (top, bottom), (left, right) = spec.padding
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)))


def window_of(xp: Array, i: int, j: int, out: tuple[int, int], spec: ConvSpec) -> Array:
    """The padded input's pixels that tap (i, j) of the kernel sees: (N, Ho, Wo, C)."""
    (sh, sw), (dh, dw) = spec.strides, spec.dilation
    n, _, _, c = xp.shape
    limits = (n, i * dh + (out[0] - 1) * sh + 1, j * dw + (out[1] - 1) * sw + 1, c)
    return lax.slice(xp, (0, i * dh, j * dw, 0), limits, (1, sh, sw, 1))


# --- native ---------------------------------------------------------------------------------------


def native_forward(x: Array, kernel: Array, spec: ConvSpec, precision: Any = None) -> Array:
    """``lax.conv_general_dilated`` in this library's layout."""
    return lax.conv_general_dilated(
        x,
        kernel,
        spec.strides,
        spec.padding,
        rhs_dilation=spec.dilation,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=spec.groups,
        precision=precision,
    )


def native_input_grad(
    ct: Array, kernel: Array, spec: ConvSpec, size: tuple[int, int], precision: Any = None
) -> Array:
    """The transpose in ``x`` of :func:`native_forward`."""
    shape = (ct.shape[0], *size, kernel.shape[2] * spec.groups)
    like = jax.ShapeDtypeStruct(shape, ct.dtype)
    return jax.linear_transpose(lambda x: native_forward(x, kernel, spec, precision), like)(ct)[0]


def native_kernel_grad(
    x: Array, ct: Array, spec: ConvSpec, kernel_size: tuple[int, int], precision: Any = None
) -> Array:
    """The transpose in ``kernel`` of :func:`native_forward`."""
    shape = (*kernel_size, x.shape[3] // spec.groups, ct.shape[3])
    like = jax.ShapeDtypeStruct(shape, ct.dtype)
    return jax.linear_transpose(lambda k: native_forward(x, k, spec, precision), like)(ct)[0]


# --- depthwise as shifted multiply-adds -----------------------------------------------------------


def shift_forward(x: Array, kernel: Array, spec: ConvSpec, precision: Any = None) -> Array:
    """Depthwise convolution: over the taps, the sum of shifted inputs times a number a channel."""
    del precision
    dtype = x.dtype
    x, kernel = _wide(x, kernel)
    kh, kw, _, c_out = kernel.shape
    n, h, w, c = x.shape
    out = spec.out_size((h, w), (kh, kw))
    taps = kernel.reshape(kh, kw, c, c_out // c)
    xp = pad_input(x, spec)
    total = jnp.zeros((), x.dtype)
    for i in range(kh):
        for j in range(kw):
            window = window_of(xp, i, j, out, spec)
            if c_out == c:
                total = total + window * taps[i, j, :, 0]
            else:
                total = total + window[..., None] * taps[i, j]
    return jnp.broadcast_to(total.reshape(n, *out, c_out), (n, *out, c_out)).astype(dtype)


def _phase_axis(k: int, s: int, d: int, lo: int) -> list[list[tuple[int, int]]]:
    """For each phase p its (tap, offset) pairs: dx[s q + p] = sum ct[q + offset] kernel[tap]."""
    return [
        [(i, (p + lo - i * d) // s) for i in range(k) if (p + lo - i * d) % s == 0]
        for p in range(s)
    ]


def shift_input_grad(
    ct: Array, kernel: Array, spec: ConvSpec, size: tuple[int, int], precision: Any = None
) -> Array:
    """The transpose of :func:`shift_forward` in ``x``.

    With strides the rows and columns of ``dx`` fall into phases, each its own small sum over the
    taps that reach it: as many multiply-adds as the forward pass, none with an inserted zero.
    """
    del precision
    dtype = ct.dtype
    ct, kernel = _wide(ct, kernel)
    kh, kw, _, c_out = kernel.shape
    c = spec.groups
    n, ho, wo, _ = ct.shape
    (sh, sw), (dh, dw) = spec.strides, spec.dilation
    rows = _phase_axis(kh, sh, dh, spec.padding[0][0])
    cols = _phase_axis(kw, sw, dw, spec.padding[1][0])
    quotient = (-(-size[0] // sh), -(-size[1] // sw))
    pads = []
    for phases, q, m in ((rows, quotient[0], ho), (cols, quotient[1], wo)):
        offsets = [e for phase in phases for _, e in phase] or [0]
        pads.append((max(0, -min(offsets)), max(0, q - 1 + max(offsets) - (m - 1))))
    ctp = lax.pad(ct, jnp.zeros((), ct.dtype), ((0, 0, 0), (*pads[0], 0), (*pads[1], 0), (0, 0, 0)))
    taps = kernel.reshape(kh, kw, c, c_out // c)

    def phase(row_taps: list[tuple[int, int]], col_taps: list[tuple[int, int]]) -> Array:
        total = jnp.zeros((n, *quotient, c), ct.dtype)
        for i, a in row_taps:
            for j, b in col_taps:
                at = (0, a + pads[0][0], b + pads[1][0], 0)
                window = lax.dynamic_slice(ctp, at, (n, *quotient, c_out))
                if c_out == c:
                    total = total + window * taps[i, j, :, 0]
                else:
                    total = total + (window.reshape(n, *quotient, c, -1) * taps[i, j]).sum(-1)
        return total

    if (sh, sw) == (1, 1):
        return phase(rows[0], cols[0]).astype(dtype)
    lines = [jnp.stack([phase(r, col) for col in cols], axis=3) for r in rows]
    dx = jnp.stack(lines, axis=2)  # (N, Hq, sh, Wq, sw, C)
    dx = dx.reshape(n, quotient[0] * sh, quotient[1] * sw, c)
    return dx[:, : size[0], : size[1]].astype(dtype)


def shift_kernel_grad(
    x: Array, ct: Array, spec: ConvSpec, kernel_size: tuple[int, int], precision: Any = None
) -> Array:
    """The transpose of :func:`shift_forward` in ``kernel``.

    A loop over output rows accumulates one (Wo, C) buffer a tap, all small enough to stay in
    cache; one sum over Wo at the end.
    """
    del precision
    dtype = ct.dtype
    x, ct = _wide(x, ct)
    kh, kw = kernel_size
    n, _, _, c = x.shape
    _, ho, wo, c_out = ct.shape
    m = c_out // c
    if ho * wo * n == 0:
        return jnp.zeros((kh, kw, 1, c_out), dtype)
    (sh, sw), (dh, dw) = spec.strides, spec.dilation
    xp = pad_input(x, spec)
    reach = (wo - 1) * sw + 1

    def row(r: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        image, at = r // ho, r % ho
        zero = jnp.zeros((), r.dtype)
        ct_row = lax.dynamic_slice(ct, (image, at, zero, zero), (1, 1, wo, c_out))
        ct_row = ct_row.reshape(wo, c, m)
        out = []
        for i in range(kh):
            start = (image, at * sh + i * dh, zero, zero)
            line = lax.dynamic_slice(xp, start, (1, 1, xp.shape[2], c))[0, 0]
            for j in range(kw):
                window = lax.slice(line, (j * dw, 0), (j * dw + reach, c), (sw, 1))
                out.append(sums[i * kw + j] + window[..., None] * ct_row)
        return tuple(out)

    zeros = vary_alike(x, jnp.zeros((wo, c, m), x.dtype))[1]
    start = (zeros,) * (kh * kw)
    sums = lax.fori_loop(0, n * ho, row, start)
    grads = jnp.stack([s.sum(0).reshape(c_out) for s in sums])
    return grads.reshape(kh, kw, 1, c_out).astype(dtype)
