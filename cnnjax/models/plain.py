"""Plain small networks for small images: a stack of convolutions or of dense layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_positive, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainConfig(ModelConfig):
    """Plain networks.

    Attributes:
      image_size: height and width of the input; sets the first dense layer's width.
      widths: of the 3x3 convolutions (``plain_cnn``); one 2x2 max pool follows the last.
      hidden: of the dense layers before the logits.
    """

    num_classes: int = 10
    in_channels: int = 1
    image_size: int = 8
    widths: tuple[int, ...] = ()
    hidden: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "image_size")
        for width in (*self.widths, *self.hidden):
            if not isinstance(width, int) or width < 1:
                raise ValueError(f"widths and hidden must be integers >= 1, got {width!r}")


class Plain(blocks.Model):
    """conv3x3 - ReLU for every width, one max pool, dense - ReLU for every hidden layer, dense."""

    def __init__(self, config: PlainConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.exact_size = config.image_size
        dtype, channels = config.dtype, config.in_channels
        convs, denses = [], []
        for width in config.widths:
            convs.append(
                blocks.conv(channels, width, 3, pad=1, use_bias=True, dtype=dtype, rngs=rngs)
            )
            channels = width
        side = config.image_size // 2 if config.widths else config.image_size
        features = side * side * channels
        for width in config.hidden:
            denses.append(blocks.linear(features, width, dtype=dtype, rngs=rngs))
            features = width
        self.convs, self.denses = nnx.List(convs), nnx.List(denses)
        self.head = blocks.linear(features, config.num_classes, dtype=dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        for i in range(len(self.convs)):
            x = self.part(lambda m, x, i=i: jax.nn.relu(m.convs[i](x)), x)
            x = taps(f"conv{i + 1}", x)
        if self.config.widths:
            x = blocks.max_pool(x, 2)
        x = blocks.flatten(x)
        for i in range(len(self.denses)):
            x = self.part(lambda m, x, i=i: jax.nn.relu(m.denses[i](x)), x)
            x = taps(f"dense{i + 1}", x)
        return self.head(x)


register("plain_cnn", Plain, PlainConfig(widths=(16, 32)), input_shape=(8, 8, 1))
register("plain_mlp", Plain, PlainConfig(hidden=(100, 50)), input_shape=(8, 8, 1))
