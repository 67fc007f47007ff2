"""Small networks of many topologies, each in its own style: what a user might write.

``build(name)`` gives a module with random values and its inputs; ``CASES`` says what's expected.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

IMAGE = (2, 8, 8, 3)


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[[nnx.Rngs], nnx.Module]
    inputs: tuple[tuple[int, ...], ...]
    statistic: bool
    tags: frozenset[str]


CASES: dict[str, Case] = {}


def case(name: str, *inputs: tuple[int, ...], statistic: bool = False, tags: str = "", **fields):
    """Registers a module class (with constructor fields) under a name."""

    def put(cls: Any) -> Any:
        make = lambda rngs: cls(rngs=rngs, **fields)  # noqa: E731
        CASES[name] = Case(make, inputs or (IMAGE,), statistic, frozenset(tags.split()))
        return cls

    return put


def fill(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """Random values for an abstract module, without compiling an initializer."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(model)

    def leaf(path: Any, a: Any) -> Any:
        text = jax.tree_util.keystr(path)
        if "count" in text or not jnp.issubdtype(a.dtype, jnp.floating):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                return jax.random.key(0)
            return jnp.zeros(a.shape, a.dtype)
        if "'var'" in text:
            return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)
        scale = 0.3 if len(a.shape) < 2 else 1.5 / np.sqrt(max(1, np.prod(a.shape[:-1])))
        return jnp.asarray(scale * rng.standard_normal(a.shape) + 0.1, a.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(leaf, state))


@functools.cache
def abstract(name: str) -> nnx.Module:
    """The module with abstract leaves."""
    return nnx.eval_shape(lambda: CASES[name].make(nnx.Rngs(0)))


def build(name: str, seed: int = 0) -> tuple[nnx.Module, tuple[jax.Array, ...]]:
    """A module of the zoo with random values, and random inputs."""
    rng = np.random.default_rng(seed + 1)
    inputs = tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in CASES[name].inputs)
    return fill(abstract(name), seed), inputs


def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1, bias: bool = False, **kw: Any) -> Any:
    """A convolution with SAME padding."""
    return nnx.Conv(i, o, (k, k), strides=(s, s), feature_group_count=g, use_bias=bias, **kw)


class ConvBN(nnx.Module):
    def __init__(self, i, o, k=3, s=1, g=1, act=True, *, rngs):
        self.conv = conv(i, o, k, s, g, rngs=rngs)
        self.bn = nnx.BatchNorm(o, rngs=rngs)
        self.act = act

    def __call__(self, x):
        x = self.bn(self.conv(x))
        return nnx.relu(x) if self.act else x


class Head(nnx.Module):
    def __init__(self, i, *, rngs):
        self.fc = nnx.Linear(i, 5, rngs=rngs)

    def __call__(self, x):
        return self.fc(x.mean(axis=(1, 2)))


class Basic(nnx.Module):
    def __init__(self, i, o, s=1, *, rngs):
        self.a = ConvBN(i, o, s=s, rngs=rngs)
        self.b = ConvBN(o, o, act=False, rngs=rngs)
        self.down = ConvBN(i, o, 1, s, act=False, rngs=rngs) if s > 1 or i != o else None

    def __call__(self, x):
        return nnx.relu(self.b(self.a(x)) + (x if self.down is None else self.down(x)))
