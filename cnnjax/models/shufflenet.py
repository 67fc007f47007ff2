"""ShuffleNet v1.

Zhang, Zhou, Lin, Sun, "ShuffleNet: an extremely efficient convolutional neural network for mobile
devices", CVPR 2018, 1707.01083.

The authors' code has no bias in the classifier, shuffles after the depthwise convolution (with the
inverse permutation) and activates the branch before the concatenation: the same function.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_positive, register

# groups -> channels of stage 2 at scale 1
_STAGE2 = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
_REPEATS = (4, 8, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleNetConfig(ModelConfig):
    """ShuffleNet variants.

    Channels that the groups don't divide are rounded up: each stage to a multiple of 4 ``groups``
    (at 0.5x for g = 2 and 4, and at 0.25x), the stem so that C - C_in divides too.
    ``stem_channels`` and ``stage_channels`` of the configuration tell the result.

    Attributes:
      groups: g of the grouped 1x1 convolutions: 1, 2, 3, 4 or 8 (any with ``stage_width``).
      scale: s, multiplies the channels of the stages.
      stem_width: channels of the first convolution; None for the published operation counts' rule
        (24 at 1x and 1.5x, 12 at 0.5x and 0.25x, but 16 there with g = 8, and 24 s otherwise).
      stage_width: channels of stage 2 at scale 1; None for the paper's table.
    """

    groups: int = 3
    scale: float = 1.0
    stem_width: int | None = None
    stage_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "groups")
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale!r}")
        if self.stage_width is None and self.groups not in _STAGE2:
            raise ValueError(
                f"groups must be one of {', '.join(map(str, _STAGE2))} (the paper's table), got "
                f"{self.groups}; stage_width= sets the channels for another number"
            )
        stem = self.stem_channels
        if (self.stage_channels[0] - stem) % self.groups:
            raise ValueError(
                f"{self.groups} groups don't divide the {self.stage_channels[0] - stem} channels "
                f"that the first unit adds to a stem of {stem}; choose another stem_width"
            )

    @property
    def stem_channels(self) -> int:
        """Channels of the first convolution."""
        if self.stem_width is not None:
            return self.stem_width
        if self.scale in (0.25, 0.5):
            width = 12
        elif self.scale == 1.5:
            width = 24
        else:
            width = round(24 * self.scale)
        # as C divides by g, C - C_in does when C_in does
        return -(-width // self.groups) * self.groups

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Output channels of the three stages."""
        base = self.stage_width or _STAGE2[self.groups]
        unit = 4 * self.groups
        return tuple(-(-round(base * 2**i * self.scale) // unit) * unit for i in range(3))


class ShuffleUnit(nnx.Module):
    """Grouped 1x1, BN, ReLU; shuffle; depthwise 3x3, BN; grouped 1x1, BN; then the shortcut.

    Stride 1: ReLU(x + F(x)). Stride 2: ReLU of the concatenation of the 3x3/2 average pool of x
    and F(x), which has the remaining channels.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        groups: int,
        *,
        rngs: nnx.Rngs,
        first_groups: int | None = None,
        dtype: str | None = None,
    ):
        options: Any = {"dtype": dtype, "rngs": rngs}
        middle = features // 4
        branch = features - in_features if stride == 2 else features
        first = groups if first_groups is None else first_groups
        self.stride = stride
        self.groups = groups
        self.reduce = blocks.ConvNorm(in_features, middle, 1, groups=first, **options)
        self.depthwise = blocks.ConvNorm(
            middle, middle, 3, stride, groups=middle, relu=False, **options
        )
        self.expand = blocks.ConvNorm(middle, branch, 1, groups=groups, relu=False, **options)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', out)."""
        y = ops.channel_shuffle(self.reduce(x), self.groups)
        y = self.expand(self.depthwise(y))
        if self.stride == 1:
            return jax.nn.relu(x + y)
        pooled = blocks.avg_pool(x, 3, 2, pad=1)
        return jax.nn.relu(jnp.concatenate([pooled, y], axis=-1))


class ShuffleNetV1(blocks.Model):
    """Stem, three stages. Features ``stem``, ``stage2`` ..., units as ``stage2/0``, ``pool``."""

    def __init__(self, config: ShuffleNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        channels = config.stem_channels
        self.stem = blocks.ConvNorm(config.in_channels, channels, 3, 2, **options)
        for i, (features, repeats) in enumerate(zip(config.stage_channels, _REPEATS)):
            units = []
            for j in range(repeats):
                units.append(
                    ShuffleUnit(
                        channels,
                        features,
                        1 if j else 2,
                        config.groups,
                        # the stem is too narrow for groups
                        first_groups=1 if i == j == 0 else None,
                        **options,
                    )
                )
                channels = features
            setattr(self, f"stage{i + 2}", nnx.List(units))
        self.fc = blocks.linear(channels, config.num_classes, **options)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        x = taps("stem", self.stem(x))
        x = blocks.max_pool(x, 3, 2, pad=1)
        for i in (2, 3, 4):
            for j, unit in enumerate(getattr(self, f"stage{i}")):
                x = taps(f"stage{i}/{j}", blocks.run(unit, x, remat=self.config.remat))
            taps(f"stage{i}", x)
        x = taps("pool", blocks.global_avg_pool(x))
        return self.fc(x)


for _groups in _STAGE2:
    register(
        f"shufflenet_v1_g{_groups}",
        ShuffleNetV1,
        ShuffleNetConfig(groups=_groups),
        input_shape=(224, 224, 3),
    )
register("shufflenet_v1", ShuffleNetV1, ShuffleNetConfig(), input_shape=(224, 224, 3))
