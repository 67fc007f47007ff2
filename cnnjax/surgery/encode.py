"""Static attributes as JSON and back: numbers, tuples, dtypes, named functions; never code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from cnnjax.errors import did_you_mean


class NotEncodable(TypeError):
    """The value has no JSON form that can be read back without running stored code."""


# functions that may appear in a description, by name; a name that is not here is refused
_FUNCTION_ROOMS = {"jax.nn": jax.nn, "jax.numpy": jnp, "flax.nnx": nnx}


def _function_name(value: Any) -> str | None:
    name = getattr(value, "__name__", None)
    for room, module in _FUNCTION_ROOMS.items():
        if name and getattr(module, name, None) is value:
            return f"{room}:{name}"
    return None


def _is_dtype(value: Any) -> bool:
    if isinstance(value, np.dtype):
        return True
    return isinstance(value, type(jnp.float32)) or (
        isinstance(value, type) and issubclass(value, np.generic)
    )


def encode(value: Any) -> Any:
    """The JSON form of a static attribute.

    Raises:
      NotEncodable: for anything but numbers, strings, None, tuples, mappings, dtypes and public
        functions of ``jax.nn``, ``jax.numpy`` and ``flax.nnx``.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.integer | np.floating | np.bool_):
        return value.item()
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    if isinstance(value, Mapping):
        return {"mapping": [[encode(k), encode(v)] for k, v in value.items()]}
    if _is_dtype(value):
        return {"dtype": np.dtype(value).name}
    if isinstance(value, jax.lax.Precision):
        return {"precision": value.name}
    if (name := _function_name(value)) is not None:
        return {"function": name}
    raise NotEncodable(f"{value!r} of type {type(value).__name__} has no JSON form")


def decode(value: Any) -> Any:
    """The inverse of `encode`; lists come back as tuples, which are hashable.

    Raises:
      ValueError: for a function name or a form that is not known.
    """
    if isinstance(value, list):
        return tuple(decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, body),) = value.items()
        if kind == "dtype":
            return jnp.dtype(body)
        if kind == "precision":
            return jax.lax.Precision[body]
        if kind == "mapping":
            return FrozenDict({decode(k): decode(v) for k, v in body})
        if kind == "function":
            room, _, name = str(body).partition(":")
            found = getattr(_FUNCTION_ROOMS.get(room), name, None)
            if found is None or not callable(found):
                raise ValueError(
                    f"unknown function {body!r}; allowed are public functions of "
                    f"{', '.join(_FUNCTION_ROOMS)}"
                )
            return found
        raise ValueError(
            f"unknown encoded value {kind!r}."
            + did_you_mean(kind, ["dtype", "precision", "mapping", "function"])
        )
    raise ValueError(f"unknown encoded value {value!r}")


def same(a: Any, b: Any) -> bool:
    """Whether two static attributes mean the same: equal, the same dtype, the same function."""
    if a is b:
        return True
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if _is_dtype(a) and _is_dtype(b):
        return np.dtype(a) == np.dtype(b)
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    try:
        if bool(a == b):
            return True
    except Exception:
        return False
    return _same_callable(a, b)


def _same_callable(a: Any, b: Any) -> bool:
    # two lambdas of one line, or two partials of one function, made by two calls of a factory
    if hasattr(a, "func") and hasattr(b, "func"):
        return (_same_callable(a.func, b.func) or a.func is b.func) and same(
            (a.args, tuple(a.keywords.items())), (b.args, tuple(b.keywords.items()))
        )
    code_a, code_b = getattr(a, "__code__", None), getattr(b, "__code__", None)
    if code_a is None or code_a is not code_b:
        return False
    cells_a, cells_b = a.__closure__ or (), b.__closure__ or ()
    return len(cells_a) == len(cells_b) and all(
        same(x.cell_contents, y.cell_contents) for x, y in zip(cells_a, cells_b)
    )
