"""Synthetic transfer sets: MUNGE and the independent-marginals baseline."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cnnjax.typing import AnyArray

_BLOCK = 512  # rows of the distance matrix held at once

Key = PRNGKeyArray | Array


def _nominal(x: AnyArray, is_nominal: AnyArray | None) -> Array:
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"data of shape {x.shape}: expected (examples, attributes), >= 2 rows")
    if is_nominal is None:
        return jnp.zeros(x.shape[1], bool)
    if is_nominal.shape != (x.shape[1],):
        raise ValueError(f"is_nominal has shape {is_nominal.shape}; expected ({x.shape[1]},)")
    return jnp.asarray(is_nominal, bool)


@jax.jit
def nearest_neighbours(
    x: Float[AnyArray, "n d"], is_nominal: Bool[AnyArray, " d"]
) -> Int[Array, " n"]:
    """Index of each row's nearest other row; ties go to the lower index.

    Distance: squared Euclidean on standardised continuous attributes plus the number of unequal
    nominal ones. A block of rows of the distance matrix is held at a time.
    """
    x = jnp.asarray(x, jnp.float32)
    n = x.shape[0]
    spread = x.std(0)
    standard = jnp.where(is_nominal, 0.0, (x - x.mean(0)) / jnp.where(spread > 0, spread, 1.0))

    def one(index):
        squares = jnp.sum((standard - standard[index]) ** 2, axis=-1)
        mismatches = jnp.sum((x != x[index]) & is_nominal, axis=-1)
        distance = (squares + mismatches).at[index].set(jnp.inf)
        return jnp.argmin(distance)

    return jax.lax.map(one, jnp.arange(n), batch_size=min(_BLOCK, n)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="k")
def _munge(key, x, is_nominal, k, p, s):
    neighbours = nearest_neighbours(x, is_nominal)
    n, d = x.shape

    def one_pass(key):
        def visit(data, inputs):
            index, key = inputs
            swap_key, first_key, second_key = jax.random.split(key, 3)
            other = neighbours[index]
            e, f = data[index], data[other]
            chosen = jax.random.bernoulli(swap_key, p, (d,))
            deviation = jnp.where(is_nominal, 0.0, jnp.abs(e - f) / s)
            new_e = f + deviation * jax.random.normal(first_key, (d,))
            new_f = e + deviation * jax.random.normal(second_key, (d,))
            data = data.at[index].set(jnp.where(chosen, new_e, e))
            data = data.at[other].set(jnp.where(chosen, new_f, f))
            return data, None

        keys = jax.random.split(key, n)
        return jax.lax.scan(visit, x, (jnp.arange(n), keys))[0]

    return jax.vmap(one_pass)(jax.random.split(key, k)).reshape(k * n, d)


def munge(
    key: Key,
    x: Float[AnyArray, "n d"],
    is_nominal: Bool[AnyArray, " d"] | None = None,
    *,
    k: int = 1,
    p: float = 0.3,
    s: float = 4.0,
) -> Float[Array, "kn d"]:
    """Synthetic examples near the data: neighbours exchange attributes, with noise.

    For every example, in order, and its nearest neighbour (found once, on ``x``): each attribute
    with probability ``p`` is exchanged; a continuous one with Gaussian noise of standard
    deviation ``|difference| / s``. Small ``p`` or large ``s`` stays near the data; ``s=inf``
    only swaps values.

    Args:
      key: random key.
      x: (n, d) attributes; flatten images first and clip the result to their range.
      is_nominal: (d,) True where an attribute is nominal (only swapped); None: all continuous.
      k: number of passes; the result has ``k * n`` rows.
      p: probability of an exchange, in [0, 1].
      s: variance parameter, positive.

    Raises:
      ValueError: for arguments out of range or shapes that do not fit.

    Reference:
      Bucila, Caruana, Niculescu-Mizil, "Model compression", KDD 2006.
    """
    nominal = _nominal(x, is_nominal)
    if k < 1:
        raise ValueError(f"k is {k}; the size multiplier must be at least 1")
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; the swap probability must lie in [0, 1]")
    if not s > 0:
        raise ValueError(f"s is {s}; the variance parameter must be positive")
    return _munge(key, jnp.asarray(x, jnp.float32), nominal, k, p, s)


def independent_marginals(key: Key, x: Float[AnyArray, "n d"], *, size: int) -> Array:
    """The ``random`` baseline: each attribute drawn independently from its column of ``x``.

    Returns:
      (size, d).
    """
    if size < 1:
        raise ValueError(f"size is {size}; expected at least 1")
    x = jnp.asarray(x)
    rows = jax.random.randint(key, (size, x.shape[1]), 0, x.shape[0])
    return jnp.take_along_axis(x, rows, axis=0)
