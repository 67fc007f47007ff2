"""Pre-activation ResNets for CIFAR (110, 164, 1001) and ImageNet (200).

He, Zhang, Ren, Sun, "Identity mappings in deep residual networks", ECCV 2016, 1603.05027. The
class also serves wide and multi-residual networks, which only differ in widths and branches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks, depth, preact
from cnnjax.models.registry import (
    ModelConfig,
    check_choice,
    check_positive,
    check_rate,
    register,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreActConfig(ModelConfig):
    """Pre-activation networks.

    Attributes:
      block: ``"basic"`` or ``"bottleneck"``.
      stages: units per stage.
      widths: output channels of the stages.
      stem: ``"cifar"`` (3x3, no batch norm) or ``"imagenet"`` (7x7/2, BN, ReLU, max pool).
      stem_width: channels of the stem.
      stride_on: ``"1x1"`` or ``"3x3"``, bottleneck only.
      shortcut: ``"B"`` or ``"A"``.
      branches: parallel branches per unit.
      dropout: rate between a basic branch's convolutions.
      fan: ``"out"`` or ``"in"`` of the He initialiser.
      survival: of the last unit's branches under stochastic depth, 1 for none.
      scan: run each stage's equal units by ``lax.scan``.
    """

    num_classes: int = 10
    block: str = "bottleneck"
    stages: tuple[int, ...] = (18, 18, 18)
    widths: tuple[int, ...] = (64, 128, 256)
    stem: str = "cifar"
    stem_width: int = 16
    stride_on: str = "1x1"
    shortcut: str = "B"
    branches: int = 1
    dropout: float = 0.0
    fan: str = "out"
    survival: float = 1.0
    scan: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "block", ("basic", "bottleneck"))
        check_choice(self, "stem", ("cifar", "imagenet"))
        check_choice(self, "stride_on", ("1x1", "3x3"))
        check_choice(self, "shortcut", ("A", "B"))
        check_choice(self, "fan", ("in", "out"))
        check_positive(self, "stem_width", "branches")
        check_rate(self, "dropout")
        if len(self.stages) != len(self.widths) or not self.stages or min(self.stages) < 1:
            raise ValueError(
                f"stages {self.stages!r} and widths {self.widths!r} must be equally long, "
                "with at least one unit per stage"
            )
        if not 0.0 < self.survival <= 1.0:
            raise ValueError(f"survival must be in (0, 1], got {self.survival!r}")


class PreActResNet(blocks.Model):
    """Features ``stem``, ``layer1``, ..., each unit as ``layer1/0``, ``final`` and ``pool``."""

    def __init__(self, config: PreActConfig, *, rngs: nnx.Rngs):
        self.config = config
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        convs: Any = {"kernel_init": blocks.init.he_normal(config.fan), **options}
        big = config.stem == "imagenet"
        channels = config.stem_width
        if big:
            self.conv1 = blocks.conv(config.in_channels, channels, 7, 2, **convs)
            self.bn1 = blocks.batch_norm(channels, **options)
        else:
            self.conv1 = blocks.conv(config.in_channels, channels, 3, **convs)
        for i, (count, width) in enumerate(zip(config.stages, config.widths, strict=True)):

            def make(
                j: int, rngs: nnx.Rngs, *, i: int = i, w: int = width, c: int = channels
            ) -> Any:
                return preact.PreActUnit(
                    w if j else c,
                    w,
                    1 if j or not i else 2,
                    kind=config.block,
                    branches=config.branches,
                    shortcut=config.shortcut,
                    # the ImageNet stem has just normalised the first unit's input
                    leading=not (big and i == 0 and j == 0),
                    stride_on=config.stride_on,
                    dropout=config.dropout,
                    fan=config.fan,
                    dtype=config.dtype,
                    rngs=rngs,
                )

            stage = depth.make_stage(make, count, rngs=rngs, scan=config.scan)
            setattr(self, f"layer{i + 1}", stage)
            channels = width
        self.bn = blocks.batch_norm(channels, **options)
        self.fc = blocks.linear(channels, config.num_classes, **options)
        if config.survival < 1:
            self.depth = depth.RandomDepth(sum(config.stages), config.survival, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        gates = self.depth() if self.config.survival < 1 else None
        x = self.conv1(x)
        if self.config.stem == "imagenet":
            x = blocks.max_pool(jax.nn.relu(self.bn1(x)), 3, 2, pad=1)
        taps("stem", x)
        done = 0
        for i, count in enumerate(self.config.stages):
            name = f"layer{i + 1}"
            part = None if gates is None else gates[done : done + count]
            x = depth.run_stage(
                getattr(self, name), x, taps, name, gates=part, remat=self.config.remat
            )
            done += count
        x = taps("final", jax.nn.relu(self.bn(x)))
        return self.fc(taps("pool", blocks.global_avg_pool(x)))


_SMALL = (32, 32, 3)
register(
    "preact_resnet110",
    PreActResNet,
    PreActConfig(block="basic", widths=(16, 32, 64), shortcut="A"),
    input_shape=_SMALL,
)
register("preact_resnet164", PreActResNet, PreActConfig(), input_shape=_SMALL)
register(
    "preact_resnet1001",
    PreActResNet,
    PreActConfig(stages=(111, 111, 111), scan=True),
    input_shape=_SMALL,
)
register(
    "preact_resnet200",
    PreActResNet,
    PreActConfig(
        num_classes=1000,
        stages=(3, 24, 36, 3),
        widths=(256, 512, 1024, 2048),
        stem="imagenet",
        stem_width=64,
        stride_on="3x3",
    ),
    input_shape=(224, 224, 3),
)
