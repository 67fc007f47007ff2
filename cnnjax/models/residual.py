"""Residual units that several families share: shortcuts, basic and bottleneck blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax.models import blocks


def shortcut_a(x: Any, features: int, stride: int, zeros: str = "end") -> Any:
    """The parameter-free shortcut: subsample, then append zero channels.

    Args:
      x: (N, H, W, C).
      features: channels of the result, at least C.
      stride: of the subsampling.
      zeros: where the zero channels go: ``"end"`` (the authors) or ``"both"`` sides, half and
        half (some ports; it matters for their weights).

    Returns:
      (N, ceil(H / stride), ceil(W / stride), features).
    """
    if stride != 1:
        x = x[:, ::stride, ::stride, :]
    if features != x.shape[-1]:
        extra = features - x.shape[-1]
        before = extra // 2 if zeros == "both" else 0
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, extra - before)))
    return x


class BasicBlock(nnx.Module):
    """ReLU(shortcut(x) + F(x)), F = 3x3 conv, BN, ReLU, 3x3 conv, BN.

    Args:
      in_features, features: channels before and after.
      stride: of the first convolution and of the shortcut.
      shortcut: ``"A"`` or ``"B"``, where the shape changes.
      zeros: where shortcut A puts its zero channels, see `shortcut_a`.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int = 1,
        *,
        rngs: nnx.Rngs,
        shortcut: str = "B",
        zeros: str = "end",
        dtype: str | None = None,
    ):
        options: Any = {"dtype": dtype, "rngs": rngs}
        self.conv1 = blocks.conv(in_features, features, 3, stride, **options)
        self.bn1 = blocks.batch_norm(features, **options)
        self.conv2 = blocks.conv(features, features, 3, **options)
        self.bn2 = blocks.batch_norm(features, **options)
        self.stride = stride
        self.zeros = zeros
        changes = stride != 1 or in_features != features
        self.project = changes and shortcut == "B"
        if self.project:
            self.downsample = blocks.ConvNorm(
                in_features, features, 1, stride, relu=False, **options
            )

    def branch(self, x: Any) -> Any:
        """F(x)."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    def shortcut(self, x: Any) -> Any:
        """The identity, projection or parameter-free shortcut."""
        if self.project:
            return self.downsample(x)
        # the last convolution's kernel knows the width also after channels were removed
        return shortcut_a(x, self.conv2.kernel.shape[-1], self.stride, self.zeros)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', out)."""
        return jax.nn.relu(self.shortcut(x) + self.branch(x))
