"""Layers that factorized networks need beside Flax's own; known to surgery, so saved and loaded."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cnnjax import ops, surgery
from cnnjax.surgery import layers as known
from cnnjax.typing import AnyArray


class Fixed(nnx.Variable):
    """Numbers that training leaves as they are."""


class FixedConv(ops.Conv):
    """`cnnjax.ops.Conv` whose kernel is not trained: a transform that is given, not learned."""

    def __init__(self, *args: Any, **kw: Any):
        super().__init__(*args, **kw)
        self.kernel = Fixed(self.kernel[...])


_conv_rule = known.rule_of(nnx.Conv)
assert _conv_rule is not None
surgery.register(FixedConv)(_conv_rule)


class Reorder(nnx.Module):
    """Puts channels into another order.

    The order is a variable, not a constant, so that the channels on both sides count as immovable
    where a network is shrunk.

    Args:
      channels: how many.
    """

    def __init__(self, channels: int):
        self.channels = channels
        self.order = Fixed(jnp.arange(channels))

    def __call__(self, x: Any) -> Any:
        """(..., channels) -> the same, reordered."""
        return jnp.take(x, self.order[...], axis=-1)


surgery.register(Reorder, attributes={"channels": ("order", 0)})


class PredictedLinear(nnx.Module):
    """A dense layer whose kernel is predicted from the stored rows: ``x U_j V_j`` per column group.

    The columns form ``groups`` groups, each with its own stored rows, so that not all units share
    one subset. Only ``value`` (V) and the bias are trained; ``dictionary`` (U) is given.

    Args:
      in_features: n.
      out_features: divisible by the number of groups.
      stored: a, rows that are kept.
      groups: of columns.
      use_bias: whether there is one.
      rngs: initialisation of V.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stored: int,
        groups: int = 1,
        *,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        if out_features % groups:
            raise ValueError(f"{out_features} outputs do not divide into {groups} column groups")
        self.in_features, self.out_features = in_features, out_features
        self.stored, self.groups, self.use_bias = stored, groups, use_bias
        self.dictionary = Fixed(jnp.zeros((groups, in_features, stored)))
        init = nnx.initializers.lecun_normal()
        shape = (groups, stored, out_features // groups)
        self.value = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    @classmethod
    def of(
        cls, dictionaries: Float[AnyArray, "g n a"], out_features: int, **options: Any
    ) -> PredictedLinear:
        """A layer with these dictionaries; ``options`` are those of the constructor."""
        groups, inputs, stored = dictionaries.shape
        layer = cls(inputs, out_features, stored, groups, **options)
        layer.dictionary[...] = jnp.asarray(dictionaries, jnp.float32)
        return layer

    def __call__(self, x: Float[AnyArray, "*b n"]) -> Array:
        """(..., n) -> (..., out_features)."""
        codes = jnp.einsum("...n,gna->...ga", jnp.asarray(x), self.dictionary[...])
        out = jnp.einsum("...ga,gao->...go", codes, self.value[...])
        out = out.reshape(*out.shape[:-2], -1)
        return out if self.bias is None else out + self.bias[...]


@surgery.register(PredictedLinear)
def _predicted(layer: Any, old: dict[str, Any]) -> None:
    layer.groups, layer.in_features, layer.stored = known.shape_of(layer, "dictionary")
    layer.out_features = layer.groups * known.shape_of(layer, "value")[-1]
