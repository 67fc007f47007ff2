"""VGG for 32x32 images: the pruning papers' VGG-16 (Li et al., ICLR 2017, 1608.08710) and VGG-19
(Liu et al., ICCV 2017, 1708.06519).

Convolutions 3x3 without bias, each with batch normalisation and ReLU; max pools after the first
four stages; the last stage is averaged. Batch norms' scales start at 0.5, as in the authors' code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_positive, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class VggCifarConfig(ModelConfig):
    """CIFAR VGG variants.

    Attributes:
      stages: channels of every convolution, stage by stage.
      hidden: width of the hidden dense layer (with batch normalisation), 0 for a linear head.
      dropout: drop rate between the convolutions of each stage, one for all stages or empty; the
        recipe behind Li et al. has .3 in the first and .4 in the others.
    """

    num_classes: int = 10
    stages: tuple[tuple[int, ...], ...] = (
        (64,) * 2,
        (128,) * 2,
        (256,) * 3,
        (512,) * 3,
        (512,) * 3,
    )
    hidden: int = 512
    dropout: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages or not all(self.stages):
            raise ValueError(f"stages must hold at least one width each, got {self.stages!r}")
        if self.hidden:
            check_positive(self, "hidden")
        if self.dropout and len(self.dropout) != len(self.stages):
            raise ValueError(
                f"dropout needs one rate for each of {len(self.stages)} stages, got {self.dropout}"
            )
        if any(not 0.0 <= rate < 1.0 for rate in self.dropout):
            raise ValueError(f"dropout rates must be in [0, 1), got {self.dropout}")


class VggCifar(blocks.Model):
    """Features (conv-BN-ReLU) and head; feature names ``stage1`` ... ``stage5``, ``pool``."""

    def __init__(self, config: VggCifarConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.min_size = 2 ** (len(config.stages) - 1)
        channels = config.in_channels
        stages = []
        for widths in config.stages:
            stage = []
            for width in widths:
                layer = blocks.ConvNorm(
                    channels, width, 3, scale=0.5, dtype=config.dtype, rngs=rngs
                )
                stage.append(layer)
                channels = width
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        self.drops = nnx.List(nnx.Dropout(rate, rngs=rngs) for rate in config.dropout)
        init = blocks.init.normal(0.01)
        if config.hidden:
            self.fc1 = blocks.linear(
                channels, config.hidden, kernel_init=init, dtype=config.dtype, rngs=rngs
            )
            self.bn1 = blocks.batch_norm(config.hidden, dtype=config.dtype, rngs=rngs)
            channels = config.hidden
        self.fc = blocks.linear(
            channels, config.num_classes, kernel_init=init, dtype=config.dtype, rngs=rngs
        )

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        for i, stage in enumerate(self.stages):
            if i:
                x = blocks.max_pool(x, 2)
            for j, layer in enumerate(stage):
                x = self.drops[i](x) if j and self.config.dropout else x
                x = blocks.run(layer, x, remat=self.config.remat)
            taps(f"stage{i + 1}", x)
        x = taps("pool", blocks.global_avg_pool(x))
        if self.config.hidden:
            x = taps("fc1", jax.nn.relu(self.bn1(self.fc1(x))))
        return self.fc(x)


_SHAPE = (32, 32, 3)
_VGG19 = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)
register("vgg16_cifar", VggCifar, VggCifarConfig(), input_shape=_SHAPE)
register("vgg16_cifar_linear", VggCifar, VggCifarConfig(hidden=0), input_shape=_SHAPE)
register("vgg19_cifar", VggCifar, VggCifarConfig(stages=_VGG19, hidden=0), input_shape=_SHAPE)
