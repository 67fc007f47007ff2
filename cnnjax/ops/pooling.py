"""Max pooling whose gradient is fast on every platform; the same numbers as ``nnx.max_pool``.

XLA:CPU runs the gradient of ``reduce_window`` (``select_and_scatter``) one window at a time. There
it is written as comparisons of shifted slices instead (``benchmarks/pool_forms.py``); elsewhere
JAX's own gradient stays. Both give it to the first of equal values in a window.

The derivative is two linear primitives, each the transpose of the other, which also know the
pool's input: ``pick`` (a tangent, forward mode) and ``spread`` (a cotangent, reverse mode).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Shaped

from cnnjax.ops import choice, primitives

Pads = tuple[tuple[int, int], tuple[int, int]]


def _native(x: Array, window: tuple[int, int], strides: tuple[int, int], pads: Pads) -> Array:
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), ((0, 0), *pads, (0, 0))
    )


def _taps(x: Array, fill: float, window: Any, strides: Any, pads: Pads, out: Any) -> list[Array]:
    """What each place of the window sees: kh * kw arrays (N, *out, C)."""
    (top, bottom), (left, right) = pads
    edges = ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0))
    x = lax.pad(x, jnp.asarray(fill, x.dtype), edges)
    last = [s * (n - 1) + 1 for s, n in zip(strides, out)]
    return [
        x[:, i : i + last[0] : strides[0], j : j + last[1] : strides[1]]
        for i in range(window[0])
        for j in range(window[1])
    ]


def _firsts(x: Array, y: Array, window: Any, strides: Any, pads: Pads) -> list[Array]:
    """For each place of the window, where it holds the first of the largest values."""
    done, firsts = jnp.zeros(y.shape, bool), []
    for tap in _taps(x, -jnp.inf, window, strides, pads, y.shape[1:3]):
        hit = (tap == y) & ~done
        done = done | hit
        firsts.append(hit)
    return firsts


def _pick_slices(t: Array, x: Array, window: Any, strides: Any, pads: Pads) -> Array:
    y = _native(x, window, strides, pads)
    taps = _taps(t, 0.0, window, strides, pads, y.shape[1:3])
    firsts = _firsts(x, y, window, strides, pads)
    return functools.reduce(jnp.add, [jnp.where(f, tap, 0) for f, tap in zip(firsts, taps)])


def _spread_slices(ct: Array, x: Array, window: Any, strides: Any, pads: Pads) -> Array:
    """Sums on a grid of strides by strides blocks, so that no slice is spread out by zeros."""
    firsts = _firsts(x, _native(x, window, strides, pads), window, strides, pads)
    (top, left), (sh, sw) = (p[0] for p in pads), strides
    size, out = x.shape[1:3], ct.shape[1:3]
    # as many blocks as hold the input and every window
    ends = [s * (o - 1) + k for s, o, k in zip(strides, out, window)]
    reach = [max(p[0] + n, end) for p, n, end in zip(pads, size, ends)]
    rows, columns = (-(-r // s) for r, s in zip(reach, strides))
    blocks: dict[tuple[int, int], Array] = {}
    for place, first in enumerate(firsts):
        (down, i), (over, j) = divmod(place // window[1], sh), divmod(place % window[1], sw)
        edges = ((0, 0, 0), (down, rows - out[0] - down, 0), (over, columns - out[1] - over, 0))
        part = lax.pad(jnp.where(first, ct, 0), jnp.zeros((), ct.dtype), (*edges, (0, 0, 0)))
        blocks[i, j] = blocks[i, j] + part if (i, j) in blocks else part
    none = jnp.zeros((x.shape[0], rows, columns, x.shape[3]), ct.dtype)
    grid = [jnp.stack([blocks.get((i, j), none) for j in range(sw)], 3) for i in range(sh)]
    whole = jnp.stack(grid, 2).reshape(x.shape[0], rows * sh, columns * sw, x.shape[3])
    return whole[:, top : top + size[0], left : left + size[1]]


def _pick_native(t: Array, x: Array, *where: Any) -> Array:
    return jax.jvp(lambda x: _native(x, *where), (x,), (t,))[1]


def _spread_native(ct: Array, x: Array, *where: Any) -> Array:
    return jax.vjp(lambda x: _native(x, *where), x)[1](ct)[0]


_PICK, _SPREAD = Primitive("cnnjax_max_pool_tangent"), Primitive("cnnjax_max_pool_grad")


def _define(
    primitive: Primitive, other: Primitive, forms: Mapping[str, Callable[..., Any]],
    shape: Callable[..., tuple[int, ...]],
) -> None:  # fmt: skip
    """Both are linear in their first array and constant (almost everywhere) in the second."""

    def abstract(v: Any, x: Any, **where: Any) -> Any:
        return v.update(shape=shape(x, **where), weak_type=False)

    def lower(
        form: Callable[..., Any], v: Array, x: Array, *, window: Any, strides: Any, pads: Any
    ) -> Any:
        return form(v, x, window, strides, pads)

    def transpose(ct: Any, v: Any, x: Array, **where: Any) -> list[Any]:
        if type(ct) is ad.Zero:
            return [ad.Zero(v.aval), None]
        return [other.bind(ct, x, **where), None]

    def batch(args: Any, dims: Any, **where: Any) -> tuple[Array, int]:
        size = next(a.shape[d] for a, d in zip(args, dims) if d is not None)
        moved = [
            jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
            for a, d in zip(args, dims)
        ]
        out = primitive.bind(*(a.reshape(-1, *a.shape[2:]) for a in moved), **where)
        return out.reshape(size, -1, *out.shape[1:]), 0

    primitive.def_abstract_eval(abstract)
    for platform in (*choice.PLATFORMS, None):
        form = forms[choice.choose_pool(platform=platform)]
        rule = mlir.lower_fun(functools.partial(lower, form), multiple_results=False)
        mlir.register_lowering(primitive, rule, platform=platform)
    primitive.def_impl(primitives.eagerly(primitive, ("window", "strides", "pads")))
    ad.defjvp(primitive, lambda t, v, x, **where: primitive.bind(t, x, **where), None)
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch


def _out_shape(x: Any, *, window: Any, strides: Any, pads: Pads) -> tuple[int, ...]:
    size = [(n + sum(p) - k) // s + 1 for n, p, k, s in zip(x.shape[1:3], pads, window, strides)]
    return (x.shape[0], *size, x.shape[3])


_PICKS = {"slices": _pick_slices, "native": _pick_native}
_SPREADS = {"slices": _spread_slices, "native": _spread_native}
_define(_PICK, _SPREAD, _PICKS, _out_shape)
_define(_SPREAD, _PICK, _SPREADS, lambda x, **_: x.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _pool(x: Array, window: tuple[int, int], strides: tuple[int, int], pads: Pads) -> Array:
    return _native(x, window, strides, pads)


@_pool.defjvp
def _pool_jvp(window: Any, strides: Any, pads: Pads, primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    y = _pool(x, window, strides, pads)
    return y, _PICK.bind(t, x, window=window, strides=strides, pads=pads)


def max_pool(
    x: Shaped[Array | np.ndarray, "*image"],
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "VALID",
) -> Shaped[Array, "*pooled"]:
    """Max pooling with the arguments of ``nnx.max_pool``, and a gradient that is fast on CPU too.

    A window that holds a NaN passes no gradient on there.

    Args:
      x: images, NHWC; anything else goes to ``nnx.max_pool`` as it is.
      window_shape: (kh, kw), in pixels.
      strides: (sh, sw), 1 by default.
      padding: ``"SAME"``, ``"VALID"`` or a pair of pixels for each axis; padded places never win.
    """
    x = jnp.asarray(x)
    strides = tuple(strides) if strides is not None else (1,) * len(window_shape)
    plain = x.ndim != 4 or len(window_shape) != 2 or not jnp.issubdtype(x.dtype, jnp.floating)
    if plain:
        return nnx.max_pool(x, window_shape, strides, padding)
    window: Any = tuple(window_shape)
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    else:
        pads = padding
    return _pool(x, window, strides, tuple((int(a), int(b)) for a, b in pads))  # pyright: ignore


@jax.custom_jvp
def _largest(x: Array) -> Array:
    return jnp.max(x, axis=-1)


@_largest.defjvp
def _largest_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    chosen = jnp.arange(x.shape[-1]) == jnp.argmax(x, axis=-1, keepdims=True)
    return _largest(x), jnp.where(chosen, t, 0).sum(-1)


def maxout(x: Shaped[Array | np.ndarray, "*maps"], pieces: int) -> Shaped[Array, "*units"]:
    """(..., U * k) -> (..., U): unit u is the maximum of channels u k ... u k + k - 1.

    The first of equal channels gets the gradient. ``jnp.max`` shares it among the channels that
    equal the maximum: where XLA computes the channels once more, rounded otherwise, for the
    backward pass, that is none of them, and the gradient 0 / 0.

    Raises:
      ValueError: if k doesn't divide the channels.
    """
    x = jnp.asarray(x)
    if pieces < 1 or x.shape[-1] % pieces:
        raise ValueError(f"{pieces} pieces don't divide {x.shape[-1]} channels")
    return _largest(x.reshape(*x.shape[:-1], -1, pieces))
