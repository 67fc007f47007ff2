"""LeNet-5 as printed: LeCun, Bottou, Bengio, Haffner, Proc. IEEE 86(11), 1998.

Trainable subsampling, a third layer whose maps see only some of the maps before, scaled tanh, and
Euclidean radial-basis outputs whose centres are fixed bitmaps of the digits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_positive, register

# S2 maps that feed each of the 16 C3 maps (the paper's Table I)
CONNECTIONS: tuple[tuple[int, ...], ...] = (
    *(tuple((i + j) % 6 for j in range(3)) for i in range(6)),
    *(tuple((i + j) % 6 for j in range(4)) for i in range(6)),
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)

# 7 columns x 12 rows, drawn for this library after the paper's Fig. 3
_DIGITS = (
    ".####../##..##./#....##/#....##/#....##/#....##/#....##/#....##/#....##/##..##./.####../.......",
    "...##../..###../.####../...##../...##../...##../...##../...##../...##../...##../.######/.......",
    ".#####./##...##/.....##/.....##/....##./...##../..##.../.##..../##...../##...../#######/.......",
    "#######/.....##/....##./...##../..####./.....##/.....##/.....##/.....##/##...##/.#####./.......",
    "....##./...###./..####./.##.##./.##.##./##..##./##..##./#######/....##./....##./....##./.......",
    "#######/##...../##...../##...../######./.....##/.....##/.....##/.....##/##...##/.#####./.......",
    "..####./.##..../##...../##...../######./##...##/##...##/##...##/##...##/##...##/.#####./.......",
    "#######/.....##/.....##/....##./....##./...##../...##../..##.../..##.../.##..../.##..../.......",
    ".#####./##...##/##...##/##...##/.#####./##...##/##...##/##...##/##...##/##...##/.#####./.......",
    ".#####./##...##/##...##/##...##/##...##/.######/.....##/.....##/.....##/....##./.####../.......",
)


def codes(num_classes: int) -> np.ndarray:
    """The output units' centres (num_classes, 84), entries +1 and -1.

    Ten classes have digit bitmaps; any other number random codes, always the same.
    """
    if num_classes != 10:
        rng = np.random.default_rng(1998)
        return rng.choice(np.array([-1.0, 1.0], np.float32), (num_classes, 84))
    ink = [[c == "#" for c in row.replace("/", "")] for row in _DIGITS]
    return np.where(np.array(ink), 1.0, -1.0).astype(np.float32)


def squash(x: Any) -> Any:
    """1.7159 tanh(2x / 3)."""
    return 1.7159 * jnp.tanh(x * (2.0 / 3.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeNet1998Config(ModelConfig):
    """The 1998 LeNet-5.

    Attributes:
      widths: maps of C5 and units of F6; F6 has 84 units, the bitmaps' size.
    """

    num_classes: int = 10
    in_channels: int = 1
    widths: tuple[int, int] = (120, 84)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.widths) != 2 or self.widths[1] != 84:
            raise ValueError(f"widths must be (C5 maps, 84), got {self.widths!r}")
        check_positive(self, "num_classes")


class Subsampling(nnx.Module):
    """squash(gain * sum of each 2x2 window + bias), one gain and bias per map."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        key = rngs.params
        # a window's sum has four terms
        self.scale = nnx.Param(blocks.init.constant(0.25)(key(), (features,)))
        self.bias = nnx.Param(blocks.init.constant(0.0)(key(), (features,)))

    def __call__(self, x: Any) -> Any:
        """(N, H, W, C) -> (N, H // 2, W // 2, C)."""
        scale, bias = self.scale[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return squash(4.0 * blocks.avg_pool(x, 2) * scale + bias)


class PartialConv(nnx.Module):
    """5x5 convolution over `CONNECTIONS`: 1,500 weights and 16 biases, none masked.

    Maps with equally many inputs form one grouped convolution on gathered input maps.
    """

    def __init__(self, **options: Any):
        sizes = sorted({len(c) for c in CONNECTIONS})
        self.order = tuple(
            tuple(i for i, c in enumerate(CONNECTIONS) if len(c) == size) for size in sizes
        )
        self.parts = nnx.List(
            [
                blocks.conv(size * len(maps), len(maps), 5, groups=len(maps), **options)
                for size, maps in zip(sizes, self.order, strict=True)
            ]
        )

    def __call__(self, x: Any) -> Any:
        """(N, H, W, 6) -> (N, H - 4, W - 4, 16)."""
        outs = []
        for maps, conv in zip(self.order, self.parts, strict=True):
            inputs = np.concatenate([np.array(CONNECTIONS[m]) for m in maps])
            outs.append(conv(x[..., inputs]))
        # maps of one size are contiguous in the table, so the outputs are in its order
        return jnp.concatenate(outs, -1)


class LeNet51998(blocks.Model):
    """Features ``c1``, ``s2``, ``c3``, ``s4``, ``c5``, ``f6``.

    Logits are minus the squared distances to the output units' centres.
    """

    min_size = 32

    def __init__(self, config: LeNet1998Config, *, rngs: nnx.Rngs):
        self.config = config
        dense: Any = {
            "kernel_init": blocks.init.uniform_fan_in(1.0),
            "dtype": config.dtype,
            "rngs": rngs,
        }
        options: Any = {"pad": 0, "use_bias": True, **dense}
        c5, f6 = config.widths
        self.c1 = blocks.conv(config.in_channels, 6, 5, **options)
        self.s2 = Subsampling(6, rngs=rngs)
        self.c3 = PartialConv(**options)
        self.s4 = Subsampling(16, rngs=rngs)
        self.c5 = blocks.conv(16, c5, 5, **options)
        self.f6 = blocks.linear(c5, f6, **dense)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        x = taps("c1", self.part(lambda m, x: squash(m.c1(x)), x))
        x = taps("s2", self.part(lambda m, x: m.s2(x), x))
        x = taps("c3", self.part(lambda m, x: squash(m.c3(x)), x))
        x = taps("s4", self.part(lambda m, x: m.s4(x), x))
        x = taps("c5", self.part(lambda m, x: squash(m.c5(x)), x))
        x = taps("f6", self.part(lambda m, x: squash(m.f6(blocks.global_avg_pool(x))), x))
        centres = jnp.asarray(codes(self.config.num_classes), x.dtype)
        # |x - c|^2 without the (N, classes, 84) differences
        return 2.0 * (x @ centres.T) - jnp.sum(x * x, -1, keepdims=True) - centres.shape[1]


register("lenet_5_1998", LeNet51998, LeNet1998Config(), input_shape=(32, 32, 1))
