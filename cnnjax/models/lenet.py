"""LeNet-300-100 and LeNet-5 in its modern and Caffe forms.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998.
The Caffe form is the pruning papers' baseline: its convolutions are linear before the max pool.
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
class LeNetConfig(ModelConfig):
    """LeNet variants.

    Attributes:
      image_size: height and width of the input; sets the first dense layer's width.
      activation: ``"relu"`` or ``"tanh"``.
      pool: ``"avg"`` or ``"max"`` (modern LeNet-5 only).
    """

    num_classes: int = 10
    in_channels: int = 1
    image_size: int = 28
    activation: str = "relu"
    pool: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "image_size")
        check_choice(self, "activation", tuple(_ACTIVATIONS))
        check_choice(self, "pool", ("avg", "max"))


class LeNet300100(blocks.Model):
    """Dense 300 - 100 - classes on flattened images (three weight layers)."""

    def __init__(self, config: LeNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.exact_size = config.image_size
        inputs = config.image_size**2 * config.in_channels
        self.flattened = (("fc1", (config.image_size, config.image_size, config.in_channels)),)
        self.fc1 = blocks.linear(inputs, 300, dtype=config.dtype, rngs=rngs)
        self.fc2 = blocks.linear(300, 100, dtype=config.dtype, rngs=rngs)
        self.fc3 = blocks.linear(100, config.num_classes, dtype=config.dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        act = _ACTIVATIONS[self.config.activation]
        x = taps("fc1", self.part(lambda m, x: act(m.fc1(blocks.flatten(x))), x))
        x = taps("fc2", self.part(lambda m, x: act(m.fc2(x)), x))
        return self.fc3(x)


class LeNet5Caffe(blocks.Model):
    """conv 20 - pool - conv 50 - pool - dense 500 - classes; ReLU only after the dense layer."""

    def __init__(self, config: LeNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.exact_size = config.image_size
        side = ((config.image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"image_size must be at least 16, got {config.image_size}")
        dtype = config.dtype
        options: Any = {"pad": 0, "use_bias": True, "dtype": dtype, "rngs": rngs}
        init = blocks.init.uniform_fan_in(1.0)
        self.conv1 = blocks.conv(config.in_channels, 20, 5, kernel_init=init, **options)
        self.conv2 = blocks.conv(20, 50, 5, kernel_init=init, **options)
        self.flattened = (("fc1", (side, side, 50)),)
        self.fc1 = blocks.linear(side * side * 50, 500, dtype=dtype, rngs=rngs)
        self.fc2 = blocks.linear(500, config.num_classes, dtype=dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        x = taps("pool1", self.part(lambda m, x: blocks.max_pool(m.conv1(x), 2), x))
        x = taps("pool2", self.part(lambda m, x: blocks.max_pool(m.conv2(x), 2), x))
        act = _ACTIVATIONS[self.config.activation]
        x = taps("fc1", self.part(lambda m, x: act(m.fc1(blocks.flatten(x))), x))
        return self.fc2(x)


class LeNet5(blocks.Model):
    """The modern LeNet-5: C3 is dense, C5 a convolution, so that larger images work too.

    Positions that are left after C5 are averaged (one position at 32x32).
    """

    min_size = 32

    def __init__(self, config: LeNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = config.dtype
        options: Any = {"pad": 0, "use_bias": True, "dtype": dtype, "rngs": rngs}
        init = blocks.init.uniform_fan_in(1.0)
        self.conv1 = blocks.conv(config.in_channels, 6, 5, kernel_init=init, **options)
        self.conv2 = blocks.conv(6, 16, 5, kernel_init=init, **options)
        self.conv3 = blocks.conv(16, 120, 5, kernel_init=init, **options)
        self.fc1 = blocks.linear(120, 84, dtype=dtype, rngs=rngs)
        self.fc2 = blocks.linear(84, config.num_classes, dtype=dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        act = _ACTIVATIONS[self.config.activation]
        pool = blocks.avg_pool if self.config.pool == "avg" else blocks.max_pool
        x = taps("pool1", self.part(lambda m, x: pool(act(m.conv1(x)), 2), x))
        x = taps("pool2", self.part(lambda m, x: pool(act(m.conv2(x)), 2), x))
        x = taps("conv3", self.part(lambda m, x: act(m.conv3(x)), x))
        x = taps("fc1", self.part(lambda m, x: act(m.fc1(blocks.global_avg_pool(x))), x))
        return self.fc2(x)


register("lenet_300_100", LeNet300100, LeNetConfig(), input_shape=(28, 28, 1))
register("lenet_5_caffe", LeNet5Caffe, LeNetConfig(), input_shape=(28, 28, 1))
register(
    "lenet_5",
    LeNet5,
    LeNetConfig(image_size=32, activation="tanh", pool="avg"),
    input_shape=(32, 32, 1),
)
