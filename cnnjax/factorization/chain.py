"""Chains: the ordered small convolutions that replace one convolution.

A factorization yields plain factor arrays; the constructors here arrange them as convolutions with
stride, padding and dilation where the result stays exact and the cost is least:

=============================  ==========================  ==============================
chain                          spatial stage(s)            1x1 stages
=============================  ==========================  ==============================
k x k -> 1x1                   all stride, pad, dilation   stride 1
1x1 -> k x k -> 1x1            all stride, pad, dilation   stride 1
kh x 1 -> 1 x kw               one axis each               -
1x1 -> kh x 1 -> 1 x kw -> 1x1 one axis each               stride 1
=============================  ==========================  ==============================

The bias belongs to the last convolution. Grouped convolutions are factorized group by group: all
kernels are group-major along their outputs, as XLA wants them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from cnnjax.typing import AnyArray

Padding = str | tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """Static geometry of a 2-D convolution.

    Attributes:
      strides: (vertical, horizontal).
      padding: ``"SAME"``, ``"VALID"`` or explicit ((top, bottom), (left, right)).
      dilation: kernel dilation (vertical, horizontal).
      groups: feature_group_count.
    """

    strides: tuple[int, int] = (1, 1)
    padding: Padding = "SAME"
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def pointwise(self) -> ConvSpec:
        """The geometry of the 1x1 stages beside the spatial one."""
        return ConvSpec(padding="VALID", groups=self.groups)

    def vertical(self, groups: int | None = None) -> ConvSpec:
        """The ``kh x 1`` half: stride, padding and dilation of the vertical axis only."""
        padding = self.padding
        if not isinstance(padding, str):
            padding = (padding[0], (0, 0))
        groups = self.groups if groups is None else groups
        return ConvSpec((self.strides[0], 1), padding, (self.dilation[0], 1), groups)

    def horizontal(self, groups: int | None = None) -> ConvSpec:
        """The ``1 x kw`` half."""
        padding = self.padding
        if not isinstance(padding, str):
            padding = ((0, 0), padding[1])
        groups = self.groups if groups is None else groups
        return ConvSpec((1, self.strides[1]), padding, (1, self.dilation[1]), groups)

    def with_groups(self, groups: int) -> ConvSpec:
        """The same geometry with another group count."""
        return dataclasses.replace(self, groups=groups)


def convolve(
    x: Float[AnyArray, "n h w i"], kernel: Float[AnyArray, "kh kw ig o"], spec: ConvSpec
) -> Float[Array, "n h2 w2 o"]:
    """The convolution that ``spec`` and ``kernel`` describe, at the highest precision."""
    return lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel),
        spec.strides,
        spec.padding,
        rhs_dilation=spec.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=spec.groups,
        precision=lax.Precision.HIGHEST,
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernels", "bias", "orders"),
    meta_fields=("specs",),
)
@dataclasses.dataclass(frozen=True)
class Chain:
    """Kernels (HWIO) to apply one after the other, then the bias.

    Attributes:
      kernels: one array per stage.
      specs: their geometry (static).
      bias: (o,) or None.
      orders: () or one entry per stage and one for the end: None, or the channel indices (int) in
        which the stage reads what stands before it (the end: in which the result, bias included,
        is handed on).
    """

    kernels: tuple[Any, ...]
    specs: tuple[ConvSpec, ...]
    bias: Any = None
    orders: tuple[Any, ...] = ()

    @property
    def params(self) -> int:
        """Number of parameters, bias included."""
        total = sum(int(np.prod(k.shape)) for k in self.kernels)
        return total + (0 if self.bias is None else int(np.prod(self.bias.shape)))

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one image of ``height`` x ``width``."""
        stages = [(k.shape, spec) for k, spec in zip(self.kernels, self.specs)]
        return stages_cost(stages, (height, width))[1]


def output_size(kernel: Sequence[int], spec: ConvSpec, size: tuple[int, int]) -> tuple[int, int]:
    """Spatial output size of a convolution.

    Args:
      kernel: (kh, kw).
      spec: geometry.
      size: input (height, width).
    """
    out = []
    for axis in (0, 1):
        reach = (kernel[axis] - 1) * spec.dilation[axis] + 1
        stride, n = spec.strides[axis], size[axis]
        if spec.padding == "SAME":
            out.append(-(-n // stride))
            continue
        low, high = (0, 0) if isinstance(spec.padding, str) else spec.padding[axis]
        out.append((n + low + high - reach) // stride + 1)
    return out[0], out[1]


def conv_cost(
    kernel_shape: Sequence[int], spec: ConvSpec, size: tuple[int, int], *, bias: bool = False
) -> tuple[int, int]:
    """(parameters, MACs) of a convolution for one image.

    Args:
      kernel_shape: (kh, kw, i/groups, o).
      spec: geometry.
      size: input (height, width).
      bias: whether the o biases count as parameters.
    """
    height, width = output_size(kernel_shape[:2], spec, size)
    weights = int(np.prod(kernel_shape))
    return weights + (kernel_shape[-1] if bias else 0), height * width * weights


def stages_cost(
    stages: Sequence[tuple[Sequence[int], ConvSpec]], size: tuple[int, int]
) -> tuple[int, int]:
    """(weights, MACs) of convolutions run one after the other on an image of ``size``."""
    weights = macs = 0
    for shape, spec in stages:
        stage_weights, stage_macs = conv_cost(shape, spec, size)
        size = output_size(shape[:2], spec, size)
        weights, macs = weights + stage_weights, macs + stage_macs
    return weights, macs


@jax.jit
def chain_apply(chain: Chain, x: Float[AnyArray, "n h w i"]) -> Float[Array, "n h2 w2 o"]:
    """Runs the chain's convolutions, then adds its bias."""
    y = jnp.asarray(x)
    orders = chain.orders or (None,) * (len(chain.kernels) + 1)
    for kernel, spec, order in zip(chain.kernels, chain.specs, orders):
        y = convolve(y if order is None else y[..., order], kernel, spec)
    y = y if chain.bias is None else y + chain.bias
    return y if orders[-1] is None else y[..., orders[-1]]


def split_groups(kernel: Float[AnyArray, "kh kw ig o"], groups: int) -> Float[Array, ...]:
    """(g, kh, kw, i/g, o/g): one block per group, ready for ``jax.vmap``."""
    kh, kw, i, o = kernel.shape
    if o % groups:
        raise ValueError(f"{o} outputs do not divide into {groups} groups")
    blocks = jnp.asarray(kernel).reshape(kh, kw, i, groups, o // groups)
    return jnp.moveaxis(blocks, 3, 0)


def join_groups(blocks: Float[AnyArray, g * shape]) -> Float[Array, ...]:
    """The inverse of `split_groups` for arrays whose last axis is the output: group-major."""
    moved = jnp.moveaxis(jnp.asarray(blocks), 0, -2)
    return moved.reshape(*moved.shape[:-2], -1)


def basis_chain(
    spatial: Float[AnyArray, "kh kw ig r"],
    mix: Float[AnyArray, "one one2 rg o"],
    spec: ConvSpec,
    bias: Float[AnyArray, "o"] | None = None,
) -> Chain:
    """k x k then 1x1."""
    return _chain([spatial, mix], [spec, spec.pointwise()], bias)


def dual_basis_chain(
    mix: Float[AnyArray, "one one2 ig r"],
    spatial: Float[AnyArray, "kh kw rg o"],
    spec: ConvSpec,
    bias: Float[AnyArray, "o"] | None = None,
) -> Chain:
    """1x1 then k x k."""
    return _chain([mix, spatial], [spec.pointwise(), spec], bias)


def spatial_chain(
    vertical: Float[AnyArray, "kh one ig r"],
    horizontal: Float[AnyArray, "one kw rg o"],
    spec: ConvSpec,
    bias: Float[AnyArray, "o"] | None = None,
) -> Chain:
    """kh x 1 then 1 x kw."""
    return _chain([vertical, horizontal], [spec.vertical(), spec.horizontal()], bias)


def spatial_mix_chain(
    vertical: Float[AnyArray, "kh one ig r"],
    horizontal: Float[AnyArray, "one kw rg r2"],
    mix: Float[AnyArray, "one one2 r2g o"],
    spec: ConvSpec,
    bias: Float[AnyArray, "o"] | None = None,
) -> Chain:
    """kh x 1, 1 x kw, then 1x1 (asymmetric 3-D)."""
    specs = [spec.vertical(), spec.horizontal(), spec.pointwise()]
    return _chain([vertical, horizontal, mix], specs, bias)


def tucker2_chain(
    first: Float[AnyArray, "one one2 ig r3"],
    core: Float[AnyArray, "kh kw r3g r4"],
    last: Float[AnyArray, "one one2 r4g o"],
    spec: ConvSpec,
    bias: Float[AnyArray, "o"] | None = None,
) -> Chain:
    """1x1, k x k, 1x1."""
    return _chain([first, core, last], [spec.pointwise(), spec, spec.pointwise()], bias)


def cp4_chain(
    factors: Sequence[Float[AnyArray, "_ _"]],
    spec: ConvSpec,
    bias: Float[AnyArray, "o"] | None = None,
) -> Chain:
    """1x1, depthwise kh x 1, depthwise 1 x kw, 1x1 out of (Fh, Fw, Fi, Fo), each (mode, R)."""
    fh, fw, fi, fo = (jnp.asarray(f) for f in factors)
    rank = fh.shape[1]
    kernels = [fi[None, None], fh[:, None, None], fw[None, :, None], fo.T[None, None]]
    one = spec.with_groups(1).pointwise()
    return _chain(kernels, [one, spec.vertical(rank), spec.horizontal(rank), one], bias)


def cp3_chain(
    factors: Sequence[Float[AnyArray, "_ _"]],
    kernel_size: tuple[int, int],
    spec: ConvSpec,
    bias: Float[AnyArray, "o"] | None = None,
) -> Chain:
    """1x1, depthwise kh x kw, 1x1 out of (Fspatial, Fi, Fo); Fspatial is (kh*kw, R)."""
    fs, fi, fo = (jnp.asarray(f) for f in factors)
    rank = fs.shape[1]
    kernels = [fi[None, None], fs.reshape(*kernel_size, 1, rank), fo.T[None, None]]
    one = spec.with_groups(1).pointwise()
    return _chain(kernels, [one, spec.with_groups(rank), one], bias)


def scheme1_chain(
    vertical: Float[AnyArray, "kh i m"],
    horizontal: Float[AnyArray, "kw i m"],
    mix: Float[AnyArray, "i m o"],
    spec: ConvSpec,
    bias: Float[AnyArray, "o"] | None = None,
) -> Chain:
    """Depthwise kh x 1 (multiplier m), depthwise 1 x kw, 1x1: a separable basis per input."""
    v, h, c = jnp.asarray(vertical), jnp.asarray(horizontal), jnp.asarray(mix)
    kh, i, m = v.shape
    kernels = [
        v.reshape(kh, 1, 1, i * m),
        h.reshape(1, h.shape[0], 1, i * m),
        c.reshape(1, 1, i * m, -1),
    ]
    specs = [spec.vertical(i), spec.horizontal(i * m), spec.with_groups(1).pointwise()]
    return _chain(kernels, specs, bias)


def _chain(kernels: Sequence[AnyArray], specs: Sequence[ConvSpec], bias: AnyArray | None) -> Chain:
    return Chain(
        tuple(jnp.asarray(k) for k in kernels),
        tuple(specs),
        None if bias is None else jnp.asarray(bias),
    )
