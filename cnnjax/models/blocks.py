"""Shared blocks: the models' base class, layers with torch-style padding, pools, feature taps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax import ops
from cnnjax.errors import did_you_mean
from cnnjax.models import init
from cnnjax.models.pools import (
    adaptive_avg_pool,
    avg_pool,
    flatten,
    global_avg_pool,
    local_response_norm,
    max_pool,
)

__all__ = [
    "ConvNorm",
    "Model",
    "Taps",
    "adaptive_avg_pool",
    "avg_pool",
    "batch_norm",
    "conv",
    "flatten",
    "global_avg_pool",
    "init",
    "linear",
    "local_response_norm",
    "max_pool",
    "run",
    "run_part",
]

Wanted = bool | str | Sequence[str] | None


class Taps:
    """Collects a network's named intermediate maps during one forward pass.

    ``taps(name, x)`` returns ``x`` and keeps it when it's wanted; `result` joins logits and maps.
    """

    def __init__(self, wanted: Wanted = None):
        self._all = wanted is True
        if wanted is None or isinstance(wanted, bool):
            wanted = ()
        self._wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        self._seen: list[str] = []
        self._maps: dict[str, Any] = {}
        self._plain = not self._all and not self._wanted

    def __call__(self, name: str, x: Any) -> Any:
        self._seen.append(name)
        if self._all or name in self._wanted:
            self._maps[name] = x
        return x

    def wants(self, name: str) -> bool:
        """Whether a map must be computed for its own sake; notes that the name exists."""
        self._seen.append(name)
        return self._all or name in self._wanted

    def result(self, logits: Any) -> Any:
        """Logits alone, or ``(logits, {name: map})`` when features were asked for."""
        for name in self._wanted:
            if name not in self._seen:
                raise ValueError(f"no feature {name!r} here.{did_you_mean(name, self._seen)}")
        return logits if self._plain else (logits, dict(self._maps))


class Model(nnx.Module):
    """Base of every architecture: checks the input, casts, names intermediate maps.

    A subclass sets ``self.config`` and implements ``forward(x, taps)``. ``min_size`` is the
    smallest height and width it accepts; ``exact_size`` is set where a dense layer fixes them.
    """

    config: Any
    provenance: Any = None
    min_size: int = 1
    exact_size: int | None = None

    def forward(self, x: Any, taps: Taps) -> Any:
        """Maps checked NHWC images to logits; implemented by the architecture."""
        raise NotImplementedError

    def __call__(self, x: Any, *, return_features: Wanted = None) -> Any:
        """Logits of a batch of images.

        Args:
          x: images (N, H, W, C), C = ``config.in_channels``.
          return_features: names of intermediate maps (one, several, or True for all).

        Returns:
          logits (N, num_classes), or ``(logits, {name: map})`` with ``return_features``.

        Raises:
          ValueError: wrong rank, channels or size, or unknown feature name.
        """
        self._check(x)
        dtype = self.config.dtype
        taps = Taps(return_features)
        logits = self.forward(x if dtype is None else jnp.asarray(x, dtype), taps)
        return taps.result(logits if dtype is None else logits.astype(jnp.float32))

    def part(self, call: Callable[[Any, Any], Any], x: Any) -> Any:
        """``call(self, x)``, a part of the forward pass that ``config.remat`` recomputes."""
        return run_part(self, call, x, remat=self.config.remat)

    def _check(self, x: Any) -> None:
        what = self.provenance.name if self.provenance is not None else type(self).__name__
        shape = tuple(x.shape)
        if len(shape) != 4:
            raise ValueError(f"{what} takes images (N, H, W, C), got shape {shape}")
        if shape[3] != self.config.in_channels:
            raise ValueError(
                f"{what} was built for {self.config.in_channels} input channels, got {shape[3]} in "
                f"shape {shape}; images are (N, H, W, C), and in_channels= sets the channels"
            )
        if self.exact_size is not None and shape[1:3] != (self.exact_size, self.exact_size):
            raise ValueError(
                f"{what} was built for {self.exact_size}x{self.exact_size} images, got "
                f"{shape[1]}x{shape[2]}; image_size= builds it for another size"
            )
        if min(shape[1:3]) < self.min_size:
            raise ValueError(
                f"{what} needs images of at least {self.min_size}x{self.min_size}, "
                f"got {shape[1]}x{shape[2]}"
            )


def conv(
    in_features: int,
    out_features: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    *,
    rngs: nnx.Rngs,
    pad: int | str | tuple[int, int] | None = None,
    groups: int = 1,
    use_bias: bool = False,
    dtype: str | None = None,
    kernel_init: Any = None,
    bias_init: Any = None,
) -> nnx.Conv:
    """A convolution with torch-style explicit padding.

    Args:
      in_features, out_features: channels.
      kernel: size, square or (h, w).
      stride: of both axes.
      rngs: stream ``params``.
      pad: zeros on each side, one number or (h, w); None keeps the size for odd kernels at
        stride 1; ``"SAME"``/``"VALID"`` as in lax.
      groups: channel groups.
      use_bias: adds a bias.
      dtype: of the computation.
      kernel_init, bias_init: initialisers; He fan-out and zeros unless given.

    Raises:
      ValueError: if the channels don't divide by the groups.
    """
    if in_features % groups or out_features % groups:
        raise ValueError(
            f"{groups} groups don't divide the channels {in_features} -> {out_features}"
        )
    size = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    if pad is None:
        pad = (size[0] // 2, size[1] // 2)
    if not isinstance(pad, str):
        ph, pw = (pad, pad) if isinstance(pad, int) else pad
        padding: Any = ((ph, ph), (pw, pw))
    else:
        padding = pad
    return ops.Conv(
        in_features,
        out_features,
        size,
        stride,
        padding=padding,
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init or init.he_normal("out"),
        bias_init=bias_init or init.constant(0.0),
        rngs=rngs,
    )


def linear(
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    dtype: str | None = None,
    kernel_init: Any = None,
    bias_init: Any = None,
) -> nnx.Linear:
    """A dense layer with bias; uniform fan-in kernel unless another initialiser is given."""
    return nnx.Linear(
        in_features,
        out_features,
        dtype=dtype,
        kernel_init=kernel_init or init.uniform_fan_in(1.0),
        bias_init=bias_init or init.constant(0.0),
        rngs=rngs,
    )


def batch_norm(
    features: int,
    *,
    rngs: nnx.Rngs,
    dtype: str | None = None,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    use_scale: bool = True,
    scale: float = 1.0,
) -> nnx.BatchNorm:
    """Batch normalisation with torch's defaults (its momentum 0.1 is Flax's 0.9)."""
    return ops.BatchNorm(
        features,
        epsilon=epsilon,
        momentum=momentum,
        use_scale=use_scale,
        # E[x^2] - E[x]^2 cancels where activations grow large in deep networks
        use_fast_variance=False,
        dtype=dtype,
        scale_init=init.constant(scale),
        bias_init=init.constant(0.0),
        rngs=rngs,
    )


class ConvNorm(nnx.Module):
    """Convolution, batch normalisation and (unless ``relu=False``) ReLU.

    Options of `conv` (stride, pad, groups, use_bias) and of `batch_norm` (epsilon, momentum,
    use_scale, scale) pass through. The parts are ``conv`` and ``bn``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        *,
        rngs: nnx.Rngs,
        relu: bool = True,
        dtype: str | None = None,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        use_scale: bool = True,
        scale: float = 1.0,
        **options: Any,
    ):
        self.conv = conv(
            in_features, out_features, kernel, stride, rngs=rngs, dtype=dtype, **options
        )
        self.bn = batch_norm(
            out_features,
            rngs=rngs,
            dtype=dtype,
            epsilon=epsilon,
            momentum=momentum,
            use_scale=use_scale,
            scale=scale,
        )
        self.relu = relu

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H', W', out)."""
        x = self.bn(self.conv(x))
        return jax.nn.relu(x) if self.relu else x


def run(module: Any, *args: Any, remat: bool = False) -> Any:
    """``module(*args)``; with ``remat`` its activations are recomputed in the backward pass.

    State that the call changes (batch statistics, random counters) is carried over.
    """
    return run_part(module, lambda inner, *args: inner(*args), *args, remat=remat)


def run_part(module: Any, call: Callable[..., Any], *args: Any, remat: bool = False) -> Any:
    """``call(module, *args)``: `run` for a part of what a module does."""
    if not remat:
        return call(module, *args)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    @jax.checkpoint
    def again(params: Any, rest: Any, *args: Any) -> Any:
        inner = nnx.merge(graphdef, params, rest, copy=True)
        out = call(inner, *args)
        return out, nnx.state(inner, nnx.Not(nnx.Param))

    out, new = again(params, rest, *args)
    nnx.update(module, new)
    return out
