"""Cross-connected networks: pooling layers that also feed the dense layer directly.

Zhang, Li, Hu, Zhang, "A gender classification model based on cross-connected convolutional neural
networks", Acta Automatica Sinica 42(6), 2016; Li, Lin, Jiang, "Facial expression recognition with
cross-connect LeNet-5 network", Acta Automatica Sinica 44(1), 2018. The papers' map counts were not
available to us: the defaults are ours, the topology is theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_choice, check_positive, register

_ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossConfig(ModelConfig):
    """Cross-connected networks.

    Attributes:
      widths: maps of C1, C3 and C5.
      hidden: units of the dense layer between, 0 for none.
      activation: ``"relu"`` or ``"tanh"``.
      pool: ``"max"`` or ``"avg"``.
      image_size: height and width; sets the dense layer's width.
    """

    num_classes: int = 2
    in_channels: int = 1
    widths: tuple[int, int, int] = (6, 12, 16)
    hidden: int = 84
    activation: str = "relu"
    pool: str = "max"
    image_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "image_size")
        check_choice(self, "activation", tuple(_ACTIVATIONS))
        check_choice(self, "pool", ("max", "avg"))


class _Cross(blocks.Model):
    """What the two networks share: three convolutions, pools, the joined dense layer."""

    pad = 0

    def __init__(self, config: CrossConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.exact_size = config.image_size
        dense: Any = {
            "kernel_init": blocks.init.uniform_fan_in(1.0),
            "dtype": config.dtype,
            "rngs": rngs,
        }
        options: Any = {"pad": self.pad, "use_bias": True, **dense}
        a, b, c = config.widths
        self.conv1 = blocks.conv(config.in_channels, a, 5, **options)
        self.conv3 = blocks.conv(a, b, 5, **options)
        self.conv5 = blocks.conv(b, c, 5, **options)
        width = self._joined_width()
        if config.hidden:
            self.hidden = blocks.linear(width, config.hidden, **dense)
            width = config.hidden
        self.fc = blocks.linear(width, config.num_classes, **dense)

    def _joined_width(self) -> int:
        raise NotImplementedError

    def _act(self, x: Any) -> Any:
        return _ACTIVATIONS[self.config.activation](x)

    def _pool(self, x: Any) -> Any:
        return blocks.max_pool(x, 2) if self.config.pool == "max" else blocks.avg_pool(x, 2)

    def _head(self, maps: list[Any], taps: blocks.Taps) -> Any:
        x = taps("joined", jnp.concatenate([blocks.flatten(m) for m in maps], -1))
        if self.config.hidden:
            x = taps("hidden", self.part(lambda m, x: m._act(m.hidden(x)), x))
        return self.fc(x)


class CcnnGender(_Cross):
    """S4 skips C5 and S6: the dense layer sees S4 and S6. Features ``s2``, ``s4``, ``s6``."""

    pad = 2

    def _joined_width(self) -> int:
        size = self.config.image_size // 4
        if size < 2:
            raise ValueError(f"image_size must be at least 8, got {self.config.image_size}")
        return size**2 * self.config.widths[1] + (size // 2) ** 2 * self.config.widths[2]

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        x = taps("s2", self.part(lambda m, x: m._pool(m._act(m.conv1(x))), x))
        s4 = taps("s4", self.part(lambda m, x: m._pool(m._act(m.conv3(x))), x))
        s6 = taps("s6", self.part(lambda m, x: m._pool(m._act(m.conv5(x))), s4))
        return self._head([s4, s6], taps)


class CrossLeNet5(_Cross):
    """S2, S4 and C5 all feed the dense layer. Features ``s2``, ``s4``, ``c5``."""

    def _joined_width(self) -> int:
        s2 = (self.config.image_size - 4) // 2
        s4 = (s2 - 4) // 2
        if s4 < 5:
            raise ValueError(f"image_size must be at least 32, got {self.config.image_size}")
        a, b, c = self.config.widths
        return s2**2 * a + s4**2 * b + (s4 - 4) ** 2 * c

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        s2 = taps("s2", self.part(lambda m, x: m._pool(m._act(m.conv1(x))), x))
        s4 = taps("s4", self.part(lambda m, x: m._pool(m._act(m.conv3(x))), s2))
        c5 = taps("c5", self.part(lambda m, x: m._act(m.conv5(x)), s4))
        return self._head([s2, s4, c5], taps)


register("ccnn_gender", CcnnGender, CrossConfig(), input_shape=(32, 32, 1))
register(
    "cross_lenet_5",
    CrossLeNet5,
    CrossConfig(num_classes=7, widths=(6, 16, 120), hidden=0, activation="tanh", pool="avg"),
    input_shape=(32, 32, 1),
)
