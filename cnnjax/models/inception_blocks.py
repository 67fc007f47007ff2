"""Parts of the Inception family, built from the notation in which the papers' tables are written.

A *chain* is a string of steps joined by ``->``:

* ``"3x3/2 V 384"``: convolution, its normalisation and ReLU; kernel (height x width), ``/`` stride,
  padding, output channels. Padding ``V`` is none, ``S`` TensorFlow's SAME, ``p3`` three zeros on
  each side; without a mark the size is kept (odd kernels, stride 1).
* ``"max3/2 V"``, ``"avg3"``: pooling, same marks, and ``ceil`` for an output size rounded up. An
  average at stride 1 keeps the size.
* ``"{1x3 256, 3x1 256}"``: both on the same input, side by side.

A tuple of chains is a module whose branches are concatenated in that order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_rate

Chain = str
Spec = str | tuple[Chain, ...]
Table = tuple[tuple[str, Spec], ...]

_CONV = re.compile(r"(\d+)x(\d+)(?:/(\d+))?(?: (V|S|p\d+))? (\d+)")
_POOL = re.compile(r"(max|avg)(\d+)(?:/(\d+))?(?: (V|S|p\d+|ceil))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionConfig(ModelConfig):
    """Fields of the whole family.

    Attributes:
      aux_heads: build the auxiliary classifiers; ``model(x, aux=True)`` then gives their logits.
      dropout: drop rate before the classifier.
      count_include_pad: whether averages in the pooling branches count the padding (torchvision
        does; TensorFlow doesn't).
      use_scale: batch norms have a gamma (TensorFlow's slim and Keras have none).
      bn_epsilon, bn_momentum: of the batch norms.
    """

    aux_heads: bool = False
    dropout: float = 0.2
    count_include_pad: bool = False
    use_scale: bool = True
    bn_epsilon: float = 1e-3
    bn_momentum: float = 0.9997

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate(self, "dropout")


class ConvRelu(nnx.Module):
    """Convolution with bias, then ReLU (the networks before batch normalisation)."""

    def __init__(self, *args: Any, **options: Any):
        self.conv = blocks.conv(*args, use_bias=True, **options)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', out)."""
        return jax.nn.relu(self.conv(x))


class Pool(nnx.Module):
    """Max or average pooling; ``pad`` as in the notation above."""

    def __init__(self, kind: str, window: int, stride: int, pad: str, count_include_pad: bool):
        self.kind = kind
        self.window = window
        self.stride = stride
        self.pad = pad
        self.count_include_pad = count_include_pad

    def __call__(self, x: Any) -> Any:
        """(N, H, W, C) -> (N, H', W', C)."""
        if self.pad == "S":
            size, step = (self.window,) * 2, (self.stride,) * 2
            if self.kind == "max":
                return ops.max_pool(x, size, step, padding="SAME")
            return nnx.avg_pool(x, size, step, padding="SAME", count_include_pad=False)
        options: Any = {"ceil": self.pad == "ceil"}
        if self.pad.startswith("p"):
            options["pad"] = int(self.pad[1:])
        if self.kind == "max":
            return blocks.max_pool(x, self.window, self.stride, **options)
        return blocks.avg_pool(
            x, self.window, self.stride, count_include_pad=self.count_include_pad, **options
        )


class Steps(nnx.Module):
    """Layers one after the other."""

    def __init__(self, steps: Sequence[Any]):
        self.steps = nnx.List(steps)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', out)."""
        for step in self.steps:
            x = step(x)
        return x


class Concat(nnx.Module):
    """Branches on the same input, concatenated in order."""

    def __init__(self, branches: Sequence[Any]):
        self.branches = nnx.List(branches)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', sum of the branches' channels)."""
        return jnp.concatenate([branch(x) for branch in self.branches], axis=-1)


class Builder:
    """Makes layers from the notation and keeps count of the channels.

    Args:
      channels: of the input.
      unit: ``unit(in, out, kernel, stride, pad=..., rngs=...)`` makes one convolution.
      count_include_pad: see `InceptionConfig`.
      rngs: stream ``params``.
    """

    def __init__(
        self,
        channels: int,
        unit: Callable[..., nnx.Module],
        *,
        rngs: nnx.Rngs,
        count_include_pad: bool = False,
    ):
        self.channels = channels
        self._unit = unit
        self._rngs = rngs
        self._count = count_include_pad

    def _step(self, text: str, channels: int) -> tuple[Any, int]:
        if text.startswith("{"):
            parts = [self._step(t.strip(), channels) for t in text.strip("{}").split(",")]
            return Concat([p for p, _ in parts]), sum(n for _, n in parts)
        if match := _POOL.fullmatch(text):
            kind, window, stride, pad = match.groups()
            if pad is None:
                pad = f"p{int(window) // 2}"
            return Pool(kind, int(window), int(stride or 1), pad, self._count), channels
        match = _CONV.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is neither a convolution nor a pooling step")
        h, w, stride, mark, features = match.groups()
        pad: Any = {None: None, "V": 0, "S": "SAME"}.get(mark, mark)
        if isinstance(pad, str) and pad.startswith("p"):
            pad = int(pad[1:])
        kernel = (int(h), int(w))
        layer = self._unit(
            channels, int(features), kernel, int(stride or 1), pad=pad, rngs=self._rngs
        )
        return layer, int(features)

    def _chain(self, text: Chain) -> tuple[Any, int]:
        channels, layers = self.channels, []
        for part in re.split(r"\s*->\s*", text):
            layer, channels = self._step(part, channels)
            layers.append(layer)
        return (layers[0] if len(layers) == 1 else Steps(layers)), channels

    def branches(self, chains: tuple[Chain, ...]) -> tuple[Concat, int]:
        """The branches of a module and their channels together; does not move on."""
        built = [self._chain(chain) for chain in chains]
        return Concat([b for b, _ in built]), sum(n for _, n in built)

    def add(self, spec: Spec) -> Any:
        """The layer or module of ``spec`` on the present channels; moves on to its output's."""
        layer, self.channels = self._chain(spec) if isinstance(spec, str) else self.branches(spec)
        return layer


def unit_of(config: InceptionConfig) -> Callable[..., nnx.Module]:
    """The family's convolution + batch norm + ReLU for a configuration."""

    def unit(*args: Any, **options: Any) -> nnx.Module:
        return blocks.ConvNorm(
            *args,
            dtype=config.dtype,
            epsilon=config.bn_epsilon,
            momentum=config.bn_momentum,
            use_scale=config.use_scale,
            **options,
        )

    return unit


class AuxHead(nnx.Module):
    """Average 5x5/3, 1x1 convolution to 128, 5x5 to 768, dense; for grids of 17x17 or larger."""

    def __init__(
        self, channels: int, config: InceptionConfig, unit: Callable[..., Any], *, rngs: nnx.Rngs
    ):
        self.conv1 = unit(channels, 128, 1, rngs=rngs)
        self.conv2 = unit(128, 768, 5, pad=0, rngs=rngs)
        self.fc = blocks.linear(768, config.num_classes, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, C) -> (N, num_classes)."""
        if min(x.shape[1:3]) < 17:
            raise ValueError(
                f"the auxiliary head needs a grid of at least 17x17, got {x.shape[1]}x"
                f"{x.shape[2]}: use larger images (299x299) or aux=False"
            )
        x = self.conv2(self.conv1(blocks.avg_pool(x, 5, 3)))
        return self.fc(blocks.global_avg_pool(x))


class InceptionModel(blocks.Model):
    """Base: named layers from a table, then global average pool, drop-out, dense.

    Features: every name of the table, and ``pool``. A subclass's ``__init__`` calls `_build`.
    """

    config: Any
    aux_weight: float = 0.4  # of each auxiliary loss in training

    def _build(
        self,
        config: Any,
        table: Sequence[tuple[str, Any]],
        *,
        rngs: nnx.Rngs,
        unit: Callable[..., Any] | None = None,
        aux: dict[str, Callable[[int], Any]] | None = None,
    ) -> None:
        """Adds the layers of ``table``.

        Args:
          config: the model's configuration.
          table: (name, spec) or (name, f) with ``f(builder)`` giving the layer.
          rngs: streams ``params``, ``dropout``.
          unit: see `Builder`; the configuration's by default.
          aux: layer name -> ``f(channels)`` making the auxiliary head on its output.
        """
        self.config = config
        builder = Builder(
            config.in_channels,
            unit or unit_of(config),
            count_include_pad=config.count_include_pad,
            rngs=rngs,
        )
        heads = {}
        for name, spec in table:
            layer = spec(builder) if callable(spec) else builder.add(spec)
            setattr(self, name, layer)
            if config.aux_heads and aux and name in aux:
                heads[name] = f"aux{len(heads) + 1}"
                setattr(self, heads[name], aux[name](builder.channels))
        self.layer_names = tuple(name for name, _ in table)
        self.aux_names = tuple(heads.items())
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.fc = blocks.linear(builder.channels, config.num_classes, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Any, *, return_features: blocks.Wanted = None, aux: bool = False) -> Any:
        """Logits of a batch of images.

        Args:
          x: images (N, H, W, C).
          return_features: as in `blocks.Model`.
          aux: also the auxiliary heads' logits (static: their layers run only when asked for).

        Returns:
          logits (N, num_classes), or with ``aux`` the tuple (logits, aux logits, ...); with
          ``return_features`` the pair (that, {name: map}).

        Raises:
          ValueError: as `blocks.Model`; ``aux`` on a model built without auxiliary heads.
        """
        if aux and not self.aux_names:
            raise ValueError("this model was built without auxiliary heads: pass aux_heads=True")
        self._check(x)
        dtype = self.config.dtype
        taps = blocks.Taps(return_features)
        out = self._run(x if dtype is None else jnp.asarray(x, dtype), taps, aux)
        if dtype is not None:
            out = tuple(y.astype(jnp.float32) for y in out)
        return taps.result(out if aux else out[0])

    def _run(self, x: Any, taps: blocks.Taps, aux: bool) -> tuple[Any, ...]:
        heads, out = dict(self.aux_names), []
        for name in self.layer_names:
            x = taps(name, blocks.run(getattr(self, name), x, remat=self.config.remat))
            if aux and name in heads:
                out.append(getattr(self, heads[name])(x))
        x = taps("pool", blocks.global_avg_pool(x))
        return (self.fc(self.dropout(x)), *out)

    def forward(self, x: Any, taps: blocks.Taps) -> Any:
        """(N, H, W, C) -> logits."""
        return self._run(x, taps, False)[0]
