"""Network in Network, CiC and MPNIN.

* NiN: Lin, Chen, Yan, "Network in network", ICLR 2014, 1312.4400.
* CiC: Pang, Sun, Jiang, Li, "Convolution in convolution for network in network", IEEE TNNLS 29(5),
  2018, 1603.06759.
* MPNIN: Han, Dai, "Batch-normalized mlpconv-wise supervised pre-training network in network",
  Applied Intelligence 48(1), 2018. Its procedure is in `cnnjax.models.mpnin`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import (
    ModelConfig,
    check_choice,
    check_positive,
    check_rate,
    register,
)

# per block: kernel, stride, pad, the three widths (None: the classes), pooling after it
_LAYOUTS: dict[str, tuple[tuple[int, int, int, tuple[int | None, ...], str | None], ...]] = {
    "cifar": (
        (5, 1, 2, (192, 160, 96), "max"),
        (5, 1, 2, (192, 192, 192), "avg"),
        (3, 1, 1, (192, 192, None), None),
    ),
    "imagenet": (
        (11, 4, 0, (96, 96, 96), "max"),
        (5, 1, 2, (256, 256, 256), "max"),
        (3, 1, 1, (384, 384, 384), "max"),
        (3, 1, 1, (1024, 1024, None), None),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NiNConfig(ModelConfig):
    """NiN variants.

    Attributes:
      layout: ``"cifar"`` (3 blocks) or ``"imagenet"`` (4 blocks, the Caffe model zoo's).
      batch_norm: after every convolution, before its ReLU (MPNIN).
      dropout: drop rate after the pools (CIFAR: both, ImageNet: the last).
      window: CiC: channels that each output of a sparse 1x1 layer sees; None for dense layers.
      window_size: CiC: spatial size k of the sparse layers; 1 is CiC-1D.
      head: ``"maps"`` (one map a class, averaged) or ``"dense"`` (the last 1x1 layer keeps its
        width; average, dense layer), as in the batch-normalised version beside Wide ResNet.
      sparse: CiC: which of a block's two 1x1 layers are sparse. At least one should stay dense, to
        mix all windows.
    """

    num_classes: int = 10
    layout: str = "cifar"
    batch_norm: bool = False
    dropout: float = 0.5
    window: int | None = None
    window_size: int = 1
    head: str = "maps"
    sparse: tuple[bool, bool] = (True, False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "layout", tuple(_LAYOUTS))
        check_choice(self, "head", ("maps", "dense"))
        check_rate(self, "dropout")
        check_positive(self, "window_size")
        if self.window is not None:
            check_positive(self, "window")
        if self.window_size % 2 == 0:
            raise ValueError(f"window_size must be odd, got {self.window_size}")
        if len(self.sparse) != 2:
            raise ValueError(f"sparse must be two booleans, got {self.sparse!r}")


def window_starts(in_features: int, features: int, window: int) -> tuple[int, ...]:
    """First input channel of each output's window, evenly spread: round(o (C - K) / (C_out - 1)).

    With ``features == in_features - window + 1`` the windows slide by one.

    Raises:
      ValueError: if the window is wider than the input.
    """
    if window > in_features:
        raise ValueError(f"window {window} is wider than the {in_features} input channels")
    if features == 1:
        return (0,)
    span = in_features - window
    # round half up, in integers
    return tuple((2 * o * span + features - 1) // (2 * (features - 1)) for o in range(features))


class WindowConv(nnx.Module):
    """CiC's sparse layer: output o sees ``window`` neighbouring channels, through its own weights.

    y[h, w, o] = b[o] + sum over j < K and the k x k taps (u, v) of
    W[u, v, j, o] * x[h + u, w + v, s(o) + j]. The windows are gathered, and a convolution with one
    group for each output contracts them: K k^2 C_out weights and multiply-adds, no masked ones.

    Args:
      in_features, features: channels before and after.
      window: K.
      size: k, odd; the size of the map is kept.
      rngs: stream ``params``.
      dtype: of the computation.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        window: int,
        size: int = 1,
        *,
        rngs: nnx.Rngs,
        dtype: str | None = None,
    ):
        self.starts = window_starts(in_features, features, window)
        self.window = window
        self.conv = blocks.conv(
            features * window,
            features,
            size,
            groups=features,
            use_bias=True,
            dtype=dtype,
            kernel_init=blocks.init.he_normal("in"),
            rngs=rngs,
        )

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H, W, out)."""
        channels = [s + j for s in self.starts for j in range(self.window)]
        windows = jnp.take(x, np.asarray(channels), axis=-1, mode="clip")
        return self.conv(windows)


class NiNUnit(nnx.Module):
    """Convolution (dense or windowed) with bias, batch norm if asked for, ReLU."""

    def __init__(self, conv: nnx.Module, norm: Any = None):
        self.conv = conv
        self.bn = nnx.data(None) if norm is None else norm

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', out)."""
        x = self.conv(x)
        return jax.nn.relu(x if self.bn is None else self.bn(x))


class MlpConv(nnx.Module):
    """A k x k convolution and two 1x1 convolutions, each with its activation."""

    def __init__(self, units: Any):
        self.units = nnx.List(units)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', out)."""
        for unit in self.units:
            x = unit(x)
        return x


def pooled(x: Any, kind: str | None) -> Any:
    """3x3/2 pooling with the output size rounded up; averages leave the overhang out."""
    if kind == "max":
        return blocks.max_pool(x, 3, 2, ceil=True)
    if kind == "avg":
        return blocks.avg_pool(x, 3, 2, ceil=True, count_include_pad=False)
    return x


class NiN(blocks.Model):
    """mlpconv blocks, the last with one map a class (or a dense layer behind); global average pool.

    Features ``block1`` ... (before each pool) and ``maps`` (the class maps).
    """

    def __init__(self, config: NiNConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.min_size = 4 if config.layout == "cifar" else 67
        options: Any = {"dtype": config.dtype, "rngs": rngs}
        init = blocks.init.he_normal("in")
        channels = config.in_channels
        layout = _LAYOUTS[config.layout]
        self.pools = tuple(pool for *_, pool in layout)
        mlps = []
        for kernel, stride, pad, widths, _ in layout:
            units = []
            for i, width in enumerate(widths):
                if width is None:
                    width = channels if config.head == "dense" else config.num_classes
                if i and config.window is not None and config.sparse[i - 1]:
                    conv: Any = WindowConv(
                        channels, width, config.window, config.window_size, **options
                    )
                else:
                    conv = blocks.conv(
                        channels,
                        width,
                        1 if i else kernel,
                        1 if i else stride,
                        pad=0 if i else pad,
                        use_bias=True,
                        kernel_init=init,
                        **options,
                    )
                norm = blocks.batch_norm(width, **options) if config.batch_norm else None
                units.append(NiNUnit(conv, norm))
                channels = width
            mlps.append(MlpConv(units))
        self.mlps = nnx.List(mlps)
        self.fc = nnx.data(None)
        if config.head == "dense":
            self.fc = blocks.linear(channels, config.num_classes, **options)
        after = range(len(layout) - 1) if config.layout == "cifar" else [len(layout) - 2]
        self.drops = nnx.List(
            nnx.Dropout(config.dropout if i in after else 0.0, rngs=rngs)
            for i in range(len(layout))
        )

    def step(self, i: int, x: Any) -> Any:
        """Block ``i`` with the pool and drop-out after it."""
        return self.drops[i](pooled(self.mlps[i](x), self.pools[i]))

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        for i, (mlp, pool, drop) in enumerate(zip(self.mlps, self.pools, self.drops)):
            x = taps(f"block{i + 1}", blocks.run(mlp, x, remat=self.config.remat))
            x = drop(pooled(x, pool))
        x = blocks.global_avg_pool(taps("maps", x))
        return x if self.fc is None else self.fc(x)


_CIFAR = (32, 32, 3)
register("nin_cifar", NiN, NiNConfig(), input_shape=_CIFAR)
register(
    "nin_imagenet",
    NiN,
    NiNConfig(layout="imagenet", num_classes=1000),
    input_shape=(224, 224, 3),
)
register("cic", NiN, NiNConfig(window=5), input_shape=_CIFAR)
register("mpnin", NiN, NiNConfig(batch_norm=True), input_shape=_CIFAR)
