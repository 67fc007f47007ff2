"""Inception-ResNet-v1 and -v2.

Szegedy, Ioffe, Vanhoucke, Alemi, "Inception-v4, Inception-ResNet and the impact of residual
connections on learning", AAAI 2017, 1602.07261.

A block is ReLU(x + s * up(concat(branches))): ``up`` is a 1x1 convolution with a bias and neither
batch norm nor activation, and s scales the branch, never the identity (without it blocks wider than
1,000 filters die early in training).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.inception_blocks import Builder, Concat, InceptionConfig, InceptionModel, Table
from cnnjax.models.inception_v3 import V3_STEM, V4_STEM, aux_on, reduction_a
from cnnjax.models.registry import register


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionResNetConfig(InceptionConfig):
    """Fields of both versions.

    Attributes:
      blocks: numbers of scaled A, B and C blocks.
      scales: s of the A, B and C blocks.
      final_block: one more C block with s = 1 and no ReLU (slim, Keras, timm in v2; FaceNet in v1).
      paper: v2 only: the paper's figures (v4 stem, no 1x1 tail) instead of the released network.
    """

    blocks: tuple[int, int, int] = (5, 10, 5)
    scales: tuple[float, float, float] = (0.17, 0.10, 0.20)
    final_block: bool = False
    paper: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.blocks) != 3 or min(self.blocks) < 1:
            raise ValueError(f"blocks must be three numbers >= 1, got {self.blocks!r}")
        if len(self.scales) != 3:
            raise ValueError(f"scales must be three numbers, got {self.scales!r}")


class ResidualBlock(nnx.Module):
    """ReLU(x + scale * up(branches(x))), or without the ReLU."""

    def __init__(
        self,
        branches: Concat,
        inner: int,
        channels: int,
        *,
        scale: float,
        rngs: nnx.Rngs,
        relu: bool = True,
        dtype: str | None = None,
    ):
        self.branches = branches
        self.up = blocks.conv(inner, channels, 1, use_bias=True, dtype=dtype, rngs=rngs)
        self.scale = scale
        self.relu = relu

    def __call__(self, x: Any) -> Any:
        """(N, H, W, C) -> same."""
        y = x + jnp.asarray(self.scale, x.dtype) * self.up(self.branches(x))
        return jax.nn.relu(y) if self.relu else y


def _blocks(
    config: InceptionResNetConfig, stage: int, branches: tuple[str, ...], rngs: nnx.Rngs
) -> list[tuple[str, Callable[[Builder], nnx.Module]]]:
    """The named residual blocks of one stage (0, 1, 2 for A, B, C)."""

    def make(scale: float, relu: bool) -> Callable[[Builder], nnx.Module]:
        def build(builder: Builder) -> nnx.Module:
            inside, inner = builder.branches(branches)
            return ResidualBlock(
                inside,
                inner,
                builder.channels,
                scale=scale,
                relu=relu,
                dtype=config.dtype,
                rngs=rngs,
            )

        return build

    letter = "abc"[stage]
    count = config.blocks[stage]
    out = [(f"block_{letter}{i}", make(config.scales[stage], True)) for i in range(count)]
    if stage == 2 and config.final_block:
        out.append((f"block_{letter}{count}", make(1.0, False)))
    return out


def _reduction_b(first: int, second: int, third: tuple[int, int]) -> tuple[str, ...]:
    return (
        f"1x1 256 -> 3x3/2 V {first}",
        f"1x1 256 -> 3x3/2 V {second}",
        f"1x1 256 -> 3x3 {third[0]} -> 3x3/2 V {third[1]}",
        "max3/2 V",
    )


class InceptionResNetV1(InceptionModel):
    """Features ``conv_1a`` ..., ``block_a0`` ..., ``reduction_a``, ``block_b0`` ..., ``pool``."""

    min_size = 75

    def __init__(self, config: InceptionResNetConfig, *, rngs: nnx.Rngs):
        a = ("1x1 32", "1x1 32 -> 3x3 32", "1x1 32 -> 3x3 32 -> 3x3 32")
        b = ("1x1 128", "1x1 128 -> 1x7 128 -> 7x1 128")
        c = ("1x1 192", "1x1 192 -> 1x3 192 -> 3x1 192")
        table: list[tuple[str, Any]] = [
            *V3_STEM,
            ("conv_5a", "3x3/2 V 256"),
            *_blocks(config, 0, a, rngs),
            ("reduction_a", reduction_a(192, 192, 256, 384)),
            *_blocks(config, 1, b, rngs),
            ("reduction_b", _reduction_b(384, 256, (256, 256))),
            *_blocks(config, 2, c, rngs),
        ]
        last = f"block_b{config.blocks[1] - 1}"
        self._build(config, table, aux=aux_on(last, config, rngs), rngs=rngs)


class InceptionResNetV2(InceptionModel):
    """Features ``conv_1a`` ..., ``mixed_5b``, ``block_a0`` ..., ``reduction_a``, ..., ``pool``."""

    min_size = 75

    def __init__(self, config: InceptionResNetConfig, *, rngs: nnx.Rngs):
        a = ("1x1 32", "1x1 32 -> 3x3 32", "1x1 32 -> 3x3 48 -> 3x3 64")
        b = ("1x1 192", "1x1 128 -> 1x7 160 -> 7x1 192")
        c = ("1x1 192", "1x1 192 -> 1x3 224 -> 3x1 256")
        mixed_5b = (
            "1x1 96",
            "1x1 48 -> 5x5 64",
            "1x1 64 -> 3x3 96 -> 3x3 96",
            "avg3 -> 1x1 64",
        )
        released: Table = (*V3_STEM, ("pool_5a", "max3/2 V"), ("mixed_5b", mixed_5b))
        table: list[tuple[str, Any]] = [
            *(V4_STEM if config.paper else released),
            *_blocks(config, 0, a, rngs),
            ("reduction_a", reduction_a(256, 256, 384, 384)),
            *_blocks(config, 1, b, rngs),
            ("reduction_b", _reduction_b(384, 288, (288, 320))),
            *_blocks(config, 2, c, rngs),
        ]
        if not config.paper:
            table.append(("conv_7b", "1x1 1536"))
        last = f"block_b{config.blocks[1] - 1}"
        self._build(config, table, aux=aux_on(last, config, rngs), rngs=rngs)


_SHAPE = (299, 299, 3)
register("inception_resnet_v1", InceptionResNetV1, InceptionResNetConfig(), input_shape=_SHAPE)
register(
    "inception_resnet_v2",
    InceptionResNetV2,
    InceptionResNetConfig(blocks=(10, 20, 9), final_block=True),
    input_shape=_SHAPE,
)
register(
    "inception_resnet_v2_paper",
    InceptionResNetV2,
    InceptionResNetConfig(paper=True),
    input_shape=_SHAPE,
)
