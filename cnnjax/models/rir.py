"""ResNet in ResNet: Targ, Almeida, Lyman, ICLR 2016 workshop, 1603.08029.

Two parallel streams, residual r and transient t, with s = ReLU(BN(.)) per stream:
r' = s(W_rr r + W_tr t + shortcut(r)), t' = s(W_rt r + W_tt t). An RiR block is two such layers and
an outer shortcut added to the residual stream after the second layer's ReLU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax.models import blocks, residual
from cnnjax.models.registry import ModelConfig, check_choice, check_positive, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class RirConfig(ModelConfig):
    """RiR variants.

    Attributes:
      width: of each stream in the first stage; it doubles from stage to stage.
      stages: RiR blocks per stage.
      shortcut: ``"A"`` (parameter-free) or ``"B"`` (1x1 projection) on the residual
        stream of a layer that changes shape.
      outer_shortcut: the parameter-free shortcut over a whole block.
      stride_layer: which of a block's two layers halves the resolution, 1 or 2.
    """

    num_classes: int = 10
    width: int = 48
    stages: tuple[int, ...] = (2, 3, 3)
    shortcut: str = "A"
    outer_shortcut: bool = True
    stride_layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "width")
        check_choice(self, "shortcut", ("A", "B"))
        check_choice(self, "stride_layer", (1, 2))
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"stages must hold numbers >= 1, got {self.stages!r}")


class RirLayer(nnx.Module):
    """The generalised residual layer on a pair of streams."""

    def __init__(self, in_features: int, features: int, stride: int, *, kind: str, **options: Any):
        def conv() -> Any:
            return blocks.conv(in_features, features, 3, stride, **options)

        self.conv_rr, self.conv_rt = conv(), conv()
        self.conv_tr, self.conv_tt = conv(), conv()
        self.bn_r = blocks.batch_norm(features, **options)
        self.bn_t = blocks.batch_norm(features, **options)
        self.stride = stride
        self.project = kind == "B" and (stride != 1 or in_features != features)
        if self.project:
            self.projection = blocks.conv(in_features, features, 1, stride, **options)

    def __call__(self, r: Any, t: Any) -> Any:
        """(r, t) -> (r', t'), each (N, H, W, C)."""
        if self.project:
            short = self.projection(r)
        else:
            features = residual.last_kernel(self.conv_rr).shape[-1]
            short = residual.shortcut_a(r, features, self.stride)
        new_r = self.conv_rr(r) + self.conv_tr(t) + short
        new_t = self.conv_rt(r) + self.conv_tt(t)
        return jax.nn.relu(self.bn_r(new_r)), jax.nn.relu(self.bn_t(new_t))


class RirBlock(nnx.Module):
    """Two generalised residual layers and the outer shortcut."""

    def __init__(
        self, in_features: int, features: int, stride: int, config: RirConfig, **options: Any
    ):
        first, second = (stride, 1) if config.stride_layer == 1 else (1, stride)
        self.layer1 = RirLayer(in_features, features, first, kind=config.shortcut, **options)
        self.layer2 = RirLayer(features, features, second, kind=config.shortcut, **options)
        self.stride = stride
        self.outer = config.outer_shortcut

    def __call__(self, r: Any, t: Any) -> Any:
        """(r, t) -> (r', t')."""
        new_r, new_t = self.layer2(*self.layer1(r, t))
        if self.outer:
            new_r = new_r + residual.shortcut_a(r, new_r.shape[-1], self.stride)
        return new_r, new_t


class Rir(blocks.Model):
    """Features ``stem``, ``stage1`` ..., ``maps``: both streams joined, residual first."""

    def __init__(self, config: RirConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.min_size = 2 ** (len(config.stages) - 1)
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        channels = config.width
        self.stem_r = blocks.ConvNorm(config.in_channels, channels, 3, **options)
        self.stem_t = blocks.ConvNorm(config.in_channels, channels, 3, **options)
        stages = []
        for i, count in enumerate(config.stages):
            width = config.width * 2**i
            stage = []
            for j in range(count):
                stride = 2 if i and not j else 1
                stage.append(RirBlock(channels, width, stride, config, **options))
                channels = width
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        self.head = blocks.ConvNorm(2 * channels, config.num_classes, 1, **options)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        r, t = self.stem_r(x), self.stem_t(x)
        if taps.wants("stem"):
            taps("stem", jnp.concatenate([r, t], -1))
        for i, stage in enumerate(self.stages):
            for block in stage:
                r, t = blocks.run(block, r, t, remat=self.config.remat)
            if taps.wants(f"stage{i + 1}"):
                taps(f"stage{i + 1}", jnp.concatenate([r, t], -1))
        x = taps("maps", self.head(jnp.concatenate([r, t], -1)))
        return blocks.global_avg_pool(x)


register("rir_18_wide", Rir, RirConfig(), input_shape=(32, 32, 3))
register(
    "rir_18_wide_projection",
    Rir,
    RirConfig(shortcut="B", outer_shortcut=False, stride_layer=1),
    input_shape=(32, 32, 3),
)
