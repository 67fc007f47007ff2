"""Inception-v2 (BN-Inception).

Ioffe, Szegedy, "Batch normalization: accelerating deep network training by reducing internal
covariate shift", ICML 2015, 1502.03167.

The paper prints projections of 128 channels in 4c and 4d but a depth of 576, which needs 96;
``proj_width`` chooses (576 or 608 channels). Padding is TensorFlow's SAME everywhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.inception_blocks import (
    Builder,
    InceptionConfig,
    InceptionModel,
    Steps,
    unit_of,
)
from cnnjax.models.registry import check_choice, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionV2Config(InceptionConfig):
    """Inception-v2 variants.

    Attributes:
      proj_width: pool projection of 4c and 4d: 96 (slim) or 128 (the Caffe port).
      stem: ``"full"`` 7x7/2, or ``"separable"`` (slim: depthwise 7x7/2 with multiplier 8, then 1x1,
        batch norm after the latter only).
      use_bias: convolutions have a bias as well (the Caffe port).
    """

    proj_width: int = 96
    stem: str = "full"
    use_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "proj_width", (96, 128))
        check_choice(self, "stem", ("full", "separable"))
        if self.aux_heads:
            raise ValueError("inception_v2 has no auxiliary heads here: aux_heads must be False")


def _module(a: int, b_in: int, b: int, c_in: int, c: int, pool: str, d: int) -> tuple[str, ...]:
    return (
        f"1x1 {a}",
        f"1x1 {b_in} -> 3x3 {b}",
        f"1x1 {c_in} -> 3x3 {c} -> 3x3 {c}",
        f"{pool}3 -> 1x1 {d}",
    )


def _reduction(b_in: int, b: int, c_in: int, c: int) -> tuple[str, ...]:
    return (
        f"1x1 {b_in} -> 3x3/2 S {b}",
        f"1x1 {c_in} -> 3x3 {c} -> 3x3/2 S {c}",
        "max3/2 S",
    )


class InceptionV2(InceptionModel):
    """Features ``conv1`` ... ``pool2``, ``mixed_3a`` ... ``mixed_5b``, ``pool``."""

    def __init__(self, config: InceptionV2Config, *, rngs: nnx.Rngs):
        plain = unit_of(config)

        def unit(*args: Any, **options: Any) -> nnx.Module:
            return plain(*args, use_bias=config.use_bias, **options)

        def separable(builder: Builder) -> nnx.Module:
            channels = config.in_channels
            depthwise = blocks.conv(
                channels,
                8 * channels,
                7,
                2,
                groups=channels,
                pad="SAME",
                dtype=config.dtype,
                rngs=rngs,
            )
            builder.channels = 64
            return Steps([depthwise, unit(8 * channels, 64, 1, rngs=rngs)])

        p = config.proj_width
        table: list[tuple[str, Any]] = [
            ("conv1", separable if config.stem == "separable" else "7x7/2 S 64"),
            ("pool1", "max3/2 S"),
            ("conv2", "1x1 64"),
            ("conv3", "3x3 192"),
            ("pool2", "max3/2 S"),
            ("mixed_3a", _module(64, 64, 64, 64, 96, "avg", 32)),
            ("mixed_3b", _module(64, 64, 96, 64, 96, "avg", 64)),
            ("mixed_3c", _reduction(128, 160, 64, 96)),
            ("mixed_4a", _module(224, 64, 96, 96, 128, "avg", 128)),
            ("mixed_4b", _module(192, 96, 128, 96, 128, "avg", 128)),
            ("mixed_4c", _module(160, 128, 160, 128, 160, "avg", p)),
            ("mixed_4d", _module(96, 128, 192, 160, 192, "avg", p)),
            ("mixed_4e", _reduction(128, 192, 192, 256)),
            ("mixed_5a", _module(352, 192, 320, 160, 224, "avg", 128)),
            ("mixed_5b", _module(352, 192, 320, 192, 224, "max", 128)),
        ]
        self._build(config, table, unit=unit, rngs=rngs)


register("inception_v2", InceptionV2, InceptionV2Config(), input_shape=(224, 224, 3))
register(
    "inception_v2_slim",
    InceptionV2,
    InceptionV2Config(stem="separable"),
    input_shape=(224, 224, 3),
)
register(
    "inception_v2_caffe",
    InceptionV2,
    InceptionV2Config(proj_width=128, use_bias=True),
    input_shape=(224, 224, 3),
)
