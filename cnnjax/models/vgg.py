"""VGG-16 and VGG-19 for ImageNet: Simonyan, Zisserman, ICLR 2015, 1409.1556.

Convolutions 3x3 with bias (the batch-norm variants keep it, as in torchvision), max pools 2x2, and
a head of two hidden dense layers on a 7x7 map, to which other sizes are average-pooled.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_positive, check_rate, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class VggConfig(ModelConfig):
    """VGG variants.

    Attributes:
      stages: convolutions per stage.
      widths: channels of the stages.
      norm: batch norm after every convolution.
      hidden: width of the hidden dense layers.
      dropout: rate after each hidden dense layer.
    """

    stages: tuple[int, ...] = (2, 2, 3, 3, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    norm: bool = False
    hidden: int = 4096
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden")
        check_rate(self, "dropout")
        if len(self.stages) != len(self.widths) or not self.stages or min(self.stages) < 1:
            raise ValueError(
                f"stages {self.stages!r} and widths {self.widths!r} must be equally long, "
                "with at least one convolution per stage"
            )


class VggLayer(nnx.Module):
    """Convolution with bias, batch norm if asked for, ReLU."""

    def __init__(self, in_features: int, features: int, norm: bool, **options: Any):
        self.conv = blocks.conv(in_features, features, 3, use_bias=True, **options)
        self.normalise = norm
        if norm:
            self.bn = blocks.batch_norm(features, **options)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H, W, out)."""
        x = self.conv(x)
        return jax.nn.relu(self.bn(x) if self.normalise else x)


class Vgg(blocks.Model):
    """Features ``stage1`` ... (before the pool), ``pool``, ``fc1``, ``fc2``."""

    def __init__(self, config: VggConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.min_size = 2 ** len(config.stages)
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        channels = config.in_channels
        stages = []
        for count, width in zip(config.stages, config.widths, strict=True):
            stage = []
            for _ in range(count):
                stage.append(VggLayer(channels, width, config.norm, **options))
                channels = width
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        dense: Any = {"kernel_init": blocks.init.normal(0.01), **options}
        self.flattened = (("fc1", (7, 7, channels)),)
        self.fc1 = blocks.linear(49 * channels, config.hidden, **dense)
        self.fc2 = blocks.linear(config.hidden, config.hidden, **dense)
        self.fc3 = blocks.linear(config.hidden, config.num_classes, **dense)
        self.drop1 = nnx.Dropout(config.dropout, rngs=rngs)
        self.drop2 = nnx.Dropout(config.dropout, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        for i, stage in enumerate(self.stages):
            for layer in stage:
                x = blocks.run(layer, x, remat=self.config.remat)
            x = blocks.max_pool(taps(f"stage{i + 1}", x), 2)
        x = taps("pool", blocks.adaptive_avg_pool(x, 7))
        x = taps("fc1", self.drop1(jax.nn.relu(self.fc1(blocks.flatten(x)))))
        x = taps("fc2", self.drop2(jax.nn.relu(self.fc2(x))))
        return self.fc3(x)


for _depth, _stages in ((16, (2, 2, 3, 3, 3)), (19, (2, 2, 4, 4, 4))):
    for _suffix, _norm in (("", False), ("_bn", True)):
        register(
            f"vgg{_depth}{_suffix}",
            Vgg,
            VggConfig(stages=_stages, norm=_norm),
            input_shape=(224, 224, 3),
        )
