"""What is static of a 2-D convolution: strides, explicit pads, dilation, groups, sizes, types."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

IntPair = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """Everything about a 2-D convolution except its arrays (all static, hashable).

    Attributes:
      strides: (rows, columns).
      padding: ((top, bottom), (left, right)); negative entries crop, as in ``lax``.
      dilation: kernel dilation (rows, columns).
      groups: number of feature groups; the kernel is (kh, kw, C_in / groups, C_out).
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def out_size(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Output (height, width) for an input and a kernel of the given sizes."""
        sizes = []
        for n, k, s, (lo, hi), d in zip(size, kernel, self.strides, self.padding, self.dilation):
            sizes.append(max(0, (n + lo + hi - (k - 1) * d - 1) // s + 1))
        return sizes[0], sizes[1]


PARTS = ("forward", "input_grad", "kernel_grad")


def kind_of(kernel_shape: tuple[int, ...], groups: int) -> str:
    """``"depthwise"``, ``"grouped"``, ``"pointwise"`` or ``"dense"`` (kernel HWIO)."""
    kh, kw, c_group, _ = kernel_shape
    if groups > 1:
        return "depthwise" if c_group == 1 else "grouped"
    return "pointwise" if (kh, kw) == (1, 1) else "dense"


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """Everything that the choice of a form may depend on besides the platform.

    Attributes:
      spec: strides, pads, dilation, groups.
      x: shape of the input, (N, H, W, C_in).
      kernel: shape of the kernel, (kh, kw, C_in / groups, C_out).
      dtype: name of the arrays' type.
      precision: name of the asked-for precision of products, None: the default.
    """

    spec: ConvSpec
    x: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]
    dtype: str = "float32"
    precision: str | None = None

    @property
    def kind(self) -> str:
        """See :func:`kind_of`."""
        return kind_of(self.kernel, self.spec.groups)

    @property
    def out(self) -> tuple[int, int, int, int]:
        """Shape of the output, (N, Ho, Wo, C_out)."""
        size = self.spec.out_size((self.x[1], self.x[2]), (self.kernel[0], self.kernel[1]))
        return (self.x[0], *size, self.kernel[3])


@dataclasses.dataclass(frozen=True)
class ShuffleCase:
    """One channel shuffle.

    Attributes:
      x: shape of the array, channels last.
      groups: g; the last axis is read as (g, C/g).
      dtype: name of the array's type.
    """

    x: tuple[int, ...]
    groups: int
    dtype: str = "float32"


def precision_name(precision: Any) -> str | None:
    """``precision`` of ``lax`` as text, two of them with a comma; None stays None."""
    if precision is None or isinstance(precision, str):
        return precision
    if isinstance(precision, Sequence):
        names = [precision_name(p) or "default" for p in precision]
        return names[0] if len(set(names)) == 1 else ",".join(names)
    return getattr(precision, "name", str(precision)).lower()


def pair(value: IntPair, name: str) -> tuple[int, int]:
    """``value`` as two positive ints; raises ValueError that names the argument."""
    out = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
    if len(out) != 2 or min(out) < 1:
        raise ValueError(f"{name} must be a positive int or two of them, got {value!r}")
    return out[0], out[1]


def explicit_padding(
    padding: Padding,
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """``padding`` as ((top, bottom), (left, right)).

    Args:
      padding: ``"SAME"`` (TensorFlow's rule: the odd pixel goes last), ``"VALID"``, one int for all
        sides, one int per axis, or (low, high) per axis.
      size: input height and width.
      kernel: kernel height and width.
      strides: rows, columns.
      dilation: rows, columns.

    Raises:
      ValueError: for any other string or shape.
    """
    if isinstance(padding, str):
        mode = padding.upper()
        if mode == "VALID":
            return (0, 0), (0, 0)
        if mode != "SAME":
            raise ValueError(
                f'padding must be "SAME", "VALID", an int or (low, high) pairs, got {padding!r}'
            )
        pads = []
        for n, k, s, d in zip(size, kernel, strides, dilation):
            total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            pads.append((total // 2, total - total // 2))
        return pads[0], pads[1]
    entries: Any = (padding, padding) if isinstance(padding, int) else tuple(padding)
    if len(entries) != 2:
        raise ValueError(f"padding must have one entry for each of 2 axes, got {padding!r}")
    out = []
    for entry in entries:
        lo, hi = (entry, entry) if isinstance(entry, int) else tuple(entry)
        out.append((int(lo), int(hi)))
    return out[0], out[1]
