"""AlexNet: the two-column network in Caffe's form, and torchvision's one-column form.

Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks",
NIPS 2012 (Caffe's ``bvlc_alexnet`` and ``caffenet``); Krizhevsky, "One weird trick for
parallelizing convolutional neural networks", 2014, 1404.5997 (torchvision).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import (
    ModelConfig,
    check_choice,
    check_positive,
    check_rate,
    register,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlexNetConfig(ModelConfig):
    """torchvision's AlexNet.

    Attributes:
      hidden: width of the two hidden dense layers.
      dropout: rate before each hidden dense layer.
    """

    hidden: int = 4096
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden")
        check_rate(self, "dropout")


class AlexNet(blocks.Model):
    """Features ``conv1`` ... ``conv5`` (after ReLU), ``pool``, ``fc1``, ``fc2``."""

    # the last of the three pools must still see 3x3
    min_size = 63
    flattened = (("fc1", (6, 6, 256)),)

    def __init__(self, config: AlexNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        options: Any = {"use_bias": True, "dtype": config.dtype, "rngs": rngs}
        dense: Any = {"dtype": config.dtype, "rngs": rngs}
        self.conv1 = blocks.conv(config.in_channels, 64, 11, 4, pad=2, **options)
        self.conv2 = blocks.conv(64, 192, 5, **options)
        self.conv3 = blocks.conv(192, 384, 3, **options)
        self.conv4 = blocks.conv(384, 256, 3, **options)
        self.conv5 = blocks.conv(256, 256, 3, **options)
        self.fc1 = blocks.linear(256 * 36, config.hidden, **dense)
        self.fc2 = blocks.linear(config.hidden, config.hidden, **dense)
        self.fc3 = blocks.linear(config.hidden, config.num_classes, **dense)
        self.drop1 = nnx.Dropout(config.dropout, rngs=rngs)
        self.drop2 = nnx.Dropout(config.dropout, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        x = taps("conv1", self.part(lambda m, x: jax.nn.relu(m.conv1(x)), x))
        x = taps("conv2", self.part(lambda m, x: jax.nn.relu(m.conv2(blocks.max_pool(x, 3, 2))), x))
        x = taps("conv3", self.part(lambda m, x: jax.nn.relu(m.conv3(blocks.max_pool(x, 3, 2))), x))
        x = taps("conv4", self.part(lambda m, x: jax.nn.relu(m.conv4(x)), x))
        x = taps("conv5", self.part(lambda m, x: jax.nn.relu(m.conv5(x)), x))
        x = taps("pool", blocks.adaptive_avg_pool(blocks.max_pool(x, 3, 2), 6))
        x = taps("fc1", self.part(lambda m, x: jax.nn.relu(m.fc1(m.drop1(blocks.flatten(x)))), x))
        x = taps("fc2", self.part(lambda m, x: jax.nn.relu(m.fc2(m.drop2(x))), x))
        return self.fc3(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlexNetCaffeConfig(ModelConfig):
    """The original AlexNet.

    Attributes:
      groups: 2 for the two columns, 1 for their dense counterpart.
      order: ``"norm_pool"`` (``bvlc_alexnet``, the paper) or ``"pool_norm"`` (``caffenet``).
      norm: response normalisation's constants: ``"caffe"`` (k = 1, alpha divided by the window) or
        ``"paper"`` (k = 2, not divided).
      hidden: width of the two hidden dense layers.
      dropout: rate after each hidden dense layer.
      image_size: height and width; sets the first dense layer's width. Pools round up.
    """

    groups: int = 2
    order: str = "norm_pool"
    norm: str = "caffe"
    hidden: int = 4096
    dropout: float = 0.5
    image_size: int = 227

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "groups", "image_size")
        check_choice(self, "order", ("norm_pool", "pool_norm"))
        check_choice(self, "norm", ("caffe", "paper"))
        check_positive(self, "hidden")
        check_rate(self, "dropout")
        if self.image_size < 67:
            raise ValueError(f"image_size must be at least 67, got {self.image_size}")


class AlexNetCaffe(blocks.Model):
    """Features ``conv1`` ... ``conv5`` (after ReLU), ``pool``, ``fc1``, ``fc2``."""

    def __init__(self, config: AlexNetCaffeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.exact_size = config.image_size
        std = blocks.init.normal
        one = blocks.init.constant(1.0)
        options: Any = {"use_bias": True, "dtype": config.dtype, "rngs": rngs}
        options["kernel_init"] = std(0.01)
        dense: Any = {"dtype": config.dtype, "rngs": rngs}
        groups = config.groups
        self.conv1 = blocks.conv(config.in_channels, 96, 11, 4, pad=0, **options)
        self.conv2 = blocks.conv(96, 256, 5, groups=groups, bias_init=one, **options)
        self.conv3 = blocks.conv(256, 384, 3, **options)
        self.conv4 = blocks.conv(384, 384, 3, groups=groups, bias_init=one, **options)
        self.conv5 = blocks.conv(384, 256, 3, groups=groups, bias_init=one, **options)
        size = (config.image_size - 11) // 4 + 1
        for _ in range(3):
            size = -(-(size - 3) // 2) + 1
        self.flattened = (("fc1", (size, size, 256)),)
        self.fc1 = blocks.linear(
            256 * size * size, config.hidden, kernel_init=std(0.01), bias_init=one, **dense
        )
        self.fc2 = blocks.linear(
            config.hidden, config.hidden, kernel_init=std(0.01), bias_init=one, **dense
        )
        self.fc3 = blocks.linear(config.hidden, config.num_classes, kernel_init=std(0.01), **dense)
        self.drop1 = nnx.Dropout(config.dropout, rngs=rngs)
        self.drop2 = nnx.Dropout(config.dropout, rngs=rngs)

    def _norm_pool(self, x: Any) -> Any:
        paper = self.config.norm == "paper"

        def norm(x: Any) -> Any:
            return blocks.local_response_norm(
                x, window=5, alpha=1e-4 if paper else 1e-4 / 5, beta=0.75, k=2.0 if paper else 1.0
            )

        if self.config.order == "norm_pool":
            return blocks.max_pool(norm(x), 3, 2, ceil=True)
        return norm(blocks.max_pool(x, 3, 2, ceil=True))

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        x = taps("conv1", self.part(lambda m, x: jax.nn.relu(m.conv1(x)), x))
        x = taps("conv2", self.part(lambda m, x: jax.nn.relu(m.conv2(m._norm_pool(x))), x))
        x = taps("conv3", self.part(lambda m, x: jax.nn.relu(m.conv3(m._norm_pool(x))), x))
        x = taps("conv4", self.part(lambda m, x: jax.nn.relu(m.conv4(x)), x))
        x = taps("conv5", self.part(lambda m, x: jax.nn.relu(m.conv5(x)), x))
        x = taps("pool", blocks.max_pool(x, 3, 2, ceil=True))
        x = taps("fc1", self.part(lambda m, x: m.drop1(jax.nn.relu(m.fc1(blocks.flatten(x)))), x))
        x = taps("fc2", self.part(lambda m, x: m.drop2(jax.nn.relu(m.fc2(x))), x))
        return self.fc3(x)


register("alexnet", AlexNet, AlexNetConfig(), input_shape=(224, 224, 3))
register("alexnet_caffe", AlexNetCaffe, AlexNetCaffeConfig(), input_shape=(227, 227, 3))
register("caffenet", AlexNetCaffe, AlexNetCaffeConfig(order="pool_norm"), input_shape=(227, 227, 3))
