"""Convolutions, max pooling and channel shuffle as each platform runs them fastest."""

from __future__ import annotations

from cnnjax.ops.choice import choose
from cnnjax.ops.conv import (
    conv,
    conv_general_dilated,
    depthwise,
    grouped,
    pointwise,
)
from cnnjax.ops.geometry import ConvCase, ConvSpec, ShuffleCase
from cnnjax.ops.layers import Conv
from cnnjax.ops.norm import BatchNorm
from cnnjax.ops.pooling import max_pool, maxout
from cnnjax.ops.primitives import FORWARD_PRIMITIVES, recognise
from cnnjax.ops.shuffle import channel_shuffle
from cnnjax.ops.table import FormTable, use_table
from cnnjax.ops.tuning import chosen_parts, tune

__all__ = [
    "FORWARD_PRIMITIVES",
    "BatchNorm",
    "Conv",
    "ConvCase",
    "ConvSpec",
    "FormTable",
    "ShuffleCase",
    "channel_shuffle",
    "choose",
    "chosen_parts",
    "conv",
    "conv_general_dilated",
    "depthwise",
    "grouped",
    "max_pool",
    "maxout",
    "pointwise",
    "recognise",
    "tune",
    "use_table",
]
