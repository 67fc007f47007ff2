"""Which formulation runs where: the one place that decides.

The rules follow ``benchmarks/conv_forms.py``; its ratios, measured with XLA:CPU on one core, are
``benchmarks/results/conv_forms.json``, and a test holds these rules and sentences against them.
There the native depthwise convolution is slower than shifted multiply-adds in every part of every
case, mostly more than ten times; the native kernel gradient of a grouped convolution is more than
five times slower than one matrix product a group, up to a hundred and more; 1x1 convolutions gain
a little as matrix products, most in the gradient of the kernel. A dense convolution whose kernel
has more taps than its map has pixels (3x3 on 2x2, as in the last stage of a CIFAR VGG) leaves XLA's
fast path: more than ten times slower than matrix products. Channel shuffle by slices is mostly up
to twice as fast as by transposition, and slower on the widest maps. On GPU and TPU no rule was
measured: the native form stands there unless a table that :func:`cnnjax.ops.tune` measured on the
device is in force; what is in the table goes before these rules everywhere.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from cnnjax.ops.geometry import ConvCase, ConvSpec, ShuffleCase

FORMS = ("auto", "native", "shift", "dot")
# what "auto" may pick for each kind, and what a caller may ask for
BY_KIND = {
    "depthwise": ("native", "shift", "dot"),
    "grouped": ("native", "dot"),
    "pointwise": ("native", "dot"),
    "dense": ("native", "dot"),
    "shuffle": ("native", "stack"),
}
# a TPU's or GPU's own name for itself, as ``Device.platform`` has it, for each that may be tuned
PLATFORMS = ("cpu", "gpu", "tpu")
_FEW_CHANNELS = 12  # a group this narrow wastes a matrix product
_MANY_TAPS = 25  # a product a tap: too many passes over the output
_MANY_PIECES = 8  # of a channel shuffle: each is a piece of program


def is_cramped(spec: ConvSpec, size: tuple[int, int], kernel: tuple[int, int]) -> bool:
    """Whether a dense convolution's kernel has more taps than its input or output has pixels."""
    out = spec.out_size(size, kernel)
    return kernel[0] * kernel[1] > min(size[0] * size[1], out[0] * out[1])


@runtime_checkable
class Table(Protocol):
    """Measured forms, see :class:`cnnjax.ops.FormTable`."""

    def form(self, part: str, case: ConvCase | ShuffleCase, *, platform: str | None) -> str | None:
        """The form of a part, None where it was not measured."""


def choose(case: ConvCase, part: str, *, platform: str | None, table: Table | None = None) -> str:
    """The form of a convolution that runs.

    Args:
      case: shapes, geometry, types.
      part: ``"forward"``, ``"input_grad"`` or ``"kernel_grad"``.
      platform: ``"cpu"``, ``"gpu"``, ``"tpu"``, or None for every other.
      table: measured forms, asked first.

    Returns:
      ``"native"``, ``"shift"`` or ``"dot"``.
    """
    measured = None if table is None else table.form(part, case, platform=platform)
    if measured is not None:
        return measured
    if platform != "cpu":
        return "native"
    kind = case.kind
    kh, kw, c_group, c_out = case.kernel
    if kind == "dense":
        _, height, width, _ = case.out if part == "input_grad" else case.x
        if part == "kernel_grad":  # one pixel: eight of nine taps see padding alone
            return "dot" if height * width == 1 else "native"
        return "dot" if kh * kw > height * width else "native"
    if kind == "depthwise":
        return "shift"
    if kind == "pointwise" or part == "kernel_grad":
        return "dot"
    if kh * kw > 1 and min(c_group, c_out // case.spec.groups) < _FEW_CHANNELS:
        return "native"
    if part == "forward" and kh * kw >= _MANY_TAPS:
        return "native"
    return "dot"


def choose_shuffle(case: ShuffleCase, *, platform: str | None, table: Table | None = None) -> str:
    """The form of a channel shuffle that runs.

    Args:
      case: shape, groups, type.
      platform: as in :func:`choose`.
      table: measured forms, asked first.

    Returns:
      ``"stack"`` (slices side by side) or ``"native"`` (a transposition).
    """
    measured = None if table is None else table.form("forward", case, platform=platform)
    if measured is not None:
        return measured
    pieces = min(case.groups, case.x[-1] // case.groups)
    return "stack" if platform == "cpu" and pieces <= _MANY_PIECES else "native"


def choose_pool(*, platform: str | None) -> str:
    """The form of the derivative of a max pool: ``"slices"`` (4 to 12 times faster than the native
    one with XLA:CPU, the forward pass included: ``benchmarks/pool_forms.py``) or ``"native"``.
    """
    return "slices" if platform == "cpu" else "native"
