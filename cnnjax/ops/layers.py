"""A convolution layer that runs in the platform's fastest form."""

from __future__ import annotations

from typing import Any

from flax import nnx

from cnnjax.ops.conv import conv_general_dilated


class Conv(nnx.Conv):
    """``nnx.Conv`` (same arguments, attributes, kernel HWIO and numbers) through `cnnjax.ops.conv`.

    Depthwise, grouped and 1x1 kernels, and kernels larger than their map, run in the form chosen
    for the platform; everything else is ``nnx.Conv`` itself. Code that handles ``nnx.Conv`` handles
    it too: it's a subclass that only sets ``conv_general_dilated``.
    """

    def __init__(self, *args: Any, conv_general_dilated: Any = conv_general_dilated, **kw: Any):
        super().__init__(*args, conv_general_dilated=conv_general_dilated, **kw)
