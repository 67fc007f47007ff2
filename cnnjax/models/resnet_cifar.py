"""CIFAR ResNets: He et al., "Deep residual learning for image recognition", CVPR 2016, 1512.03385.

Depth 6n + 2: a 3x3 stem of 16 channels, three stages of n basic blocks with 16, 32 and 64
channels, global average pool, dense. Shortcut A (the paper's) subsamples and appends zero
channels; B is a 1x1 convolution with batch normalisation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks, residual
from cnnjax.models.registry import ModelConfig, check_choice, check_positive, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetCifarConfig(ModelConfig):
    """CIFAR ResNet variants.

    Attributes:
      blocks_per_stage: n; the depth is 6n + 2.
      widths: channels of the stages.
      shortcut: ``"A"`` (parameter-free) or ``"B"`` (projection).
      zero_channels: where shortcut A puts its zero channels, ``"end"`` or ``"both"`` sides.
    """

    num_classes: int = 10
    blocks_per_stage: int = 3
    widths: tuple[int, ...] = (16, 32, 64)
    shortcut: str = "A"
    zero_channels: str = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "blocks_per_stage")
        check_choice(self, "shortcut", ("A", "B"))
        check_choice(self, "zero_channels", ("end", "both"))
        if not self.widths:
            raise ValueError("widths must hold at least one number")


class ResNetCifar(blocks.Model):
    """Features ``stem``, ``layer1`` ... ``layer3``, each block as ``layer1/0``, and ``pool``."""

    def __init__(self, config: ResNetCifarConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.min_size = 2 ** (len(config.widths) - 1)
        dtype = config.dtype
        width = config.widths[0]
        self.conv1 = blocks.conv(config.in_channels, width, 3, dtype=dtype, rngs=rngs)
        self.bn1 = blocks.batch_norm(width, dtype=dtype, rngs=rngs)
        channels = width
        for i, width in enumerate(config.widths):
            stage = []
            for j in range(config.blocks_per_stage):
                stride = 2 if i and not j else 1
                stage.append(
                    residual.BasicBlock(
                        channels,
                        width,
                        stride,
                        shortcut=config.shortcut,
                        zeros=config.zero_channels,
                        dtype=dtype,
                        rngs=rngs,
                    )
                )
                channels = width
            setattr(self, f"layer{i + 1}", nnx.List(stage))
        self.fc = blocks.linear(channels, config.num_classes, dtype=dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        x = taps("stem", jax.nn.relu(self.bn1(self.conv1(x))))
        for i in range(len(self.config.widths)):
            for j, block in enumerate(getattr(self, f"layer{i + 1}")):
                x = taps(f"layer{i + 1}/{j}", blocks.run(block, x, remat=self.config.remat))
            taps(f"layer{i + 1}", x)
        x = taps("pool", blocks.global_avg_pool(x))
        return self.fc(x)


for _depth in (20, 32, 44, 56, 110):
    register(
        f"resnet{_depth}_cifar",
        ResNetCifar,
        ResNetCifarConfig(blocks_per_stage=(_depth - 2) // 6),
        input_shape=(32, 32, 3),
    )
