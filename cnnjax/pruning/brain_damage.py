"""Convolution with columns of its patch matrix left out: group-wise brain damage's speed.

Lebedev & Lempitsky, "Fast ConvNets using group-wise brain damage", CVPR 2016, arXiv 1506.02515;
the same groups are "shape-wise" in Wen et al., arXiv 1608.03665. A group is a column of the im2col
matrix: one position (h, w) of one input channel, read by all filters. What survives is one dense
product with fewer rows (and, if filters are gone too, fewer columns).

    penalty: `penalties.group_lasso(params, {"column": strength})`, or its operator
             `Prox("group_l2", strength, group="column", bias=False)`
    mask:    `mask_from_scores(scores, sparsity, granularity="column", op="l2")`
    speed:   `thin_conv(x, *thin(kernel, mask))`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from cnnjax.typing import AnyArray

Padding = str | Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Support:
    """Which columns of the patch matrix are read, and which filters are made. Static, hashable.

    Attributes:
      window: (kh, kw).
      columns: for each group of the convolution the positions (h, w, c) in row-major order, c
        counted within the group.
      filters: kept output channels, in order; None: all.
      out: output channels of the full kernel; outputs of removed filters are exact zeros.
      channels: input channels of one group.
    """

    window: tuple[int, int]
    columns: tuple[tuple[tuple[int, int, int], ...], ...]
    filters: tuple[int, ...] | None
    out: int
    channels: int

    @property
    def density(self) -> float:
        """MACs of the thin products as a fraction of those of the full kernel."""
        total = len(self.columns) * self.window[0] * self.window[1] * self.channels
        filters = self.out if self.filters is None else len(self.filters)
        return sum(map(len, self.columns)) / total * filters / self.out


def thin(
    kernel: Float[AnyArray, "h w c o"],
    mask: Bool[AnyArray, "h w c o"] | None = None,
    *,
    groups: int = 1,
    drop_filters: bool = False,
) -> tuple[list[Array], Support]:
    """The thin matrices of a masked kernel.

    Args:
      kernel: (h, w, c / groups, o).
      mask: of the kernel's shape; None takes its non-zeros. A column stays if any filter of its
        group reads it.
      groups: the convolution's feature groups; each has its own columns.
      drop_filters: leave out filters without a weight too (only for ``groups`` 1).

    Returns:
      ``(matrices, support)``: for each group (kept columns, filters of the group).

    Raises:
      ValueError: everything is masked, a mask of another shape, or ``drop_filters`` of a grouped
        convolution.
    """
    host = np.asarray(kernel)
    alive = np.asarray(host != 0 if mask is None else mask)
    if alive.shape != host.shape:
        raise ValueError(f"a mask of shape {alive.shape} for a kernel of shape {host.shape}")
    if host.shape[-1] % groups:
        raise ValueError(f"{groups} groups do not divide {host.shape[-1]} filters")
    if drop_filters and groups > 1:
        raise ValueError("drop_filters needs an ungrouped convolution")
    if not alive.any():
        raise ValueError("the mask removes the whole kernel: nothing would be computed")
    h, w, c, o = host.shape
    each = o // groups
    kept = np.flatnonzero(alive.any(axis=(0, 1, 2))) if drop_filters else np.arange(o)
    weights = np.where(alive, host, 0)
    columns, matrices = [], []
    for g in range(groups):
        mine = kept if groups == 1 else np.arange(g * each, (g + 1) * each)
        read = np.argwhere(alive[..., mine].any(axis=-1))
        columns.append(tuple(map(tuple, read.tolist())))
        matrices.append(jnp.asarray(weights[..., mine][tuple(read.T)]))
    filters = tuple(kept.tolist()) if drop_filters and len(kept) < o else None
    return matrices, Support((h, w), tuple(columns), filters, o, c)


def thin_conv(
    x: Float[Array, "n h w c"],
    matrices: Sequence[Float[Array, "_k _o"]],
    support: Support,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    precision: Any = None,
) -> Float[Array, "n ho wo o"]:
    """Gathers the kept patch columns only, then one dense product for each group.

    Args:
      x: activations.
      matrices: from `thin`.
      support: from `thin`.
      strides: of the convolution.
      padding: ``"SAME"``, ``"VALID"`` or pairs.
      precision: of the product.

    Returns:
      What the masked convolution gives; removed filters give zeros.
    """
    kh, kw = support.window
    sh, sw = strides
    if isinstance(padding, str):
        pads: Any = jax.lax.padtype_to_pads(x.shape[1:3], (kh, kw), (sh, sw), padding)
    else:
        pads = padding
    x = jnp.pad(x, ((0, 0), *map(tuple, pads), (0, 0)))
    ho, wo = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    width = x.shape[-1] // len(matrices)
    outs = []
    for g, (matrix, columns) in enumerate(zip(matrices, support.columns)):
        if not columns:
            outs.append(jnp.zeros((x.shape[0], ho, wo, matrix.shape[1]), x.dtype))
            continue
        patches = []
        for (i, j), channels in _by_position(columns).items():
            part = x[:, i : i + (ho - 1) * sh + 1 : sh, j : j + (wo - 1) * sw + 1 : sw, :]
            index = np.asarray(channels) + g * width
            whole = len(index) == x.shape[-1]
            patches.append(part if whole else jnp.take(part, index, axis=-1))
        outs.append(jnp.matmul(jnp.concatenate(patches, axis=-1), matrix, precision=precision))
    y = jnp.concatenate(outs, axis=-1)
    if support.filters is None:
        return y
    full = jnp.zeros((*y.shape[:-1], support.out), y.dtype)
    return full.at[..., np.asarray(support.filters)].set(y)


def _by_position(
    columns: Sequence[tuple[int, int, int]],
) -> dict[tuple[int, int], list[int]]:
    out: dict[tuple[int, int], list[int]] = {}
    for i, j, c in columns:
        out.setdefault((i, j), []).append(c)
    return out


class ThinConv(nnx.Module):
    """A convolution whose kernel holds the kept columns only; from a masked `nnx.Conv`.

    Trainable as it is: removed columns have no parameters left.
    """

    def __init__(self, conv: nnx.Conv, mask: Any = None):
        """Args: the convolution (2-D, no dilation) and a mask of its kernel (default: non-zeros).

        Raises:
          ValueError: a dilated or not 2-D convolution, or circular padding.
        """
        kernel = conv.kernel[...]
        dilations = {conv.kernel_dilation, conv.input_dilation}
        if kernel.ndim != 4 or not dilations <= {None, 1, (1, 1)}:
            raise ValueError("ThinConv needs a 2-D convolution without dilation")
        padding = conv.padding
        if isinstance(padding, str) and padding not in ("SAME", "VALID"):
            raise ValueError(f"ThinConv supports SAME, VALID or explicit padding, got {padding!r}")
        matrices, self.support = thin(kernel, mask, groups=conv.feature_group_count)
        self.kernels = nnx.List([nnx.Param(m) for m in matrices])
        self.bias = None if conv.bias is None else nnx.Param(jnp.asarray(conv.bias[...]))
        strides = conv.strides if conv.strides is not None else 1
        self.strides = (strides, strides) if isinstance(strides, int) else tuple(strides)
        if isinstance(padding, int):
            padding = ((padding, padding),) * 2
        elif not isinstance(padding, str):
            padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
        self.padding: Any = padding
        self.precision = conv.precision

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo o"]:
        """(N, H, W, C) -> (N, H', W', O)."""
        y = thin_conv(
            x,
            [k[...] for k in self.kernels],
            self.support,
            strides=self.strides,
            padding=self.padding,
            precision=self.precision,
        )
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
