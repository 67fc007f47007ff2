"""Convolutions as JAX primitives of our own, so that each platform gets its own formulation.

A convolution is bilinear, and so are its two transposes; each is the transpose of the others:

==========================  ======================================  ===========================
primitive                   computes                                transposes to
==========================  ======================================  ===========================
``cnnjax_K_conv``           y = conv(x, kernel)                     input_grad, kernel_grad
``cnnjax_K_conv_input_grad``   dx from (ct, kernel)                 conv, kernel_grad
``cnnjax_K_conv_kernel_grad``  dkernel from (x, ct)                 input_grad, conv
==========================  ======================================  ===========================

with ``K`` one of ``depthwise``, ``grouped``, ``pointwise``, ``dense``. So every order of reverse
and forward differentiation works, which a ``custom_vjp`` would not give (it has no forward mode,
which Gauss-Newton products need). ``vmap`` folds the mapped axis into the batch, or, where the
kernel is mapped too, into the groups.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cnnjax.ops import choice, formulas, products
from cnnjax.ops.geometry import ConvCase, ConvSpec, kind_of, precision_name

Array = jax.Array

_FORWARD = {
    "native": formulas.native_forward,
    "shift": formulas.shift_forward,
    "dot": products.dot_forward,
}
_INPUT_GRAD = {
    "native": formulas.native_input_grad,
    "shift": formulas.shift_input_grad,
    "dot": products.dot_input_grad,
}
_KERNEL_GRAD = {
    "native": formulas.native_kernel_grad,
    "shift": formulas.shift_kernel_grad,
    "dot": products.dot_kernel_grad,
}


class Triple(NamedTuple):
    """The three primitives of one kind of convolution."""

    conv: Primitive
    input_grad: Primitive
    kernel_grad: Primitive


def _abstract(shape: tuple[int, ...], like: Any) -> Any:
    return like.update(shape=tuple(shape), weak_type=False)


def case_of(part: str, a: Any, b: Any, params: dict[str, Any]) -> ConvCase:
    """What a part's two arrays (x and kernel, ct and kernel, x and ct) are the convolution of.

    Args:
      part: see :data:`cnnjax.ops.geometry.PARTS`.
      a, b: arrays or their abstract values.
      params: of the equation of the primitive.
    """
    spec, precision = params["spec"], precision_name(params["precision"])
    x, kernel = tuple(a.shape), tuple(b.shape)
    if part == "input_grad":
        x = (x[0], *params["size"], kernel[2] * spec.groups)
    elif part == "kernel_grad":
        kernel = (*params["kernel_size"], x[3] // spec.groups, kernel[3])
    return ConvCase(spec, x, kernel, jnp.dtype(a.dtype).name, precision)


def bind(x: Array, kernel: Array, spec: ConvSpec, form: Any, precision: Any) -> Array:
    """The convolution, through the primitive of its kind.

    ``form`` is a name, ``"auto"``, or a table of measured forms: a parameter of the equation, so
    that no cache of traced or compiled programs mixes tables up.
    """
    kind = kind_of(kernel.shape, spec.groups)
    return TRIPLES[kind].conv.bind(x, kernel, spec=spec, form=form, precision=precision)


def eagerly(primitive: Primitive, static: tuple[str, ...]) -> Any:
    """The rule for a call outside any trace: the primitive, compiled by itself.

    Under ``jax.disable_jit()`` too: it is one operation, and its meaning is its lowering.
    """
    compiled = jax.jit(lambda *a, **kw: primitive.bind(*a, **kw), static_argnames=static)

    def run(*arrays: Array, **params: Any) -> Any:
        with jax.disable_jit(False):
            return compiled(*arrays, **params)

    return run


def _fold(a: Array, axis: Any, size: int) -> Array:
    """Moves a mapped axis (or repeats an unmapped array) to the last axis, merged into it."""
    if axis is None:
        a = jnp.broadcast_to(a[None], (size, *a.shape))
        axis = 0
    a = jnp.moveaxis(a, axis, -2)
    return a.reshape(*a.shape[:-2], -1)


def _unfold(a: Array, size: int) -> Array:
    a = a.reshape(*a.shape[:-1], size, a.shape[-1] // size)
    return jnp.moveaxis(a, -2, 0)


def _make(kind: str) -> Triple:
    name = f"cnnjax_{kind}_conv"
    conv = Primitive(name)
    input_grad = Primitive(f"{name}_input_grad")
    kernel_grad = Primitive(f"{name}_kernel_grad")

    # --- shapes ---
    def conv_shape(x, kernel, *, spec, form, precision):
        out = spec.out_size(x.shape[1:3], kernel.shape[:2])
        return _abstract((x.shape[0], *out, kernel.shape[3]), x)

    def input_grad_shape(ct, kernel, *, spec, form, size, precision):
        return _abstract((ct.shape[0], *size, kernel.shape[2] * spec.groups), ct)

    def kernel_grad_shape(x, ct, *, spec, form, kernel_size, precision):
        return _abstract((*kernel_size, x.shape[3] // spec.groups, ct.shape[3]), ct)

    # --- lowering: one place where the platform decides ---
    def lower(primitive: Primitive, table: dict, part: str, abstract: Any) -> None:
        def run(platform, a, b, **params):
            chosen = params["form"]
            if chosen == "auto" or not isinstance(chosen, str):
                case = case_of(part, a, b, params)
                measured = None if chosen == "auto" else chosen
                chosen = choice.choose(case, part, platform=platform, table=measured)
            static = [params[name] for name in ("size", "kernel_size") if name in params]
            return table[chosen](a, b, params["spec"], *static, params["precision"])

        for platform in (*choice.PLATFORMS, None):
            rule = mlir.lower_fun(functools.partial(run, platform), multiple_results=False)
            mlir.register_lowering(primitive, rule, platform=platform)
        primitive.def_abstract_eval(abstract)
        static = ("spec", "form", "precision", "size", "kernel_size")
        primitive.def_impl(eagerly(primitive, static))

    lower(conv, _FORWARD, "forward", conv_shape)
    lower(input_grad, _INPUT_GRAD, "input_grad", input_grad_shape)
    lower(kernel_grad, _KERNEL_GRAD, "kernel_grad", kernel_grad_shape)

    # --- differentiation: the three are one another's transposes ---
    def shape(a):
        return getattr(a, "aval", a).shape

    def conv_x(ct, x, kernel, *, spec, **kw):
        return input_grad.bind(ct, kernel, spec=spec, size=shape(x)[1:3], **kw)

    def conv_kernel(ct, x, kernel, *, spec, **kw):
        return kernel_grad.bind(x, ct, spec=spec, kernel_size=shape(kernel)[:2], **kw)

    def input_ct(v, ct, kernel, *, size, **kw):
        return conv.bind(v, kernel, **kw)

    def input_kernel(v, ct, kernel, *, size, **kw):
        return kernel_grad.bind(v, ct, kernel_size=shape(kernel)[:2], **kw)

    def kernel_x(v, x, ct, *, kernel_size, **kw):
        return input_grad.bind(ct, v, size=shape(x)[1:3], **kw)

    def kernel_ct(v, x, ct, *, kernel_size, **kw):
        return conv.bind(x, v, **kw)

    ad.defbilinear(conv, conv_x, conv_kernel)
    ad.defbilinear(input_grad, input_ct, input_kernel)
    ad.defbilinear(kernel_grad, kernel_x, kernel_ct)

    # --- vmap ---
    def batch_images(primitive, args, dims, kw):
        """Only the activation is mapped: the images of all copies form one batch."""
        a = jnp.moveaxis(args[0], dims[0], 0)
        size = a.shape[0]
        out = primitive.bind(a.reshape(-1, *a.shape[2:]), args[1], **kw)
        return out.reshape(size, a.shape[1], *out.shape[1:]), 0

    def batch_groups(which, args, dims, kw):
        """Anything else: the copies become groups of one larger convolution."""
        size = next(a.shape[d] for a, d in zip(args, dims) if d is not None)
        a, b = (_fold(v, d, size) for v, d in zip(args, dims))
        spec = kw.pop("spec")
        spec = ConvSpec(spec.strides, spec.padding, spec.dilation, spec.groups * size)
        if which == "kernel_grad":
            c_group = a.shape[3] // spec.groups
            shape = (*kw["kernel_size"], c_group, b.shape[3])
        else:
            shape = b.shape
        if kind_of(shape, spec.groups) != kind and kw["form"] in ("shift", "dot"):
            kw["form"] = "auto"
        target = getattr(TRIPLES[kind_of(shape, spec.groups)], which)
        return _unfold(target.bind(a, b, spec=spec, **kw), size), 0

    def batch(primitive, which):
        def rule(args, dims, **kw):
            if dims[1] is None and which != "kernel_grad":
                return batch_images(primitive, args, dims, kw)
            return batch_groups(which, args, dims, kw)

        batching.primitive_batchers[primitive] = rule

    batch(conv, "conv")
    batch(input_grad, "input_grad")
    batch(kernel_grad, "kernel_grad")
    return Triple(conv, input_grad, kernel_grad)


TRIPLES = {kind: _make(kind) for kind in ("depthwise", "grouped", "pointwise", "dense")}
# names of the convolutions themselves, e.g. for what to keep in rematerialization
FORWARD_PRIMITIVES = tuple(triple.conv.name for triple in TRIPLES.values())


def recognise(eqn: Any) -> ConvSpec | None:
    """The geometry of a jaxpr equation that is one of our forward convolutions, else None.

    ``eqn`` is the call by name (see :mod:`cnnjax.ops.conv`) or the primitive inside it;
    ``eqn.invars`` are the input (NHWC) and the kernel (HWIO), ``eqn.outvars[0]`` is NHWC. It means
    exactly ``lax.conv_general_dilated`` with the returned strides, padding, ``rhs_dilation`` and
    ``feature_group_count``.
    """
    if any(eqn.primitive is triple.conv for triple in TRIPLES.values()):
        return eqn.params["spec"]
    name = eqn.params.get("name")
    if name in {triple.conv.name for triple in TRIPLES.values()} and "jaxpr" in eqn.params:
        inner = eqn.params["jaxpr"].jaxpr.eqns
        return recognise(inner[0]) if len(inner) == 1 else None
    return None


def as_lax(x: Array, kernel: Array, spec: ConvSpec, precision: Any = None) -> Array:
    """The same convolution as one ``lax`` equation."""
    return formulas.native_forward(x, kernel, spec, precision)
