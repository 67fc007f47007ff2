"""Maxout Network in Network.

Chang, Chen, "Batch-normalized maxout network in network", 2015, 1511.02583.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.nin import pooled
from cnnjax.models.registry import ModelConfig, check_positive, check_rate, register
from cnnjax.ops import maxout


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxoutNiNConfig(ModelConfig):
    """Maxout NiN.

    Attributes:
      pieces: k, the maps that each maxout unit takes the maximum of.
      dropout: drop rate after the two pools.
    """

    num_classes: int = 10
    pieces: int = 5
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "pieces")
        check_rate(self, "dropout")


class MaxoutMlp(nnx.Module):
    """k x k convolution + BN (no activation), then two 1x1 convolutions + BN + maxout."""

    def __init__(
        self,
        in_features: int,
        widths: tuple[int, int, int],
        kernel: int,
        pieces: int,
        *,
        dtype: str | None,
        rngs: nnx.Rngs,
    ):
        options: Any = {
            "relu": False,
            "use_bias": True,
            "epsilon": 1e-4,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.pieces = pieces
        self.conv = blocks.ConvNorm(in_features, widths[0], kernel, **options)
        self.mlp1 = blocks.ConvNorm(widths[0], widths[1] * pieces, 1, **options)
        self.mlp2 = blocks.ConvNorm(widths[1], widths[2] * pieces, 1, **options)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H, W, out)."""
        x = maxout(self.mlp1(self.conv(x)), self.pieces)
        return maxout(self.mlp2(x), self.pieces)


class MaxoutNiN(blocks.Model):
    """Three maxout mlpconv blocks, average pools. Features ``block1`` ... ``block3``."""

    min_size = 4

    def __init__(self, config: MaxoutNiNConfig, *, rngs: nnx.Rngs):
        self.config = config
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        k = config.pieces
        self.block1 = MaxoutMlp(config.in_channels, (192, 160, 96), 5, k, **options)
        self.block2 = MaxoutMlp(96, (192, 192, 192), 5, k, **options)
        self.block3 = MaxoutMlp(192, (192, 192, config.num_classes), 3, k, **options)
        self.drop1 = nnx.Dropout(config.dropout, rngs=rngs)
        self.drop2 = nnx.Dropout(config.dropout, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        remat = self.config.remat
        x = taps("block1", blocks.run(self.block1, x, remat=remat))
        x = self.drop1(pooled(x, "avg"))
        x = taps("block2", blocks.run(self.block2, x, remat=remat))
        x = self.drop2(pooled(x, "avg"))
        x = taps("block3", blocks.run(self.block3, x, remat=remat))
        return blocks.global_avg_pool(x)


register("maxout_nin", MaxoutNiN, MaxoutNiNConfig(), input_shape=(32, 32, 3))
