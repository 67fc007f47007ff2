"""2-D convolution in the formulation that is fastest on the platform it runs on.

Every function here computes the same numbers as ``lax.conv_general_dilated`` (to 1e-5 relative in
float32), values and gradients, for all strides, pads, dilations and groups.

**How to recognise these convolutions in a jaxpr.** :func:`conv` appears as one call of a
``jax.jit`` function whose name starts with ``cnnjax_depthwise_conv``, ``cnnjax_grouped_conv``,
``cnnjax_pointwise_conv`` or ``cnnjax_dense_conv``: an equation with ``params["name"]`` of that
name, inputs ``x`` (NHWC) and ``kernel`` (HWIO), output NHWC. Inside it is one equation of a
primitive of the same name.
:func:`cnnjax.ops.recognise` takes either equation and returns the :class:`ConvSpec` (strides,
explicit pads, dilation, groups), or None for any other. A dense k x k convolution is a plain
``conv_general_dilated`` equation, except where the kernel is larger than the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnnjax.errors import did_you_mean
from cnnjax.ops import choice, formulas, primitives
from cnnjax.ops.geometry import ConvSpec, IntPair, Padding, explicit_padding, kind_of, pair
from cnnjax.ops.table import in_force


def _named(kind: str) -> Callable[..., Array]:
    def call(x: Any, kernel: Any, spec: ConvSpec, form: Any, precision: Any) -> Any:
        return primitives.bind(x, kernel, spec, form, precision)

    call.__name__ = call.__qualname__ = f"cnnjax_{kind}_conv"
    return jax.jit(call, static_argnums=(2, 3, 4))


_CALLS = {kind: _named(kind) for kind in primitives.TRIPLES}


def _hashable(precision: Any) -> Any:
    return tuple(precision) if isinstance(precision, list) else precision


def conv(
    x: Float[Array, "n h w c_in"],
    kernel: Float[Array, "kh kw c_group c_out"],
    *,
    strides: IntPair = 1,
    padding: Padding = "SAME",
    dilation: IntPair = 1,
    groups: int = 1,
    form: str = "auto",
    precision: Any = None,
) -> Float[Array, "n h2 w2 c_out"]:
    """2-D convolution (cross-correlation) of NHWC images with an HWIO kernel.

    Args:
      x: images.
      kernel: (kh, kw, C_in / groups, C_out); output channels are group-major.
      strides: one int or (rows, columns).
      padding: ``"SAME"`` (TensorFlow's), ``"VALID"``, an int, or ((top, bottom), (left, right)).
      dilation: of the kernel.
      groups: feature groups; ``groups == C_in`` is depthwise.
      form: ``"auto"`` picks by platform, or as the table of measured forms says that is in force
        (:func:`cnnjax.ops.use_table`); ``"native"`` is ``lax``'s convolution, ``"shift"`` the sum
        of shifted multiply-adds (depthwise), ``"dot"`` matrix products.
      precision: as in ``lax``.

    Returns:
      The output map, in the dtype of ``x`` and ``kernel`` promoted.

    Raises:
      ValueError: shapes that do not fit, an unknown form, or one that this kind does not have.
    """
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(
            f"conv takes x (N, H, W, C) and a kernel (kh, kw, C/groups, C_out), got shapes "
            f"{x.shape} and {kernel.shape}"
        )
    kh, kw, c_group, c_out = kernel.shape
    if groups < 1 or c_group * groups != x.shape[3] or c_out % groups:
        raise ValueError(
            f"a kernel of shape {kernel.shape} with groups={groups} does not fit {x.shape[3]} "
            f"input channels: it needs C_in = {c_group} * groups and C_out divisible by groups"
        )
    window, step, rate = (kh, kw), pair(strides, "strides"), pair(dilation, "dilation")
    pads = explicit_padding(padding, (x.shape[1], x.shape[2]), window, step, rate)
    spec = ConvSpec(step, pads, rate, groups)
    kind = kind_of(kernel.shape, groups)
    if form not in choice.FORMS:
        raise ValueError(f"unknown form {form!r}.{did_you_mean(form, choice.FORMS)}")
    if form != "auto" and form not in choice.BY_KIND[kind]:
        raise ValueError(
            f"a {kind} convolution has the forms {', '.join(choice.BY_KIND[kind])}, not {form!r}"
        )
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    plain = kind == "dense" and form == "auto"
    if plain:
        plain = not choice.is_cramped(spec, (x.shape[1], x.shape[2]), window)
    if plain or form == "native":
        return primitives.as_lax(x, kernel, spec, precision)
    x, kernel = formulas.vary_alike(x, kernel)
    chosen = (in_force() or form) if form == "auto" else form
    return _CALLS[kind](x, kernel, spec, chosen, _hashable(precision))


def depthwise(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw 1 c_out"],
    **options: Any,
) -> Float[Array, "n h2 w2 c_out"]:
    """Depthwise :func:`conv`: each channel with its own C_out / C kernels."""
    return conv(x, kernel, groups=x.shape[-1], **options)


def grouped(
    x: Float[Array, "n h w c_in"],
    kernel: Float[Array, "kh kw c_group c_out"],
    **options: Any,
) -> Float[Array, "n h2 w2 c_out"]:
    """Grouped :func:`conv`; the number of groups follows from the two shapes."""
    if x.shape[-1] % kernel.shape[2]:
        raise ValueError(
            f"{x.shape[-1]} input channels don't divide into groups of {kernel.shape[2]}"
        )
    return conv(x, kernel, groups=x.shape[-1] // kernel.shape[2], **options)


def pointwise(
    x: Float[Array, "n h w c_in"], kernel: Float[Array, "1 1 c_in c_out"], **options: Any
) -> Float[Array, "n h2 w2 c_out"]:
    """1x1 :func:`conv`."""
    return conv(x, kernel, **options)


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    **options: Any,
) -> Array:
    """``lax.conv_general_dilated`` with :func:`conv`'s formulations where they apply.

    It fits the ``conv_general_dilated=`` argument of ``flax.nnx.Conv`` and ``flax.linen.Conv``.
    What :func:`conv` does not cover (other ranks or layouts, input dilation, an asked-for output
    type or sharding) goes to ``lax`` unchanged.
    """
    ours = lhs.ndim == 4 and lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, dimension_numbers
    ) == lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    plain = all(v is None for v in options.values()) and batch_group_count == 1
    upsampled = lhs_dilation is not None and any(d != 1 for d in lhs_dilation)
    strings = isinstance(padding, str) and padding.upper() not in ("SAME", "VALID")
    if not ours or not plain or upsampled or strings:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            **options,
        )
    return conv(
        lhs,
        rhs,
        strides=tuple(window_strides),
        padding=padding,
        dilation=(1, 1) if rhs_dilation is None else tuple(rhs_dilation),
        groups=feature_group_count,
        precision=precision,
    )
