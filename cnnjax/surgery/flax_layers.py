"""The mending rules of Flax NNX's own layers, and of our convolution."""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.core import FrozenDict

from cnnjax import ops
from cnnjax.surgery.layers import put, register, shape_of
from cnnjax.surgery.walk import Shape


def _groups(layer: Any, old: dict[str, Shape]) -> int:
    groups = layer.feature_group_count
    if groups == 1:
        return 1
    per_group, features = shape_of(layer, "kernel")[-2:]
    was = old["kernel"]
    if groups == layer.in_features and was[-2] == 1 == per_group:
        # depthwise: one group per input channel, the same multiplier as before
        multiplier = was[-1] // groups
        if features % multiplier:
            raise ValueError(
                f"a depthwise kernel with multiplier {multiplier} cannot have {features} outputs"
            )
        return features // multiplier
    return groups


@register(nnx.Conv)
def _conv(layer: Any, old: dict[str, Shape]) -> None:
    shape = shape_of(layer, "kernel")
    # a group count that the caller changed is taken as given
    if layer.feature_group_count * old["kernel"][-2] == layer.in_features:
        put(layer, feature_group_count=_groups(layer, old))
    groups = layer.feature_group_count
    if shape[-1] % groups:
        raise ValueError(
            f"{shape[-1]} output channels do not divide into {groups} convolution groups; keep the "
            "same number in every group, or whole groups"
        )
    put(layer, kernel_shape=shape, in_features=shape[-2] * groups, out_features=shape[-1])


@register(nnx.ConvTranspose)
def _conv_transpose(layer: Any, old: dict[str, Shape]) -> None:
    shape = shape_of(layer, "kernel")
    ins, outs = (-1, -2) if layer.transpose_kernel else (-2, -1)
    put(layer, kernel_shape=shape, in_features=shape[ins], out_features=shape[outs])


@register(nnx.Linear)
def _linear(layer: Any, old: dict[str, Shape]) -> None:
    ins, outs = shape_of(layer, "kernel")
    put(layer, in_features=ins, out_features=outs)


@register(nnx.LinearGeneral)
def _linear_general(layer: Any, old: dict[str, Shape]) -> None:
    shape = shape_of(layer, "kernel")
    batch, ins = len(layer.batch_axis), len(layer.in_features)
    if batch:
        layer.batch_axis = FrozenDict(dict(zip(layer.batch_axis, shape[:batch])))
    layer.in_features = shape[batch : batch + ins]
    layer.out_features = shape[batch + ins :]


@register(nnx.Einsum)
def _einsum(layer: Any, old: dict[str, Shape]) -> None:
    layer.kernel_shape = shape_of(layer, "kernel")
    if layer.bias_shape is not None:
        layer.bias_shape = shape_of(layer, "bias")


@register(nnx.Embed)
def _embed(layer: Any, old: dict[str, Shape]) -> None:
    layer.num_embeddings, layer.features = shape_of(layer, "embedding")


@register(nnx.BatchNorm)
def _batch_norm(layer: Any, old: dict[str, Shape]) -> None:
    put(layer, num_features=shape_of(layer, "mean")[0])


def _first(layer: Any) -> Shape:
    return shape_of(layer, "scale" if layer.scale is not None else "bias")


@register(nnx.LayerNorm)
def _layer_norm(layer: Any, old: dict[str, Shape]) -> None:
    shape = _first(layer)
    if len(shape) == 1:
        put(layer, num_features=shape[0])


register(nnx.InstanceNorm)(_layer_norm)
register(nnx.RMSNorm)(_layer_norm)


@register(nnx.GroupNorm)
def _group_norm(layer: Any, old: dict[str, Shape]) -> None:
    (features,) = _first(layer)
    # the group count stays unless the caller set another (whole groups removed)
    if features % layer.num_groups:
        raise ValueError(
            f"{features} channels do not divide into {layer.num_groups} normalization groups; keep "
            "the same number in every group, or whole groups"
        )
    put(layer, group_size=features // layer.num_groups)


@register(nnx.MultiHeadAttention)
def _attention(layer: Any, old: dict[str, Shape]) -> None:
    query, key, out = (shape_of(layer, f"{name}/kernel") for name in ("query", "key", "out"))
    layer.in_features, layer.num_heads, layer.head_dim = query
    layer.qkv_features = layer.num_heads * layer.head_dim
    layer.in_kv_features = key[0]
    if hasattr(layer, "num_kv_heads"):
        layer.num_kv_heads = key[1]
    layer.out_features = out[-1]


register(ops.Conv, name="cnnjax.Conv")(_conv)
register(ops.BatchNorm, name="cnnjax.BatchNorm")(_batch_norm)
register(nnx.PReLU, attributes={})
register(nnx.Dropout, attributes={})
