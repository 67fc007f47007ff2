"""MobileNet v1 and v2.

Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision applications",
2017, 1704.04861. Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: inverted residuals and linear
bottlenecks", CVPR 2018, 1801.04381.

``width`` is the paper's width multiplier, ``image_size`` its resolution multiplier (any size runs).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_choice, check_positive, check_rate, register

_ACTIVATIONS = {"relu": jax.nn.relu, "relu6": jax.nn.relu6}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobileNetConfig(ModelConfig):
    """Fields of both versions.

    Attributes:
      width: multiplier of the channels.
      image_size: the standard input's height and width (224, 192, 160, 128, ...).
      activation: ``"relu"`` (v1 paper) or ``"relu6"`` (v2, and the v1 of Keras and slim).
      padding: of the strided convolutions: ``"SAME"`` (TensorFlow) or ``"torch"`` (one zero each
        side); they differ on even maps.
      dropout: drop rate before the classifier.
      bn_epsilon, bn_momentum: of the batch norms (Keras: 1e-3 and .99 in v1, .999 in v2).
    """

    width: float = 1.0
    image_size: int = 224
    activation: str = "relu6"
    padding: str = "torch"
    dropout: float = 0.0
    bn_epsilon: float = 1e-5
    bn_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "image_size")
        check_choice(self, "activation", tuple(_ACTIVATIONS))
        check_choice(self, "padding", ("SAME", "torch"))
        check_rate(self, "dropout")
        if not 0 < self.width <= 8:
            raise ValueError(f"width must be in (0, 8], got {self.width!r}")


def _unit(
    config: MobileNetConfig,
    in_features: int,
    features: int,
    kernel: int,
    stride: int = 1,
    *,
    rngs: nnx.Rngs,
    groups: int = 1,
) -> blocks.ConvNorm:
    """Convolution and batch norm; the caller activates."""
    return blocks.ConvNorm(
        in_features,
        features,
        kernel,
        stride,
        relu=False,
        groups=groups,
        pad="SAME" if config.padding == "SAME" else None,
        dtype=config.dtype,
        epsilon=config.bn_epsilon,
        momentum=config.bn_momentum,
        rngs=rngs,
    )


# (stride of the depthwise convolution, output channels)
_V1 = ((1, 64), (2, 128), (1, 128), (2, 256), (1, 256), (2, 512), *5 * ((1, 512),), (2, 1024))
_V1 = (*_V1, (1, 1024))  # the paper prints stride 2 here, on a 7x7 map: it must be 1


class Separable(nnx.Module):
    """Depthwise 3x3, BN, activation; 1x1, BN, activation."""

    def __init__(
        self,
        config: MobileNetConfig,
        in_features: int,
        features: int,
        stride: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.activation = config.activation
        self.depthwise = _unit(
            config, in_features, in_features, 3, stride, groups=in_features, rngs=rngs
        )
        self.pointwise = _unit(config, in_features, features, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', out)."""
        act = _ACTIVATIONS[self.activation]
        return act(self.pointwise(act(self.depthwise(x))))


class MobileNetV1(blocks.Model):
    """Stem and 13 separable blocks. Features ``stem``, ``blocks/0`` ... ``blocks/12``, ``pool``.

    Channels are int(c * width), at least 8 (slim's rule).
    """

    def __init__(self, config: MobileNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = lambda c: max(8, int(c * config.width))  # noqa: E731
        self.stem = _unit(config, config.in_channels, width(32), 3, 2, rngs=rngs)
        channels = width(32)
        units = []
        for stride, features in _V1:
            units.append(Separable(config, channels, width(features), stride, rngs=rngs))
            channels = width(features)
        self.blocks = nnx.List(units)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.fc = blocks.linear(channels, config.num_classes, dtype=config.dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        x = taps("stem", _ACTIVATIONS[self.config.activation](self.stem(x)))
        for i, block in enumerate(self.blocks):
            x = taps(f"blocks/{i}", blocks.run(block, x, remat=self.config.remat))
        x = taps("pool", blocks.global_avg_pool(x))
        return self.fc(self.dropout(x))


# (expansion t, channels, repeats, stride of the first)
_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def round_channels(value: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor``, at least ``divisor``, never below 0.9 of ``value``."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class InvertedResidual(nnx.Module):
    """1x1 to t C_in, BN, act (none if t is 1); depthwise 3x3, BN, act; 1x1, BN (linear).

    The input is added where stride is 1 and the channels stay.
    """

    def __init__(
        self,
        config: MobileNetConfig,
        in_features: int,
        features: int,
        stride: int,
        expansion: int,
        *,
        rngs: nnx.Rngs,
    ):
        middle = in_features * expansion
        self.activation = config.activation
        self.residual = stride == 1 and in_features == features
        self.expand = (
            _unit(config, in_features, middle, 1, rngs=rngs) if expansion != 1 else nnx.data(None)
        )
        self.depthwise = _unit(config, middle, middle, 3, stride, groups=middle, rngs=rngs)
        self.project = _unit(config, middle, features, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', out)."""
        act = _ACTIVATIONS[self.activation]
        y = x if self.expand is None else act(self.expand(x))
        y = self.project(act(self.depthwise(y)))
        return x + y if self.residual else y


class MobileNetV2(blocks.Model):
    """Stem, 17 inverted residuals, head. Features ``stem``, ``blocks/i``, ``head``, ``pool``."""

    def __init__(self, config: MobileNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = round_channels(32 * config.width)
        self.stem = _unit(config, config.in_channels, channels, 3, 2, rngs=rngs)
        units = []
        for expansion, features, repeats, stride in _V2:
            features = round_channels(features * config.width)
            for i in range(repeats):
                step = 1 if i else stride
                units.append(
                    InvertedResidual(config, channels, features, step, expansion, rngs=rngs)
                )
                channels = features
        self.blocks = nnx.List(units)
        last = round_channels(1280 * max(1.0, config.width))
        self.head = _unit(config, channels, last, 1, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.fc = blocks.linear(last, config.num_classes, dtype=config.dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        act = _ACTIVATIONS[self.config.activation]
        x = taps("stem", act(self.stem(x)))
        for i, block in enumerate(self.blocks):
            x = taps(f"blocks/{i}", blocks.run(block, x, remat=self.config.remat))
        x = taps("head", act(self.head(x)))
        x = taps("pool", blocks.global_avg_pool(x))
        return self.fc(self.dropout(x))


def _register() -> None:
    v1 = MobileNetConfig(activation="relu", padding="SAME", dropout=0.001)
    for suffix, width in (("", 1.0), ("_075", 0.75), ("_050", 0.5), ("_025", 0.25)):
        config = dataclasses.replace(v1, width=width)
        register(f"mobilenet_v1{suffix}", MobileNetV1, config, input_shape=(224, 224, 3))
    v2 = MobileNetConfig(dropout=0.2)
    for suffix, width in (("", 1.0), ("_140", 1.4), ("_075", 0.75), ("_050", 0.5), ("_035", 0.35)):
        config = dataclasses.replace(v2, width=width)
        register(f"mobilenet_v2{suffix}", MobileNetV2, config, input_shape=(224, 224, 3))


_register()
