"""ResNet, ResNeXt and wide bottleneck ResNets with post-activation blocks.

He, Zhang, Ren, Sun, CVPR 2016, 1512.03385 (v1: the stride sits in the first 1x1; "v1.5": in the
3x3, as in torchvision). Xie, Girshick, Dollar, Tu, He, "Aggregated residual transformations",
CVPR 2017, 1611.05431: grouped 3x3, C groups of d channels. Zagoruyko, Komodakis, "Wide residual
networks", 1605.07146: a doubled inner width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks, depth, residual
from cnnjax.models.registry import ModelConfig, check_choice, check_positive, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig(ModelConfig):
    """Post-activation ResNets.

    Attributes:
      block: ``"basic"`` or ``"bottleneck"``.
      stages: blocks per stage.
      width: base width w of the first stage; it doubles from stage to stage.
      groups: C, groups of the 3x3 convolution (bottleneck only).
      group_width: d; the inner width is C * floor(w d / 64).
      stride_on: ``"3x3"`` (v1.5) or ``"1x1"`` (the paper).
      stem: ``"imagenet"`` (7x7/2 and a max pool) or ``"cifar"`` (3x3).
      use_bias: biases in the convolutions (Keras keeps them before batch norm).
      epsilon: of the batch norms (Keras: 1.001e-5).
      zero_last_scale: start the last batch norm of every block at 0, a later trick.
      scan: run each stage's equal blocks by ``lax.scan``.
    """

    block: str = "bottleneck"
    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    groups: int = 1
    group_width: int = 64
    stride_on: str = "3x3"
    stem: str = "imagenet"
    use_bias: bool = False
    epsilon: float = 1e-5
    zero_last_scale: bool = False
    scan: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "width", "groups", "group_width")
        check_choice(self, "block", ("basic", "bottleneck"))
        check_choice(self, "stride_on", ("3x3", "1x1"))
        check_choice(self, "stem", ("imagenet", "cifar"))
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"stages must hold numbers >= 1, got {self.stages!r}")
        if self.block == "basic" and (self.groups != 1 or self.group_width != 64):
            raise ValueError("groups and group_width need block='bottleneck'")
        if self.width * self.group_width < 64:
            raise ValueError(
                f"width {self.width} and group_width {self.group_width} leave no channel per group"
            )


class ResNet(blocks.Model):
    """Features ``stem``, ``layer1`` ... ``layer4``, each block as ``layer1/0``, and ``pool``."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = config.dtype
        options: Any = {"dtype": dtype, "use_bias": config.use_bias, "rngs": rngs}
        big = config.stem == "imagenet"
        channels = config.width
        self.conv1 = (
            blocks.conv(config.in_channels, channels, 7, 2, **options)
            if big
            else blocks.conv(config.in_channels, channels, 3, **options)
        )
        self.bn1 = blocks.batch_norm(channels, dtype=dtype, epsilon=config.epsilon, rngs=rngs)
        for i, count in enumerate(config.stages):
            width = config.width * 2**i
            out = width if config.block == "basic" else 4 * width

            def make(
                j: int, rngs: nnx.Rngs, *, i: int = i, w: int = width, c: int = channels
            ) -> Any:
                return _block(config, c, w, j, 1 if j or not i else 2, rngs)

            stage = depth.make_stage(make, count, rngs=rngs, scan=config.scan)
            setattr(self, f"layer{i + 1}", stage)
            channels = out
        self.fc = blocks.linear(channels, config.num_classes, dtype=dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        x = taps("stem", jax.nn.relu(self.bn1(self.conv1(x))))
        if self.config.stem == "imagenet":
            x = blocks.max_pool(x, 3, 2, pad=1)
        for i in range(len(self.config.stages)):
            name = f"layer{i + 1}"
            x = depth.run_stage(getattr(self, name), x, taps, name, remat=self.config.remat)
        x = taps("pool", blocks.global_avg_pool(x))
        return self.fc(x)


def _block(
    config: ResNetConfig, channels: int, width: int, index: int, stride: int, rngs: nnx.Rngs
) -> Any:
    options: Any = {
        "dtype": config.dtype,
        "use_bias": config.use_bias,
        "epsilon": config.epsilon,
        "rngs": rngs,
    }
    if config.block == "basic":
        block = residual.BasicBlock(width if index else channels, width, stride, **options)
        last = block.bn2
    else:
        middle = config.groups * (width * config.group_width // 64)
        block = residual.Bottleneck(
            4 * width if index else channels,
            middle,
            4 * width,
            stride,
            groups=config.groups,
            stride_on=config.stride_on,
            **options,
        )
        last = block.bn3
    if config.zero_last_scale and last.scale is not None:
        last.scale[...] = last.scale[...] * 0
    return block


_STAGES = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
_LARGE, _SMALL = (224, 224, 3), (32, 32, 3)
for _depth, (_kind, _counts) in _STAGES.items():
    _config = ResNetConfig(block=_kind, stages=_counts)
    register(f"resnet{_depth}", ResNet, _config, input_shape=_LARGE)
    if _kind == "bottleneck":
        _paper = dataclasses.replace(_config, stride_on="1x1")
        register(f"resnet{_depth}_v1", ResNet, _paper, input_shape=_LARGE)
for _depth, _groups, _width in ((50, 32, 4), (101, 32, 4), (101, 64, 4), (101, 32, 8)):
    register(
        f"resnext{_depth}_{_groups}x{_width}d",
        ResNet,
        ResNetConfig(stages=_STAGES[_depth][1], groups=_groups, group_width=_width),
        input_shape=_LARGE,
    )
for _groups, _width in ((8, 64), (16, 64), (32, 4)):
    register(
        f"resnext29_{_groups}x{_width}d",
        ResNet,
        ResNetConfig(
            num_classes=10, stages=(3, 3, 3), groups=_groups, group_width=_width, stem="cifar"
        ),
        input_shape=_SMALL,
    )
for _depth in (50, 101):
    register(
        f"wide_resnet{_depth}_2",
        ResNet,
        ResNetConfig(stages=_STAGES[_depth][1], group_width=128),
        input_shape=_LARGE,
    )
