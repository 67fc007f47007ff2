"""Depthwise, grouped and 1x1 convolution and channel shuffle as each platform runs them fastest."""

from __future__ import annotations

from cnnjax.ops.choice import choose
from cnnjax.ops.conv import (
    conv,
    conv_general_dilated,
    depthwise,
    grouped,
    pointwise,
)
from cnnjax.ops.geometry import ConvSpec
from cnnjax.ops.layers import Conv
from cnnjax.ops.primitives import FORWARD_PRIMITIVES, recognise
from cnnjax.ops.shuffle import channel_shuffle

__all__ = [
    "FORWARD_PRIMITIVES",
    "Conv",
    "ConvSpec",
    "channel_shuffle",
    "choose",
    "conv",
    "conv_general_dilated",
    "depthwise",
    "grouped",
    "pointwise",
    "recognise",
]
