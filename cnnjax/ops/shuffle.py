"""Channel shuffle as each platform runs it fastest: one primitive, the same numbers everywhere.

Its parameter ``call_jaxpr`` says what it does in plain operations, for whoever reads a jaxpr.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from cnnjax.ops import choice
from cnnjax.ops.geometry import ShuffleCase
from cnnjax.ops.primitives import eagerly
from cnnjax.ops.table import in_force

SHUFFLE = Primitive("cnnjax_channel_shuffle")


def transposed(x: Array, groups: int) -> Array:
    """(g, C/g) -> (C/g, g) on the last axis."""
    y = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return jnp.swapaxes(y, -1, -2).reshape(x.shape)


def stacked(x: Array, groups: int) -> Array:
    """The same by slices: g of them side by side, or where that is fewer, C/g one after another."""
    inner = x.shape[-1] // groups
    if groups <= inner:
        return jnp.stack(jnp.split(x, groups, -1), -1).reshape(x.shape)
    y = x.reshape(*x.shape[:-1], groups, inner)
    return jnp.concatenate([y[..., i] for i in range(inner)], axis=-1)


FORMS = {"native": transposed, "stack": stacked}


@functools.lru_cache(maxsize=1024)
def _meaning(shape: tuple[int, ...], dtype: Any, groups: int) -> ClosedJaxpr:
    like = jax.ShapeDtypeStruct(shape, dtype)
    return jax.make_jaxpr(lambda x: transposed(x, groups))(like)


def _bind(x: Array, groups: int, table: Any) -> Array:
    meaning = _meaning(x.shape, x.dtype, groups)
    return SHUFFLE.bind(x, groups=groups, table=table, call_jaxpr=meaning)


def case_of(x: Any, groups: int) -> ShuffleCase:
    """The key of a table for a shuffle of this array (or its abstract value)."""
    return ShuffleCase(tuple(x.shape), groups, jnp.dtype(x.dtype).name)


def _lower(platform: str | None, x: Array, *, groups: int, table: Any, call_jaxpr: Any) -> Array:
    form = choice.choose_shuffle(case_of(x, groups), platform=platform, table=table)
    return FORMS[form](x, groups)


for _platform in (*choice.PLATFORMS, None):
    _rule = mlir.lower_fun(functools.partial(_lower, _platform), multiple_results=False)
    mlir.register_lowering(SHUFFLE, _rule, platform=_platform)
SHUFFLE.def_abstract_eval(lambda x, **_: x.update(weak_type=False))
SHUFFLE.def_impl(eagerly(SHUFFLE, ("groups", "table", "call_jaxpr")))
# the transpose of a permutation is its inverse
ad.deflinear2(
    SHUFFLE,
    lambda ct, x, groups, table, call_jaxpr: [_bind(ct, ct.shape[-1] // groups, table)],
)


def _batch(args: Any, dims: Any, *, groups: int, table: Any, call_jaxpr: Any) -> Any:
    return _bind(jnp.moveaxis(args[0], dims[0], 0), groups, table), 0


batching.primitive_batchers[SHUFFLE] = _batch


def channel_shuffle(x: Float[Array, "*batch c"], groups: int) -> Float[Array, "*batch c"]:
    """Interleaves the groups of the last axis: (g, C/g) -> (C/g, g).

    ShuffleNet, Zhang et al., CVPR 2018, 1707.01083.

    Raises:
      ValueError: if the groups don't divide the channels.
    """
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups don't divide {channels} channels")
    return x if groups in (1, channels) else _bind(x, groups, in_force())
