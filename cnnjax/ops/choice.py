"""Which formulation runs where: the one place that decides.

The rules follow ``benchmarks/conv_forms.py``; its ratios, measured with XLA:CPU on one core, are
``benchmarks/results/conv_forms.json``, and a test holds these rules and sentences against them.
There the native depthwise convolution is slower than shifted multiply-adds in every part of every
case, mostly more than ten times; the native kernel gradient of a grouped convolution is more than
five times slower than one matrix product a group, up to a hundred and more; 1x1 convolutions gain
a little as matrix products, most in the gradient of the kernel. A dense convolution whose kernel
has more taps than its map has pixels (3x3 on 2x2, as in the last stage of a CIFAR VGG) leaves XLA's
fast path: more than ten times slower than matrix products. Channel shuffle by slices is mostly up
to twice as fast as by transposition, and slower on the widest maps. On GPU and TPU nothing was
measured: the native form stands until a measurement there beats it.
"""

from __future__ import annotations

from cnnjax.ops.geometry import ConvSpec

FORMS = ("auto", "native", "shift", "dot")
# what "auto" may pick for each kind, and what a caller may ask for
BY_KIND = {
    "depthwise": ("native", "shift", "dot"),
    "grouped": ("native", "dot"),
    "pointwise": ("native", "dot"),
    "dense": ("native", "dot"),
}
_FEW_CHANNELS = 12  # a group this narrow wastes a matrix product
_MANY_TAPS = 25  # a product a tap: too many passes over the output
_MANY_PIECES = 8  # of a channel shuffle: each is a piece of program


def is_cramped(spec: ConvSpec, size: tuple[int, int], kernel: tuple[int, int]) -> bool:
    """Whether a dense convolution's kernel has more taps than its input or output has pixels."""
    out = spec.out_size(size, kernel)
    return kernel[0] * kernel[1] > min(size[0] * size[1], out[0] * out[1])


def choose(
    kind: str,
    part: str,
    spec: ConvSpec,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    *,
    platform: str | None,
) -> str:
    """The form that runs.

    Args:
      kind: ``"depthwise"``, ``"grouped"``, ``"pointwise"`` or ``"dense"``.
      part: ``"forward"``, ``"input_grad"`` or ``"kernel_grad"``.
      spec: the convolution's geometry.
      a_shape: shape of the part's first array (x, ct, x).
      b_shape: shape of the part's second array (kernel, kernel, ct).
      platform: ``"cpu"``, or None for every other.

    Returns:
      ``"native"``, ``"shift"`` or ``"dot"``.
    """
    if platform != "cpu":
        return "native"
    if kind == "dense":
        area = a_shape[1] * a_shape[2]
        if part == "kernel_grad":  # one pixel: eight of nine taps see padding alone
            return "dot" if area == 1 else "native"
        return "dot" if b_shape[0] * b_shape[1] > area else "native"
    if kind == "depthwise":
        return "shift"
    if kind == "pointwise" or part == "kernel_grad":
        return "dot"
    kh, kw, c_group, c_out = b_shape
    if kh * kw > 1 and min(c_group, c_out // spec.groups) < _FEW_CHANNELS:
        return "native"
    if part == "forward" and kh * kw >= _MANY_TAPS:
        return "native"
    return "dot"


def choose_shuffle(channels: int, groups: int, *, platform: str | None) -> str:
    """The form of a channel shuffle that runs.

    Args:
      channels: C.
      groups: g, which divides C.
      platform: ``"cpu"``, or None for every other.

    Returns:
      ``"stack"`` (slices side by side) or ``"native"`` (a transposition).
    """
    pieces = min(groups, channels // groups)
    return "stack" if platform == "cpu" and pieces <= _MANY_PIECES else "native"
