"""Inception-v3 and -v4.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception architecture for computer
vision", CVPR 2016, 1512.00567 (as released: slim, Keras and torchvision agree on this graph).
Szegedy, Ioffe, Vanhoucke, Alemi, "Inception-v4, Inception-ResNet and the impact of residual
connections on learning", AAAI 2017, 1602.07261 (slim's order of the (1x7, 7x1) pairs).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from cnnjax.models.inception_blocks import (
    AuxHead,
    InceptionConfig,
    InceptionModel,
    Table,
    unit_of,
)
from cnnjax.models.registry import check_choice, register

V3_STEM: Table = (
    ("conv_1a", "3x3/2 V 32"),
    ("conv_2a", "3x3 V 32"),
    ("conv_2b", "3x3 64"),
    ("pool_3a", "max3/2 V"),
    ("conv_3b", "1x1 80"),
    ("conv_4a", "3x3 V 192"),
)
V4_STEM: Table = (
    ("conv_1a", "3x3/2 V 32"),
    ("conv_2a", "3x3 V 32"),
    ("conv_2b", "3x3 64"),
    ("mixed_3a", ("max3/2 V", "3x3/2 V 96")),
    ("mixed_4a", ("1x1 64 -> 3x3 V 96", "1x1 64 -> 1x7 64 -> 7x1 64 -> 3x3 V 96")),
    ("mixed_5a", ("3x3/2 V 192", "max3/2 V")),
)


def aux_on(name: str, config: InceptionConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """The family's auxiliary head on the layer ``name``."""
    unit = unit_of(config)
    return {name: lambda channels: AuxHead(channels, config, unit, rngs=rngs)}


def _a(pool: int) -> tuple[str, ...]:
    return (
        "1x1 64",
        "1x1 48 -> 5x5 64",
        "1x1 64 -> 3x3 96 -> 3x3 96",
        f"avg3 -> 1x1 {pool}",
    )


def _c(c: int) -> tuple[str, ...]:
    return (
        "1x1 192",
        f"1x1 {c} -> 1x7 {c} -> 7x1 192",
        f"1x1 {c} -> 7x1 {c} -> 1x7 {c} -> 7x1 {c} -> 1x7 192",
        "avg3 -> 1x1 192",
    )


def _e(pool: str) -> tuple[str, ...]:
    return (
        "1x1 320",
        "1x1 384 -> {1x3 384, 3x1 384}",
        "1x1 448 -> 3x3 384 -> {1x3 384, 3x1 384}",
        f"{pool}3 -> 1x1 192",
    )


_V3: Table = (
    *V3_STEM,
    ("pool_5a", "max3/2 V"),
    ("mixed_5b", _a(32)),
    ("mixed_5c", _a(64)),
    ("mixed_5d", _a(64)),
    ("mixed_6a", ("3x3/2 V 384", "1x1 64 -> 3x3 96 -> 3x3/2 V 96", "max3/2 V")),
    ("mixed_6b", _c(128)),
    ("mixed_6c", _c(160)),
    ("mixed_6d", _c(160)),
    ("mixed_6e", _c(192)),
    (
        "mixed_7a",
        (
            "1x1 192 -> 3x3/2 V 320",
            "1x1 192 -> 1x7 192 -> 7x1 192 -> 3x3/2 V 192",
            "max3/2 V",
        ),
    ),
    ("mixed_7b", _e("avg")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionV3Config(InceptionConfig):
    """Inception-v3.

    Attributes:
      last_pool: of the last module, ``"avg"``, or ``"max"`` as in the graph of 2015.
    """

    last_pool: str = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "last_pool", ("avg", "max"))


class InceptionV3(InceptionModel):
    """Features ``conv_1a`` ... ``mixed_7c``, ``pool``; the auxiliary head is on ``mixed_6e``."""

    min_size = 75

    def __init__(self, config: InceptionV3Config, *, rngs: nnx.Rngs):
        table = (*_V3, ("mixed_7c", _e(config.last_pool)))
        self._build(config, table, aux=aux_on("mixed_6e", config, rngs), rngs=rngs)


def reduction_a(k: int, l: int, m: int, n: int) -> tuple[str, ...]:  # noqa: E741
    """Reduction-A of v4 and both Inception-ResNets (the paper's letters)."""
    return (f"3x3/2 V {n}", f"1x1 {k} -> 3x3 {l} -> 3x3/2 V {m}", "max3/2 V")


_V4_A = ("1x1 96", "1x1 64 -> 3x3 96", "1x1 64 -> 3x3 96 -> 3x3 96", "avg3 -> 1x1 96")
_V4_B = (
    "1x1 384",
    "1x1 192 -> 1x7 224 -> 7x1 256",
    "1x1 192 -> 7x1 192 -> 1x7 224 -> 7x1 224 -> 1x7 256",
    "avg3 -> 1x1 128",
)
_V4_C = (
    "1x1 256",
    "1x1 384 -> {1x3 256, 3x1 256}",
    "1x1 384 -> 3x1 448 -> 1x3 512 -> {1x3 256, 3x1 256}",
    "avg3 -> 1x1 256",
)
_V4_REDUCTION_B = (
    "1x1 192 -> 3x3/2 V 192",
    "1x1 256 -> 1x7 256 -> 7x1 320 -> 3x3/2 V 320",
    "max3/2 V",
)


def _v4_table(blocks: tuple[int, int, int]) -> Table:
    a, b, c = blocks
    return (
        *V4_STEM,
        *[(f"inception_a{i}", _V4_A) for i in range(a)],
        ("reduction_a", reduction_a(192, 224, 256, 384)),
        *[(f"inception_b{i}", _V4_B) for i in range(b)],
        ("reduction_b", _V4_REDUCTION_B),
        *[(f"inception_c{i}", _V4_C) for i in range(c)],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionV4Config(InceptionConfig):
    """Inception-v4.

    Attributes:
      blocks: numbers of Inception-A, -B and -C modules.
    """

    blocks: tuple[int, int, int] = (4, 7, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.blocks) != 3 or min(self.blocks) < 1:
            raise ValueError(f"blocks must be three numbers >= 1, got {self.blocks!r}")


class InceptionV4(InceptionModel):
    """Features ``conv_1a`` ... ``mixed_5a``, ``inception_a0`` ..., ``reduction_b``, ..., ``pool``.

    The auxiliary head (slim's) is on the last Inception-B.
    """

    min_size = 75

    def __init__(self, config: InceptionV4Config, *, rngs: nnx.Rngs):
        last = f"inception_b{config.blocks[1] - 1}"
        table = _v4_table(config.blocks)
        self._build(config, table, aux=aux_on(last, config, rngs), rngs=rngs)


register("inception_v3", InceptionV3, InceptionV3Config(), input_shape=(299, 299, 3))
register("inception_v4", InceptionV4, InceptionV4Config(), input_shape=(299, 299, 3))
