"""GoogLeNet (Inception-v1).

Szegedy et al., "Going deeper with convolutions", CVPR 2015, 1409.4842.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.inception_blocks import (
    Builder,
    Chain,
    ConvRelu,
    InceptionConfig,
    InceptionModel,
    unit_of,
)
from cnnjax.models.registry import check_choice, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoogLeNetConfig(InceptionConfig):
    """GoogLeNet variants.

    Attributes:
      norm: ``"bn"`` (batch norm after every convolution) or ``"lrn"`` (the paper: biases, response
        normalisation in the stem).
      kernel5: size of the "5x5" branch; torchvision's has 3.
      pool4: window of the pool after 4e: 3, or 2 (torchvision).
      aux_pool: of the auxiliary heads: ``"stride"`` (5x5 windows, stride 3) or ``"adaptive"``
        (torchvision: 4x4 bins of any map).
    """

    norm: str = "bn"
    kernel5: int = 5
    pool4: int = 3
    aux_pool: str = "stride"
    dropout: float = 0.4
    bn_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "norm", ("bn", "lrn"))
        check_choice(self, "kernel5", (3, 5))
        check_choice(self, "pool4", (2, 3))
        check_choice(self, "aux_pool", ("stride", "adaptive"))


class ResponseNorm(nnx.Module):
    """Local response normalisation as in Caffe: n = 5, alpha = 1e-4 divided by n, k = 1."""

    def __call__(self, x: Any) -> Any:
        """(N, H, W, C) -> same."""
        return blocks.local_response_norm(x, window=5, alpha=1e-4 / 5, beta=0.75, k=1.0)


class GoogLeNetAux(nnx.Module):
    """Average pool to 4x4, 1x1 convolution to 128, dense 1024, ReLU, drop-out .7, dense."""

    def __init__(self, channels: int, config: GoogLeNetConfig, unit: Any, *, rngs: nnx.Rngs):
        self.pool = config.aux_pool
        self.conv = unit(channels, 128, 1, rngs=rngs)
        self.fc1 = blocks.linear(2048, 1024, dtype=config.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.7, rngs=rngs)
        self.fc2 = blocks.linear(1024, config.num_classes, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, C) -> (N, num_classes)."""
        if self.pool == "adaptive":
            x = blocks.adaptive_avg_pool(x, 4)
        elif x.shape[1:3] != (14, 14):
            raise ValueError(
                f"this auxiliary head needs a 14x14 map (224x224 images), got {x.shape[1]}x"
                f'{x.shape[2]}: build with aux_pool="adaptive" for other sizes'
            )
        else:
            x = blocks.avg_pool(x, 5, 3)
        x = jax.nn.relu(self.fc1(blocks.flatten(self.conv(x))))
        return self.fc2(self.dropout(x))


# 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection
_MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def _branches(widths: tuple[int, ...], k: int) -> tuple[Chain, ...]:
    a, b_in, b, c_in, c, d = widths
    return (
        f"1x1 {a}",
        f"1x1 {b_in} -> 3x3 {b}",
        f"1x1 {c_in} -> {k}x{k} {c}",
        f"max3 -> 1x1 {d}",
    )


class GoogLeNet(InceptionModel):
    """22 layers; features ``conv1``, ``pool1``, ... ``inception3a`` ... ``inception5b``, ``pool``.

    Auxiliary heads (weight 0.3 each) sit on 4a and 4d.
    """

    aux_weight = 0.3

    def __init__(self, config: GoogLeNetConfig, *, rngs: nnx.Rngs):
        def plain(*args: Any, **options: Any) -> nnx.Module:
            return ConvRelu(*args, dtype=config.dtype, **options)

        unit = plain if config.norm == "lrn" else unit_of(config)

        def lrn(builder: Builder) -> nnx.Module:
            del builder
            return ResponseNorm()

        norms: Any = [("norm1", lrn)] if config.norm == "lrn" else []
        table: list[tuple[str, Any]] = [
            ("conv1", "7x7/2 p3 64"),
            ("pool1", "max3/2 ceil"),
            *norms,
            ("conv2", "1x1 64"),
            ("conv3", "3x3 192"),
            *[("norm2", f) for _, f in norms],
            ("pool2", "max3/2 ceil"),
        ]
        for name, widths in _MODULES.items():
            if name == "4a":
                table.append(("pool3", "max3/2 ceil"))
            if name == "5a":
                table.append(("pool4", f"max{config.pool4}/2 ceil"))
            table.append((f"inception{name}", _branches(widths, config.kernel5)))

        def aux(channels: int) -> nnx.Module:
            return GoogLeNetAux(channels, config, unit, rngs=rngs)

        heads = {"inception4a": aux, "inception4d": aux}
        self._build(config, table, unit=unit, aux=heads, rngs=rngs)
        # the heads' dense layers read a flattened map: their rows follow its layout
        self.flattened = tuple((f"{name}/fc1", (4, 4, 128)) for _, name in self.aux_names)


_SHAPE = (224, 224, 3)
register(
    "googlenet",
    GoogLeNet,
    GoogLeNetConfig(kernel5=3, pool4=2, aux_pool="adaptive", dropout=0.2),
    input_shape=_SHAPE,
)
register("googlenet_caffe", GoogLeNet, GoogLeNetConfig(norm="lrn"), input_shape=_SHAPE)
register("googlenet_bn", GoogLeNet, GoogLeNetConfig(), input_shape=_SHAPE)
