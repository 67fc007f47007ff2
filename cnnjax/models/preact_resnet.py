"""Pre-activation ResNets for CIFAR (110, 164, 1001) and ImageNet (50, 200).

He, Zhang, Ren, Sun, "Identity mappings in deep residual networks", ECCV 2016, 1603.05027. The
class also serves wide and multi-residual networks, which only differ in widths and branches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
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
      stem: ``"cifar"`` (3x3, no batch norm), ``"imagenet"`` (7x7/2, BN, ReLU, max pool) or
        ``"bare"`` (7x7/2, max pool; the first unit normalises, as in timm and Keras).
      stem_width: channels of the stem.
      stride_on: ``"1x1"`` or ``"3x3"``, bottleneck only.
      shortcut: ``"B"`` or ``"A"``.
      branches: parallel branches per unit.
      dropout: rate between a basic branch's convolutions.
      fan: ``"out"`` or ``"in"`` of the He initialiser.
      survival: of the last unit's branches under stochastic depth, 1 for none.
      epsilon: of the batch norms (Keras: 1.001e-5).
      keras: as Keras' ``ResNet50V2`` differs: the stride sits in the last unit of a stage, whose
        shortcut subsamples; biases in the stem, the projections and every unit's last convolution;
        zeros around the max pool.
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
    epsilon: float = 1e-5
    keras: bool = False
    scan: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "block", ("basic", "bottleneck"))
        check_choice(self, "stem", ("cifar", "imagenet", "bare"))
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
        if self.keras and (self.stem != "bare" or self.scan):
            raise ValueError("keras=True needs stem='bare' and scan=False (its units differ)")


class PreActResNet(blocks.Model):
    """Features ``stem``, ``layer1``, ..., each unit as ``layer1/0``, ``final`` and ``pool``."""

    def __init__(self, config: PreActConfig, *, rngs: nnx.Rngs):
        self.config = config
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        norms: Any = {"epsilon": config.epsilon, **options}
        convs: Any = {
            "kernel_init": blocks.init.he_normal(config.fan),
            "use_bias": config.keras,
            **options,
        }
        big = config.stem == "imagenet"
        channels = config.stem_width
        kernel, stride = (3, 1) if config.stem == "cifar" else (7, 2)
        self.conv1 = blocks.conv(config.in_channels, channels, kernel, stride, **convs)
        if big:
            self.bn1 = blocks.batch_norm(channels, **norms)
        for i, (count, width) in enumerate(zip(config.stages, config.widths, strict=True)):

            def make(
                j: int,
                rngs: nnx.Rngs,
                *,
                i: int = i,
                w: int = width,
                c: int = channels,
                count: int = count,
            ) -> Any:
                strides = i > 0 and j == 0
                if config.keras:
                    strides = i + 1 < len(config.stages) and j + 1 == count
                return preact.PreActUnit(
                    w if j else c,
                    w,
                    2 if strides else 1,
                    kind=config.block,
                    branches=config.branches,
                    shortcut="A" if config.keras and j else config.shortcut,
                    # the ImageNet stem has just normalised the first unit's input
                    leading=not (big and i == 0 and j == 0),
                    stride_on=config.stride_on,
                    dropout=config.dropout,
                    fan=config.fan,
                    use_bias=config.keras,
                    epsilon=config.epsilon,
                    dtype=config.dtype,
                    rngs=rngs,
                )

            stage = depth.make_stage(make, count, rngs=rngs, scan=config.scan)
            setattr(self, f"layer{i + 1}", stage)
            channels = width
        self.bn = blocks.batch_norm(channels, **norms)
        self.fc = blocks.linear(channels, config.num_classes, **options)
        if config.survival < 1:
            self.depth = depth.RandomDepth(sum(config.stages), config.survival, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        gates = self.depth() if self.config.survival < 1 else None
        x = self.conv1(x)
        if self.config.stem == "imagenet":
            x = jax.nn.relu(self.bn1(x))
        if self.config.keras:
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        if self.config.stem != "cifar":
            x = blocks.max_pool(x, 3, 2, pad=0 if self.config.keras else 1)
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
for _depth, _stages in ((50, (3, 4, 6, 3)), (200, (3, 24, 36, 3))):
    register(
        f"preact_resnet{_depth}",
        PreActResNet,
        PreActConfig(
            num_classes=1000,
            stages=_stages,
            widths=(256, 512, 1024, 2048),
            stem="imagenet",
            stem_width=64,
            stride_on="3x3",
        ),
        input_shape=(224, 224, 3),
    )
