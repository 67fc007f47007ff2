"""Residual networks of residual networks: Zhang, Sun, Han, Yuan, Guo, Liu, IEEE TCSVT 28(6), 2018,
1608.02908.

Level shortcuts on top of the blocks' own: with three levels one over every stage (middle) and one
over all stages (root). They enter the sum of the stage's last block, before its ReLU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks, depth, preact, residual
from cnnjax.models.registry import (
    ModelConfig,
    check_choice,
    check_positive,
    check_rate,
    register,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RorConfig(ModelConfig):
    """RoR, Pre-RoR and RoR-WRN.

    Attributes:
      blocks_per_stage: n; the ports count it as (depth - 2) / 6 or (depth - 8) / 6.
      widths: channels of the three stages.
      levels: 1 plain, 2 with the root shortcut, 3 with middle shortcuts too.
      unit: ``"post"`` (basic blocks) or ``"pre"`` (pre-activation units).
      block_shortcut: ``"A"`` or ``"B"`` in the blocks.
      level_shortcut: ``"B"`` (1x1 projection) or ``"A"`` (parameter-free).
      level_norm: batch norm after the level projections.
      dropout: in pre-activation units.
      survival: stochastic depth on the blocks' own branches, 1 for none.
    """

    num_classes: int = 10
    blocks_per_stage: int = 18
    widths: tuple[int, ...] = (16, 32, 64)
    levels: int = 3
    unit: str = "post"
    block_shortcut: str = "B"
    level_shortcut: str = "B"
    level_norm: bool = True
    dropout: float = 0.0
    survival: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "blocks_per_stage")
        check_choice(self, "levels", (1, 2, 3))
        check_choice(self, "unit", ("post", "pre"))
        check_choice(self, "block_shortcut", ("A", "B"))
        check_choice(self, "level_shortcut", ("A", "B"))
        check_rate(self, "dropout")
        if not self.widths:
            raise ValueError("widths must hold at least one number")
        if not 0.0 < self.survival <= 1.0:
            raise ValueError(f"survival must be in (0, 1], got {self.survival!r}")


class LevelShortcut(nnx.Module):
    """A shortcut over many blocks: projection (with or without batch norm) or parameter-free."""

    def __init__(
        self, in_features: int, features: int, stride: int, config: RorConfig, rngs: nnx.Rngs
    ):
        self.features = features
        self.stride = stride
        self.project = config.level_shortcut == "B"
        self.normalise = self.project and config.level_norm
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        if self.project:
            self.conv = blocks.conv(in_features, features, 1, stride, **options)
        if self.normalise:
            self.bn = blocks.batch_norm(features, **options)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', features)."""
        if not self.project:
            return residual.shortcut_a(x, self.features, self.stride)
        x = self.conv(x)
        return self.bn(x) if self.normalise else x


class Ror(blocks.Model):
    """Features ``stem``, ``layer1`` ... ``layer3``, each block as ``layer1/0``, and ``pool``."""

    def __init__(self, config: RorConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.min_size = 2 ** (len(config.widths) - 1)
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        pre = config.unit == "pre"
        stem = channels = config.widths[0] if not pre else 16
        self.conv1 = blocks.conv(config.in_channels, stem, 3, **options)
        self.bn1 = blocks.batch_norm(config.widths[-1] if pre else stem, **options)
        stages, middles = [], []
        for i, width in enumerate(config.widths):
            stride = 2 if i else 1
            if config.levels == 3:
                middles.append(LevelShortcut(channels, width, stride, config, rngs))
            stage: list[Any] = []
            for j in range(config.blocks_per_stage):
                shape: Any = (width if j else channels, width, 1 if j else stride)
                if pre:
                    unit: Any = preact.PreActUnit(
                        *shape,
                        kind="basic",
                        shortcut=config.block_shortcut,
                        dropout=config.dropout,
                        **options,
                    )
                else:
                    unit = residual.BasicBlock(*shape, shortcut=config.block_shortcut, **options)
                stage.append(unit)
            stages.append(nnx.List(stage))
            channels = width
        self.stages = nnx.List(stages)
        self.middles = nnx.List(middles)
        if config.levels > 1:
            stride = 2 ** (len(config.widths) - 1)
            self.root = LevelShortcut(stem, channels, stride, config, rngs)
        self.fc = blocks.linear(channels, config.num_classes, **options)
        if config.survival < 1:
            count = config.blocks_per_stage * len(config.widths)
            self.depth = depth.RandomDepth(count, config.survival, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        config = self.config
        pre = config.unit == "pre"
        gates = self.depth() if config.survival < 1 else None
        x = self.conv1(x)
        x = first = taps("stem", x if pre else jax.nn.relu(self.bn1(x)))
        index = 0
        for i, stage in enumerate(self.stages):
            extra = [self.middles[i](x)] if config.levels == 3 else []
            if config.levels > 1 and i == len(self.stages) - 1:
                extra.append(self.root(first))
            for j, unit in enumerate(stage):
                levels = sum(extra) if extra and j == len(stage) - 1 else None
                gate = None if gates is None else gates[index]
                x = blocks.run(unit, x, gate, levels, remat=config.remat)
                taps(f"layer{i + 1}/{j}", x)
                index += 1
            taps(f"layer{i + 1}", x)
        if pre:
            x = jax.nn.relu(self.bn1(x))
        return self.fc(taps("pool", blocks.global_avg_pool(x)))


_SHAPE = (32, 32, 3)
for _depth in (110, 164):
    _n = (_depth - 2) // 6
    register(f"ror_3_{_depth}", Ror, RorConfig(blocks_per_stage=_n), input_shape=_SHAPE)
    register(
        f"pre_ror_3_{_depth}", Ror, RorConfig(blocks_per_stage=_n, unit="pre"), input_shape=_SHAPE
    )
for _depth in (40, 58):
    register(
        f"ror_3_wrn_{_depth}_4",
        Ror,
        RorConfig(
            blocks_per_stage=(_depth - 4) // 6, widths=(64, 128, 256), unit="pre", level_norm=False
        ),
        input_shape=_SHAPE,
    )
