"""DenseNets: Huang, Liu, van der Maaten, Weinberger, CVPR 2017, 1608.06993.

Every layer's output is concatenated after its input. A BC layer is BN-ReLU-1x1-BN-ReLU-3x3, a plain
one BN-ReLU-3x3; a transition is BN-ReLU-1x1 and a 2x2 average pool.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import (
    ModelConfig,
    check_choice,
    check_positive,
    check_rate,
    register,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseNetConfig(ModelConfig):
    """DenseNets.

    Attributes:
      growth: k, channels that a layer adds.
      stages: layers per dense block.
      bottleneck: whether layers start with a 1x1 convolution to 4k channels.
      compression: share of channels that a transition keeps.
      stem: ``"imagenet"`` (7x7/2, BN, ReLU, max pool) or ``"cifar"`` (3x3, no batch norm).
      stem_width: channels of the stem.
      dropout: rate after the convolutions.
      drop: ``"all"`` convolutions but the stem (the authors), or each layer's ``"last"``
        (torchvision).
      epsilon: of the batch norms (Keras: 1.001e-5).
    """

    growth: int = 32
    stages: tuple[int, ...] = (6, 12, 24, 16)
    bottleneck: bool = True
    compression: float = 0.5
    stem: str = "imagenet"
    stem_width: int = 64
    dropout: float = 0.0
    drop: str = "all"
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "growth", "stem_width")
        check_choice(self, "stem", ("imagenet", "cifar"))
        check_choice(self, "drop", ("all", "last"))
        check_rate(self, "dropout")
        if not 0.0 < self.compression <= 1.0:
            raise ValueError(f"compression must be in (0, 1], got {self.compression!r}")
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"stages must hold numbers >= 1, got {self.stages!r}")


class DenseLayer(nnx.Module):
    """Adds ``growth`` channels to its input: concatenate(x, F(x))."""

    def __init__(self, in_features: int, config: DenseNetConfig, *, rngs: nnx.Rngs):
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        norms: Any = {"epsilon": config.epsilon, **options}
        middle = 4 * config.growth if config.bottleneck else in_features
        self.bottleneck = config.bottleneck
        if config.bottleneck:
            self.bn1 = blocks.batch_norm(in_features, **norms)
            self.conv1 = blocks.conv(in_features, middle, 1, **options)
        self.bn2 = blocks.batch_norm(middle, **norms)
        self.conv2 = blocks.conv(middle, config.growth, 3, **options)
        both = config.dropout and config.drop == "all" and config.bottleneck
        self.drop1 = nnx.Dropout(config.dropout, rngs=rngs) if both else None
        self.drop2 = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: Any) -> Any:
        """(N, H, W, C) -> (N, H, W, C + growth), the input's channels first."""
        y = x
        if self.bottleneck:
            y = self.conv1(jax.nn.relu(self.bn1(y)))
            y = y if self.drop1 is None else self.drop1(y)
        y = self.conv2(jax.nn.relu(self.bn2(y)))
        y = y if self.drop2 is None else self.drop2(y)
        return jnp.concatenate([x, y], -1)


class Transition(nnx.Module):
    """BN-ReLU-1x1 convolution, then a 2x2 average pool."""

    def __init__(self, in_features: int, features: int, config: DenseNetConfig, rngs: nnx.Rngs):
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        self.bn = blocks.batch_norm(in_features, epsilon=config.epsilon, **options)
        self.conv = blocks.conv(in_features, features, 1, **options)
        drops = config.dropout and config.drop == "all"
        self.drop = nnx.Dropout(config.dropout, rngs=rngs) if drops else None

    def __call__(self, x: Any) -> Any:
        """(N, H, W, C) -> (N, H // 2, W // 2, features)."""
        x = self.conv(jax.nn.relu(self.bn(x)))
        x = x if self.drop is None else self.drop(x)
        return blocks.avg_pool(x, 2)


class DenseNet(blocks.Model):
    """Features ``stem``, ``block1``, ``transition1``, ..., ``final`` and ``pool``."""

    def __init__(self, config: DenseNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        channels = config.stem_width
        big = config.stem == "imagenet"
        self.min_size = 2 ** (len(config.stages) - 1) * (4 if big else 1) - (3 if big else 0)
        if big:
            self.conv0 = blocks.conv(config.in_channels, channels, 7, 2, **options)
            self.bn0 = blocks.batch_norm(channels, epsilon=config.epsilon, **options)
        else:
            self.conv0 = blocks.conv(config.in_channels, channels, 3, **options)
        stages, transitions = [], []
        for i, count in enumerate(config.stages):
            layers = []
            for _ in range(count):
                layers.append(DenseLayer(channels, config, rngs=rngs))
                channels += config.growth
            stages.append(nnx.List(layers))
            if i < len(config.stages) - 1:
                kept = int(channels * config.compression)
                transitions.append(Transition(channels, kept, config, rngs))
                channels = kept
        self.stages = nnx.List(stages)
        self.transitions = nnx.List(transitions)
        self.bn = blocks.batch_norm(channels, epsilon=config.epsilon, **options)
        self.fc = blocks.linear(channels, config.num_classes, **options)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        remat = self.config.remat
        x = self.conv0(x)
        if self.config.stem == "imagenet":
            x = blocks.max_pool(jax.nn.relu(self.bn0(x)), 3, 2, pad=1)
        taps("stem", x)
        for i, stage in enumerate(self.stages):
            if i:
                x = blocks.run(self.transitions[i - 1], x, remat=remat)
                taps(f"transition{i}", x)
            for layer in stage:
                x = blocks.run(layer, x, remat=remat)
            taps(f"block{i + 1}", x)
        x = taps("final", jax.nn.relu(self.bn(x)))
        return self.fc(taps("pool", blocks.global_avg_pool(x)))


for _name, _growth, _stages in (
    ("121", 32, (6, 12, 24, 16)),
    ("169", 32, (6, 12, 32, 32)),
    ("201", 32, (6, 12, 48, 32)),
    ("161", 48, (6, 12, 36, 24)),
    ("264", 32, (6, 12, 64, 48)),
):
    register(
        f"densenet{_name}",
        DenseNet,
        DenseNetConfig(growth=_growth, stages=_stages, stem_width=2 * _growth),
        input_shape=(224, 224, 3),
    )
for _depth, _growth in ((40, 12), (100, 12), (100, 24)):
    register(
        f"densenet_{_depth}_{_growth}",
        DenseNet,
        DenseNetConfig(
            num_classes=10,
            growth=_growth,
            stages=((_depth - 4) // 3,) * 3,
            bottleneck=False,
            compression=1.0,
            stem="cifar",
            stem_width=16,
        ),
        input_shape=(32, 32, 3),
    )
for _depth, _growth in ((100, 12), (250, 24), (190, 40)):
    register(
        f"densenet_bc_{_depth}_{_growth}",
        DenseNet,
        DenseNetConfig(
            num_classes=10,
            growth=_growth,
            stages=((_depth - 4) // 6,) * 3,
            stem="cifar",
            stem_width=2 * _growth,
        ),
        input_shape=(32, 32, 3),
    )
