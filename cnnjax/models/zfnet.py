"""ZFNet: Zeiler, Fergus, "Visualizing and understanding convolutional networks", ECCV 2014,
1311.2901.

AlexNet with a 7x7/2 first and a 5x5/2 second convolution and no groups; contrast normalisation
across maps after the first two pools.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_positive, check_rate, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZfNetConfig(ModelConfig):
    """ZFNet variants.

    Attributes:
      widths: channels of the last three convolutions; the paper's wider net has 512, 1024, 512.
      hidden: width of the two hidden dense layers.
      dropout: rate after each hidden dense layer.
      image_size: height and width; sets the first dense layer's width.
    """

    widths: tuple[int, int, int] = (384, 384, 256)
    hidden: int = 4096
    dropout: float = 0.5
    image_size: int = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "image_size")
        check_positive(self, "hidden")
        check_rate(self, "dropout")
        if self.image_size < 34:
            raise ValueError(f"image_size must be at least 34, got {self.image_size}")


class ZfNet(blocks.Model):
    """Features ``conv1`` ... ``conv5`` (after ReLU), ``pool``, ``fc1``, ``fc2``."""

    def __init__(self, config: ZfNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.exact_size = config.image_size
        init = blocks.init.normal(0.01)
        dense: Any = {"kernel_init": init, "dtype": config.dtype, "rngs": rngs}
        options: Any = {"use_bias": True, **dense}
        a, b, c = config.widths
        self.conv1 = blocks.conv(config.in_channels, 96, 7, 2, pad=1, **options)
        self.conv2 = blocks.conv(96, 256, 5, 2, pad=0, **options)
        self.conv3 = blocks.conv(256, a, 3, **options)
        self.conv4 = blocks.conv(a, b, 3, **options)
        self.conv5 = blocks.conv(b, c, 3, **options)
        size = (config.image_size - 5) // 2 + 1
        size = (size - 1) // 2 + 1
        size = (size - 5) // 2 + 1
        size = -(-(size - 3) // 2) + 1
        size = (size - 3) // 2 + 1
        if size < 1:
            raise ValueError(f"image_size {config.image_size} leaves nothing after the pools")
        self.flattened = (("fc1", (size, size, c)),)
        self.fc1 = blocks.linear(c * size * size, config.hidden, **dense)
        self.fc2 = blocks.linear(config.hidden, config.hidden, **dense)
        self.fc3 = blocks.linear(config.hidden, config.num_classes, **dense)
        self.drop1 = nnx.Dropout(config.dropout, rngs=rngs)
        self.drop2 = nnx.Dropout(config.dropout, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""

        def norm(x: Any) -> Any:
            return blocks.local_response_norm(x, window=5, alpha=1e-4, beta=0.75, k=2.0)

        x = taps("conv1", self.part(lambda m, x: jax.nn.relu(m.conv1(x)), x))
        x = taps(
            "conv2",
            self.part(lambda m, x: jax.nn.relu(m.conv2(norm(blocks.max_pool(x, 3, 2, pad=1)))), x),
        )
        x = taps(
            "conv3",
            self.part(
                lambda m, x: jax.nn.relu(m.conv3(norm(blocks.max_pool(x, 3, 2, ceil=True)))), x
            ),
        )
        x = taps("conv4", self.part(lambda m, x: jax.nn.relu(m.conv4(x)), x))
        x = taps("conv5", self.part(lambda m, x: jax.nn.relu(m.conv5(x)), x))
        x = taps("pool", blocks.max_pool(x, 3, 2))
        x = taps("fc1", self.part(lambda m, x: m.drop1(jax.nn.relu(m.fc1(blocks.flatten(x)))), x))
        x = taps("fc2", self.part(lambda m, x: m.drop2(jax.nn.relu(m.fc2(x))), x))
        return self.fc3(x)


register("zfnet", ZfNet, ZfNetConfig(), input_shape=(224, 224, 3))
register("zfnet_wide", ZfNet, ZfNetConfig(widths=(512, 1024, 512)), input_shape=(224, 224, 3))
