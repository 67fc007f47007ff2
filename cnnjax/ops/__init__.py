"""Convolution forms: depthwise, grouped and 1x1 convolution as each platform runs them fastest."""

from __future__ import annotations

from cnnjax.ops.choice import choose
from cnnjax.ops.conv import (
    channel_shuffle,
    conv,
    conv_general_dilated,
    depthwise,
    grouped,
    pointwise,
)
from cnnjax.ops.geometry import ConvSpec
from cnnjax.ops.layers import Conv
from cnnjax.ops.primitives import FORWARD_PRIMITIVES, recognise

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
