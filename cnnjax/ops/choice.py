"""Which formulation runs where: the one place that decides.

The rules follow ``benchmarks/conv_forms.py`` (its ratios: ``benchmarks/results/conv_forms.json``),
measured with XLA:CPU. There the native depthwise convolution is 2 to 80 times slower than shifted
multiply-adds, the native kernel gradient of a grouped convolution 8 to 200 times slower than one
matrix product a group, and 1x1 convolutions gain up to 4 times in the backward pass as matrix
products. On GPU and TPU the native form stands until a measurement there beats it.
"""

from __future__ import annotations

from cnnjax.ops.geometry import ConvSpec

FORMS = ("auto", "native", "shift", "dot")
# what "auto" may pick for each kind, and what a caller may ask for
BY_KIND = {
    "depthwise": ("native", "shift", "dot"),
    "grouped": ("native", "dot"),
    "pointwise": ("native", "dot"),
    "dense": ("native",),
}
_FEW_CHANNELS = 12  # a group this narrow wastes a matrix product
_MANY_TAPS = 25  # a product a tap: too many passes over the output


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
    del a_shape
    if platform != "cpu" or kind == "dense":
        return "native"
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
