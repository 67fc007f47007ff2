"""Highway networks: Srivastava, Greff, Schmidhuber, 2015, 1505.00387 and 1507.06228.

y = H(x) T(x) + x (1 - T(x)), H = ReLU(conv), T = sigmoid(conv); the gate's bias starts negative so
that a fresh network carries its input through.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_positive, check_rate, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class HighwayConfig(ModelConfig):
    """Highway networks.

    Attributes:
      stages: (width, highway layers, pool window or 0) of every stage; pools have stride 2 and
        round up. A plain convolution starts a stage whose width differs from the one before.
      stage_dropout: rate after every stage's pool.
      input_dropout: rate on the image.
      first_kernel: size of the first convolution; 5 without padding, 3 padded.
      gate_bias: initial bias of the transform gates.
      head_width: channels of the 1x1 convolution before the average pool; 0 flattens instead.
      head_dropout: rate before the dense layer.
      image_size: height and width that a flattening head is built for.
    """

    num_classes: int = 10
    stages: tuple[tuple[int, int, int], ...] = ((32, 4, 2), (80, 5, 2), (128, 5, 0))
    stage_dropout: tuple[float, ...] = (0.2, 0.2, 0.0)
    input_dropout: float = 0.2
    first_kernel: int = 3
    gate_bias: float = -2.0
    head_width: int = 100
    head_dropout: float = 0.2
    image_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "first_kernel", "image_size")
        check_rate(self, "input_dropout", "head_dropout")
        if len(self.stage_dropout) != len(self.stages):
            raise ValueError(
                f"stage_dropout {self.stage_dropout!r} must hold one rate per stage, "
                f"{len(self.stages)} of them"
            )


class HighwayLayer(nnx.Module):
    """y = H(x) T(x) + x (1 - T(x)), both convolutions 3x3 of the same width, with biases."""

    def __init__(self, features: int, gate_bias: float, *, rngs: nnx.Rngs, dtype: str | None):
        options: Any = {
            "use_bias": True,
            "kernel_init": blocks.init.uniform_fan_in(1.0),
            "dtype": dtype,
            "rngs": rngs,
        }
        self.conv_h = blocks.conv(features, features, 3, **options)
        self.conv_t = blocks.conv(
            features, features, 3, bias_init=blocks.init.constant(gate_bias), **options
        )

    def __call__(self, x: Any) -> Any:
        """(N, H, W, C) -> the same shape."""
        h = jax.nn.relu(self.conv_h(x))
        t = jax.nn.sigmoid(self.conv_t(x))
        return h * t + x * (1 - t)


class Highway(blocks.Model):
    """Features ``stage1`` ... (after the pool), each layer as ``stage1/0``, and ``head``."""

    def __init__(self, config: HighwayConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = config.dtype
        options: Any = {
            "use_bias": True,
            "kernel_init": blocks.init.uniform_fan_in(1.0),
            "dtype": dtype,
            "rngs": rngs,
        }
        flat = not config.head_width
        pad = 0 if flat else config.first_kernel // 2
        size = config.image_size - config.first_kernel + 1 + 2 * pad
        channels = config.in_channels
        stages, plains, drops = [], [], []
        for i, (width, count, window) in enumerate(config.stages):
            if width != channels:
                kernel = 3 if i else config.first_kernel
                plains.append(blocks.conv(channels, width, kernel, pad=1 if i else pad, **options))
            else:
                plains.append(None)
            layers = [
                HighwayLayer(width, config.gate_bias, dtype=dtype, rngs=rngs) for _ in range(count)
            ]
            stages.append(nnx.List(layers))
            drops.append(_dropout(config.stage_dropout[i], rngs))
            channels = width
            if window:
                size = _pooled(size, window)
        if size < 1:
            raise ValueError(f"image_size {config.image_size} is too small for the pools")
        self.plain = nnx.List(plains)
        self.stages = nnx.List(stages)
        self.drop_stage = nnx.List(drops)
        self.drop_input = _dropout(config.input_dropout, rngs)
        self.drop_head = _dropout(config.head_dropout, rngs)
        if flat:
            self.exact_size = config.image_size
            channels = size * size * channels
        else:
            self.min_size = 2 ** sum(1 for s in config.stages if s[2])
            self.conv_head = blocks.conv(channels, config.head_width, 1, **options)
            channels = config.head_width
        self.fc = blocks.linear(channels, config.num_classes, dtype=dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        x = _drop(self.drop_input, x)
        for i, (_, _, window) in enumerate(self.config.stages):
            if self.plain[i] is not None:
                x = jax.nn.relu(self.plain[i](x))
            for j, layer in enumerate(self.stages[i]):
                x = taps(f"stage{i + 1}/{j}", blocks.run(layer, x, remat=self.config.remat))
            if window:
                x = blocks.max_pool(x, window, 2, ceil=True)
            x = taps(f"stage{i + 1}", _drop(self.drop_stage[i], x))
        if self.config.head_width:
            x = blocks.global_avg_pool(jax.nn.relu(self.conv_head(x)))
        else:
            x = blocks.flatten(x)
        return self.fc(_drop(self.drop_head, taps("head", x)))


def _dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout | None:
    return nnx.Dropout(rate, rngs=rngs) if rate else None


def _drop(layer: Any, x: Any) -> Any:
    return x if layer is None else layer(x)


def _pooled(size: int, window: int) -> int:
    return -(-(size - window) // 2) + 1


register("highway_19", Highway, HighwayConfig(), input_shape=(32, 32, 3))
register(
    "highway_10",
    Highway,
    HighwayConfig(
        in_channels=1,
        stages=((32, 2, 3), (32, 3, 3), (32, 3, 2)),
        stage_dropout=(0.3, 0.4, 0.5),
        first_kernel=5,
        gate_bias=-1.0,
        head_width=0,
        head_dropout=0.0,
        image_size=28,
    ),
    input_shape=(28, 28, 1),
)
