"""Xception.

Chollet, "Xception: deep learning with depthwise separable convolutions", CVPR 2017, 1610.02357.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_choice, check_positive, check_rate, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class XceptionConfig(ModelConfig):
    """Xception.

    Attributes:
      middle_blocks: number of middle-flow blocks.
      dropout: drop rate before the classifier (.5 in the paper's training).
      padding: of the strided pools: ``"SAME"`` (Keras) or ``"torch"`` (one each side, timm's port).
      bn_epsilon, bn_momentum: of the batch norms (Keras: 1e-3, .99).
    """

    middle_blocks: int = 8
    dropout: float = 0.5
    padding: str = "SAME"
    bn_epsilon: float = 1e-3
    bn_momentum: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "middle_blocks")
        check_rate(self, "dropout")
        check_choice(self, "padding", ("SAME", "torch"))


class SeparableConv(nnx.Module):
    """Depthwise 3x3, then 1x1, then batch norm; nothing between the two convolutions."""

    def __init__(self, config: XceptionConfig, in_features: int, features: int, *, rngs: nnx.Rngs):
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        self.depthwise = blocks.conv(in_features, in_features, 3, groups=in_features, **options)
        self.pointwise = blocks.conv(in_features, features, 1, **options)
        self.bn = blocks.batch_norm(
            features, epsilon=config.bn_epsilon, momentum=config.bn_momentum, **options
        )

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H, W, out)."""
        return self.bn(self.pointwise(self.depthwise(x)))


class XceptionBlock(nnx.Module):
    """(ReLU, separable) units; strided blocks end in a 3x3/2 max pool and project the shortcut.

    Args:
      config: the model's.
      in_features: channels before.
      widths: output channels of each unit.
      stride: 2 for a pooling block, 1 for the middle flow (identity shortcut).
      first_relu: whether the first unit starts with a ReLU.
    """

    def __init__(
        self,
        config: XceptionConfig,
        in_features: int,
        widths: tuple[int, ...],
        *,
        stride: int,
        rngs: nnx.Rngs,
        first_relu: bool = True,
    ):
        units, channels = [], in_features
        for width in widths:
            units.append(SeparableConv(config, channels, width, rngs=rngs))
            channels = width
        self.units = nnx.List(units)
        self.stride = stride
        self.first_relu = first_relu
        self.padding = config.padding
        self.shortcut = (
            blocks.ConvNorm(
                in_features,
                channels,
                1,
                2,
                pad=0,
                relu=False,
                dtype=config.dtype,
                epsilon=config.bn_epsilon,
                momentum=config.bn_momentum,
                rngs=rngs,
            )
            if stride == 2
            else nnx.data(None)
        )

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', out)."""
        y = x
        for i, unit in enumerate(self.units):
            y = unit(y if i == 0 and not self.first_relu else jax.nn.relu(y))
        if self.shortcut is None:
            return x + y
        if self.padding == "SAME":
            y = ops.max_pool(y, (3, 3), (2, 2), padding="SAME")
        else:
            y = blocks.max_pool(y, 3, 2, pad=1)
        return y + self.shortcut(x)


class Xception(blocks.Model):
    """Features ``stem``, ``entry/i``, ``middle/i``, ``exit``, ``tail``, ``pool``."""

    min_size = 71

    def __init__(self, config: XceptionConfig, *, rngs: nnx.Rngs):
        self.config = config
        norm: Any = {
            "dtype": config.dtype,
            "epsilon": config.bn_epsilon,
            "momentum": config.bn_momentum,
            "rngs": rngs,
        }
        self.conv1 = blocks.ConvNorm(config.in_channels, 32, 3, 2, pad=0, **norm)
        self.conv2 = blocks.ConvNorm(32, 64, 3, pad=0, **norm)
        entry, channels = [], 64
        for width in (128, 256, 728):
            first = channels != 64
            entry.append(
                XceptionBlock(
                    config, channels, (width, width), stride=2, first_relu=first, rngs=rngs
                )
            )
            channels = width
        self.entry = nnx.List(entry)
        self.middle = nnx.List(
            XceptionBlock(config, 728, (728, 728, 728), stride=1, rngs=rngs)
            for _ in range(config.middle_blocks)
        )
        self.exit = XceptionBlock(config, 728, (728, 1024), stride=2, rngs=rngs)
        self.tail1 = SeparableConv(config, 1024, 1536, rngs=rngs)
        self.tail2 = SeparableConv(config, 1536, 2048, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.fc = blocks.linear(2048, config.num_classes, dtype=config.dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        remat = self.config.remat
        x = taps("stem", self.conv2(self.conv1(x)))
        for name, group in (("entry", self.entry), ("middle", self.middle)):
            for i, block in enumerate(group):
                x = taps(f"{name}/{i}", blocks.run(block, x, remat=remat))
        x = taps("exit", blocks.run(self.exit, x, remat=remat))
        x = jax.nn.relu(blocks.run(self.tail1, x, remat=remat))
        x = taps("tail", jax.nn.relu(blocks.run(self.tail2, x, remat=remat)))
        x = taps("pool", jnp.mean(x, (1, 2)))
        return self.fc(self.dropout(x))


register("xception", Xception, XceptionConfig(), input_shape=(299, 299, 3))
