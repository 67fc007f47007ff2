"""The replacement of one layer: a chain of factors as NNX layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from cnnjax import ops
from cnnjax.factorization.chain import Chain, ConvSpec
from cnnjax.factorization.layers import FixedConv, Reorder
from cnnjax.factorization.matrix import svd_dense
from cnnjax.factorization.rules import Ranks, Rule
from cnnjax.factorization.survey import LayerPlan, spec_of


def factor_module(layer: nnx.Conv | nnx.Linear, decided: LayerPlan, key: Any) -> nnx.Module:
    """The replacement of one layer."""
    bias = None if layer.bias is None else layer.bias[...]
    own = decided.rule.module(layer, decided.ranks, key)
    if own is not None:
        return own
    if isinstance(layer, nnx.Linear):
        first, second = svd_dense(layer.kernel[...], decided.ranks[0])
        return nnx.Sequential(_linear(layer, first, None), _linear(layer, second, bias))
    spec = spec_of(layer, decided.path)
    chain = layer_chain(decided.rule, decided.ranks, spec, key, layer.kernel[...], bias)
    return chain_module(chain, layer, decided.rule.fixed_stages)


def layer_chain(
    rule: Rule, ranks: Ranks, spec: ConvSpec, key: Any, kernel: Any, bias: Any = None
) -> Chain:
    """The chain of one kernel, compiled once for each shape, rule and rank."""
    if not rule.compiled:
        return rule.chain(key, kernel, ranks, spec, bias)
    # what only guides the choice of ranks must not cost a compilation
    rule = dataclasses.replace(rule, rank=1.0, depthwise=False, always=False)
    return _compiled_chain(rule, ranks, spec, key, kernel, bias)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled_chain(
    rule: Rule, ranks: Ranks, spec: ConvSpec, key: Any, kernel: Any, bias: Any
) -> Chain:
    return rule.chain(key, kernel, ranks, spec, bias)


def chain_module(chain: Chain, like: nnx.Conv, fixed: tuple[int, ...] = ()) -> nnx.Module:
    """A chain as an ``nnx.Sequential`` of convolutions of the original's class and dtypes.

    A plain ``nnx.Conv`` gives `cnnjax.ops.Conv`, which runs 1x1, grouped and depthwise stages in
    the form that is fastest on the platform.

    Args:
      chain: the factors.
      like: the original layer.
      fixed: stages whose kernels are not trained.
    """
    last = len(chain.kernels) - 1
    orders = chain.orders or (None,) * (last + 2)
    layers: list[nnx.Module] = []
    for k, (kernel, spec) in enumerate(zip(chain.kernels, chain.specs)):
        if orders[k] is not None:
            layers.append(_reorder(orders[k]))
        layers.append(_conv(like, kernel, spec, chain.bias if k == last else None, k in fixed))
    if orders[-1] is not None:
        layers.append(_reorder(orders[-1]))
    return nnx.Sequential(*layers)


def _reorder(order: Any) -> Reorder:
    layer = Reorder(len(order))
    layer.order[...] = jnp.asarray(order, layer.order.dtype)
    return layer


def _conv(like: nnx.Conv, kernel: Any, spec: ConvSpec, bias: Any, fixed: bool) -> nnx.Conv:
    kh, kw, i, o = kernel.shape
    plain = type(like) is nnx.Conv and like.conv_general_dilated is lax.conv_general_dilated
    made = FixedConv if fixed else ops.Conv if plain else type(like)

    def make() -> nnx.Conv:
        return made(
            i * spec.groups,
            o,
            (kh, kw),
            spec.strides,
            padding=spec.padding,
            kernel_dilation=spec.dilation,
            feature_group_count=spec.groups,
            use_bias=bias is not None,
            dtype=like.dtype,
            param_dtype=like.param_dtype,
            precision=like.precision,
            rngs=nnx.Rngs(0),
        )

    return _filled(make, kernel, bias, like.param_dtype)


def _linear(like: nnx.Linear, kernel: Any, bias: Any) -> nnx.Linear:
    def make() -> nnx.Linear:
        return nnx.Linear(
            *kernel.shape,
            use_bias=bias is not None,
            dtype=like.dtype,
            param_dtype=like.param_dtype,
            precision=like.precision,
            rngs=nnx.Rngs(0),
        )

    return _filled(make, kernel, bias, like.param_dtype)


def _filled(make: Any, kernel: Any, bias: Any, dtype: Any) -> Any:
    # the structure without running its initialiser, then the factors' numbers
    layer = nnx.eval_shape(make)
    layer.kernel = type(layer.kernel)(jnp.asarray(kernel, dtype))
    if bias is not None:
        layer.bias = nnx.Param(jnp.asarray(bias, dtype))
    return layer
