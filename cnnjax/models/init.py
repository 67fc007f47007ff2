"""Initialisers whose eager creation is quick.

JAX compiles a random draw once per shape, which makes the creation of a large network slow. Here
the draw is flat and its size rounded up to a power of two, so that all networks share some twenty
compiled draws. The values are the same with and without ``jax.jit``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., Any]

_SKIP = contextvars.ContextVar("cnnjax_skip_draws", default=False)


@contextlib.contextmanager
def without_draws() -> Iterator[None]:
    """Within it random initialisers give zeros: for a model whose arrays are set right after."""
    token = _SKIP.set(True)
    try:
        yield
    finally:
        _SKIP.reset(token)


@functools.partial(jax.jit, static_argnames=("size", "uniform"))
def _flat(key: Any, size: int, uniform: bool) -> Any:
    if uniform:
        return jax.random.uniform(key, (size,), jnp.float32, -1.0, 1.0)
    return jax.random.normal(key, (size,), jnp.float32)


def _draw(key: Any, shape: tuple[int, ...], scale: float, dtype: Any, uniform: bool) -> Any:
    if _SKIP.get():
        if isinstance(key, jax.core.Tracer):
            return jnp.zeros(shape, dtype)
        return jnp.asarray(np.zeros(shape, np.float32), dtype)
    count = int(math.prod(shape))  # a NumPy width is one too
    size = max(1024, 1 << (count - 1).bit_length())
    flat = _flat(key, size, uniform)
    if not isinstance(flat, jax.core.Tracer):
        # NumPy cuts and scales without compiling anything
        flat = np.asarray(flat)
    return jnp.asarray(flat[:count].reshape(shape) * np.float32(scale), dtype)


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    window = math.prod(shape[:-2])
    return window * shape[-2], window * shape[-1]


def normal(std: float) -> Initializer:
    """Gaussian with a fixed standard deviation."""

    def init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Any:
        return _draw(key, tuple(shape), std, dtype, False)

    return init


@functools.cache
def he_normal(fan: str = "out") -> Initializer:
    """Gaussian of variance 2 / fan (He et al. 2015, 1502.01852); ``fan`` is ``in`` or ``out``."""

    def init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Any:
        fans = _fans(tuple(shape))
        std = math.sqrt(2.0 / fans[0 if fan == "in" else 1])
        return _draw(key, tuple(shape), std, dtype, False)

    return init


@functools.cache
def uniform_fan_in(variance: float = 1.0) -> Initializer:
    """Uniform of variance ``variance / fan_in``: Caffe's "xavier" (1) and torch's linear (1/3)."""

    def init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Any:
        limit = math.sqrt(3.0 * variance / _fans(tuple(shape))[0])
        return _draw(key, tuple(shape), limit, dtype, True)

    return init


@functools.cache
def constant(value: float) -> Initializer:
    """Every entry is ``value``."""

    def init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Any:
        return jnp.asarray(np.full(shape, value, np.float32), dtype)

    return init
