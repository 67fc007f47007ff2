"""CIFAR ResNets and stochastic depth.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, 1512.03385: depth
6n + 2, a 3x3 stem of 16 channels, three stages of n basic blocks with 16, 32 and 64 channels,
global average pool, dense. Shortcut A (the paper's) subsamples and appends zero channels; B is a
1x1 convolution with batch normalisation.

Huang et al., "Deep networks with stochastic depth", ECCV 2016, 1603.09382: the same networks whose
residual branches are dropped at random in training.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks, depth, residual
from cnnjax.models.registry import ModelConfig, check_choice, check_positive, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetCifarConfig(ModelConfig):
    """CIFAR ResNet variants.

    Attributes:
      blocks_per_stage: n; the depth is 6n + 2.
      widths: channels of the stages.
      shortcut: ``"A"`` (parameter-free), ``"A_pool"`` (with an average pool), ``"B"`` (projection).
      zero_channels: where shortcut A puts its zero channels, ``"end"`` or ``"both"`` sides.
      survival: stochastic depth's survival probability of the last block, 1 for none.
      survival_decay: ``"linear"`` or ``"uniform"`` over the blocks.
      use_bias: biases in the convolutions, as in stochastic depth's code.
      scan: run each stage's equal blocks by ``lax.scan`` with stacked parameters: deep networks
        compile as fast as shallow ones.
    """

    num_classes: int = 10
    blocks_per_stage: int = 3
    widths: tuple[int, ...] = (16, 32, 64)
    shortcut: str = "A"
    zero_channels: str = "end"
    survival: float = 1.0
    survival_decay: str = "linear"
    use_bias: bool = False
    scan: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "blocks_per_stage")
        check_choice(self, "shortcut", ("A", "A_pool", "B"))
        check_choice(self, "zero_channels", ("end", "both"))
        check_choice(self, "survival_decay", ("linear", "uniform"))
        if not self.widths:
            raise ValueError("widths must hold at least one number")
        if not 0.0 < self.survival <= 1.0:
            raise ValueError(f"survival must be in (0, 1], got {self.survival!r}")


class ResNetCifar(blocks.Model):
    """Features ``stem``, ``layer1`` ... ``layer3``, each block as ``layer1/0``, and ``pool``."""

    def __init__(self, config: ResNetCifarConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.min_size = 2 ** (len(config.widths) - 1)
        dtype = config.dtype
        n = config.blocks_per_stage
        channels = config.widths[0]
        options: Any = {"use_bias": config.use_bias, "dtype": dtype, "rngs": rngs}
        self.conv1 = blocks.conv(config.in_channels, channels, 3, **options)
        self.bn1 = blocks.batch_norm(channels, dtype=dtype, rngs=rngs)
        for i, width in enumerate(config.widths):

            def make(
                j: int, rngs: nnx.Rngs, *, i: int = i, w: int = width, c: int = channels
            ) -> Any:
                return residual.BasicBlock(
                    w if j else c,
                    w,
                    1 if j or not i else 2,
                    shortcut=config.shortcut,
                    zeros=config.zero_channels,
                    use_bias=config.use_bias,
                    dtype=dtype,
                    rngs=rngs,
                )

            setattr(self, f"layer{i + 1}", depth.make_stage(make, n, rngs=rngs, scan=config.scan))
            channels = width
        self.fc = blocks.linear(channels, config.num_classes, dtype=dtype, rngs=rngs)
        if config.survival < 1:
            self.depth = depth.RandomDepth(
                n * len(config.widths), config.survival, decay=config.survival_decay, rngs=rngs
            )

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        n = self.config.blocks_per_stage
        gates = self.depth() if self.config.survival < 1 else None
        x = taps("stem", jax.nn.relu(self.bn1(self.conv1(x))))
        for i in range(len(self.config.widths)):
            x = depth.run_stage(
                getattr(self, f"layer{i + 1}"),
                x,
                taps,
                f"layer{i + 1}",
                gates=None if gates is None else gates[i * n : (i + 1) * n],
                remat=self.config.remat,
            )
        x = taps("pool", blocks.global_avg_pool(x))
        return self.fc(x)


_SHAPE = (32, 32, 3)
for _depth in (20, 32, 44, 56, 110, 1202):
    register(
        f"resnet{_depth}_cifar",
        ResNetCifar,
        ResNetCifarConfig(blocks_per_stage=(_depth - 2) // 6, scan=_depth > 200),
        input_shape=_SHAPE,
    )
for _depth in (110, 152, 1202):
    register(
        f"stochastic_depth_{_depth}",
        ResNetCifar,
        ResNetCifarConfig(
            blocks_per_stage=(_depth - 2) // 6,
            shortcut="A_pool",
            survival=0.5,
            scan=_depth > 200,
        ),
        input_shape=_SHAPE,
    )
