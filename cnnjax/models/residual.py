"""Residual units that several families share: shortcuts, blocks, random depth, repetition."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax.models import blocks


def shortcut_a(
    x: Any, features: int, stride: int, *, zeros: str = "end", pool: bool = False
) -> Any:
    """The parameter-free shortcut: subsample, then append zero channels.

    Args:
      x: (N, H, W, C).
      features: channels of the result, at least C.
      stride: of the subsampling.
      zeros: where the zero channels go: ``"end"`` (the authors) or ``"both"`` sides, half and
        half (some ports; it matters for their weights).
      pool: average each window instead of taking its first value (stochastic depth's form).

    Returns:
      (N, ceil(H / stride), ceil(W / stride), features).
    """
    if stride != 1:
        if pool:
            # an odd size's last window averages what there is
            odd = bool(x.shape[1] % stride or x.shape[2] % stride)
            x = blocks.avg_pool(x, stride, ceil=odd, count_include_pad=not odd)
        else:
            x = x[:, ::stride, ::stride, :]
    if features != x.shape[-1]:
        extra = features - x.shape[-1]
        before = extra // 2 if zeros == "both" else 0
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, extra - before)))
    return x


def last_kernel(layer: Any) -> Any:
    """The kernel whose outputs are the layer's: of the last part where factors replaced it."""
    while isinstance(layer, nnx.Sequential):
        layer = layer.layers[-1]
    return layer.kernel


def gated_branch(block: Any, x: Any, gate: Any) -> Any:
    """``gate * block.branch(x)``, skipped at training where the gate is 0.

    A skipped branch costs no time and leaves its batch statistics alone, as in the original
    stochastic depth. At evaluation the gate is the branch's survival probability.

    Args:
      block: a module with ``branch(x)`` and the property ``training``.
      x: (N, H, W, C).
      gate: scalar, 0 or 1 at training.
    """
    if not block.training:
        y = block.branch(x)
        return jnp.asarray(gate, y.dtype) * y
    graphdef, params, rest = nnx.split(block, nnx.Param, ...)

    def keep(params: Any, rest: Any, x: Any) -> Any:
        inner = nnx.merge(graphdef, params, rest, copy=True)
        y = inner.branch(x)
        return jnp.asarray(gate, y.dtype) * y, nnx.state(inner, nnx.Not(nnx.Param))

    shape = jax.eval_shape(keep, params, rest, x)[0]

    def drop(params: Any, rest: Any, x: Any) -> Any:
        del params, x
        return jnp.zeros(shape.shape, shape.dtype), rest

    y, new = jax.lax.cond(gate > 0, keep, drop, params, rest, x)
    nnx.update(block, new)
    return y


class PostActivation(nnx.Module):
    """Base of ReLU(shortcut(x) + F(x)): identity, projection ("B") or parameter-free ("A").

    ``"A_pool"`` is A with an average pool instead of subsampling.
    """

    bn2: Any

    def _make_shortcut(
        self, in_features: int, features: int, stride: int, kind: str, zeros: str, **options: Any
    ) -> None:
        self.stride = stride
        self.zeros = zeros
        self.kind = kind
        self.project = (stride != 1 or in_features != features) and kind == "B"
        if self.project:
            self.downsample = blocks.ConvNorm(
                in_features, features, 1, stride, relu=False, pad=0, **options
            )

    @property
    def training(self) -> bool:
        """Whether the block's batch statistics are being learned."""
        return not getattr(self.bn2, "use_running_average", True)

    def _last_kernel(self) -> Any:
        raise NotImplementedError

    def branch(self, x: Any) -> Any:
        """F(x)."""
        raise NotImplementedError

    def shortcut(self, x: Any) -> Any:
        """The identity, projection or parameter-free shortcut."""
        if self.project:
            return self.downsample(x)
        # the kernel knows the width also after channels were removed
        features = self._last_kernel().shape[-1]
        return shortcut_a(x, features, self.stride, zeros=self.zeros, pool=self.kind == "A_pool")

    def __call__(self, x: Any, gate: Any = None, extra: Any = None) -> Any:
        """(N, H, W, in) -> (N, H', W', out).

        ``gate`` is as in `gated_branch`; ``extra`` is added before the last ReLU.
        """
        y = self.branch(x) if gate is None else gated_branch(self, x, gate)
        y = self.shortcut(x) + y
        return jax.nn.relu(y if extra is None else y + extra)


class BasicBlock(PostActivation):
    """F = 3x3 conv, BN, ReLU, 3x3 conv, BN.

    Args:
      in_features, features: channels before and after.
      stride: of the first convolution and of the shortcut.
      shortcut: ``"A"``, ``"A_pool"`` or ``"B"``, where the shape changes.
      zeros: where shortcut A puts its zero channels, see `shortcut_a`.
      options: ``use_bias`` of the convolutions, ``epsilon`` of the batch norms.
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
        use_bias: bool = False,
        epsilon: float = 1e-5,
    ):
        options: Any = {"dtype": dtype, "rngs": rngs}
        convs: Any = {"use_bias": use_bias, **options}
        norms: Any = {"epsilon": epsilon, **options}
        self.conv1 = blocks.conv(in_features, features, 3, stride, **convs)
        self.bn1 = blocks.batch_norm(features, **norms)
        self.conv2 = blocks.conv(features, features, 3, **convs)
        self.bn2 = blocks.batch_norm(features, **norms)
        self._make_shortcut(
            in_features, features, stride, shortcut, zeros, epsilon=epsilon, **convs
        )

    def _last_kernel(self) -> Any:
        return last_kernel(self.conv2)

    def branch(self, x: Any) -> Any:
        """F(x)."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(PostActivation):
    """F = 1x1 conv, BN, ReLU, 3x3 conv, BN, ReLU, 1x1 conv, BN.

    Args:
      in_features, middle, features: channels before, inside and after.
      stride: of one convolution and of the shortcut.
      stride_on: ``"3x3"`` (torchvision, "v1.5") or ``"1x1"`` (the paper, the first convolution).
      groups: of the 3x3 convolution (ResNeXt).
    """

    def __init__(
        self,
        in_features: int,
        middle: int,
        features: int,
        stride: int = 1,
        *,
        rngs: nnx.Rngs,
        stride_on: str = "3x3",
        groups: int = 1,
        shortcut: str = "B",
        dtype: str | None = None,
        use_bias: bool = False,
        epsilon: float = 1e-5,
    ):
        options: Any = {"dtype": dtype, "rngs": rngs}
        convs: Any = {"use_bias": use_bias, **options}
        norms: Any = {"epsilon": epsilon, **options}
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1 = blocks.conv(in_features, middle, 1, first, **convs)
        self.bn1 = blocks.batch_norm(middle, **norms)
        self.conv2 = blocks.conv(middle, middle, 3, second, groups=groups, **convs)
        self.bn2 = blocks.batch_norm(middle, **norms)
        self.conv3 = blocks.conv(middle, features, 1, **convs)
        self.bn3 = blocks.batch_norm(features, **norms)
        self._make_shortcut(
            in_features, features, stride, shortcut, "end", epsilon=epsilon, **convs
        )

    def _last_kernel(self) -> Any:
        return last_kernel(self.conv3)

    def branch(self, x: Any) -> Any:
        """F(x)."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        x = jax.nn.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))
