"""Every formulation computes lax's convolution: values, both gradients, forward mode, vmap."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from cnnjax import ops
from cnnjax.ops import primitives, shuffle

KINDS = {
    # name: (groups, c_in, c_out, kernel, forms)
    "depthwise": (6, 6, 6, (3, 3), ("auto", "shift", "dot")),
    "multiplier": (3, 3, 6, (3, 2), ("auto", "shift")),
    "depthwise5": (4, 4, 4, (5, 5), ("auto", "shift")),
    "grouped1": (3, 6, 9, (1, 1), ("auto", "dot")),
    "grouped3": (2, 6, 8, (3, 3), ("auto", "dot")),
    "grouped3x6": (6, 12, 18, (3, 2), ("auto", "dot")),
    "many_groups": (40, 80, 40, (1, 3), ("auto", "dot")),
    "pointwise": (1, 5, 7, (1, 1), ("auto", "dot")),
    "dense": (1, 3, 5, (3, 2), ("auto", "dot")),
}
STRIDES = ((1, 1), (2, 2), (3, 2))
PADS = (((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 1), (2, 1)), ((-1, 0), (1, -1)), "SAME", "VALID")
DILATIONS = ((1, 1), (2, 1))
ALL = list(itertools.product(KINDS, STRIDES, PADS, DILATIONS))
# every pair of values occurs; the whole product is in the slow suite
SOME = [c for i, c in enumerate(ALL) if (i * 7) % 23 == 3]


def _reference(spec: dict):
    def conv(x, k):
        return lax.conv_general_dilated(
            x,
            k,
            spec["strides"],
            spec["padding"],
            rhs_dilation=spec["dilation"],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=spec["groups"],
            precision="highest",
        )

    return conv


def _compare(kind: str, strides, padding, dilation, image=(11, 12)) -> None:
    groups, c_in, c_out, size, forms = KINDS[kind]
    spec = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
    rng = np.random.default_rng(0)
    x, dx = rng.standard_normal((2, 2, *image, c_in)).astype(np.float32)
    k, dk = rng.standard_normal((2, *size, c_in // groups, c_out)).astype(np.float32)

    def everything(conv, x, k, dx, dk):
        y, vjp = jax.vjp(conv, x, k)
        ct = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, vjp(ct), jax.jvp(conv, (x, k), (dx, dk))[1]

    @jax.jit
    def run(x, k, dx, dk):
        def ours(form):
            def conv(a, b):
                return ops.conv(a, b, form=form, precision="highest", **spec)

            return everything(conv, x, k, dx, dk)

        return {f: ours(f) for f in forms}, everything(_reference(spec), x, k, dx, dk)

    ours, want = run(x, k, dx, dk)
    for form in forms:
        for got, ref in zip(jax.tree.leaves(ours[form]), jax.tree.leaves(want), strict=True):
            assert got.shape == ref.shape
            scale = max(1.0, float(np.abs(ref).max()))
            np.testing.assert_allclose(got, ref, rtol=0, atol=1e-5 * scale, err_msg=form)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_equals_lax(case):
    _compare(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_equals_lax_in_every_combination(case):
    _compare(*case)


@pytest.mark.parametrize(
    ("kind", "strides", "image"),
    [
        ("dense", (1, 1), (1, 1)),
        ("dense", (1, 1), (2, 2)),
        ("dense", (2, 2), (3, 3)),  # XLA:CPU's own gradient aborts on 4x4
        ("dense", (1, 2), (1, 9)),
        ("grouped3", (1, 1), (2, 1)),
        ("depthwise5", (2, 1), (4, 3)),
    ],
)
def test_maps_smaller_than_the_kernel(kind, strides, image):
    _compare(kind, strides, ((1, 1), (1, 1)), (1, 1), image)


def test_a_dense_kernel_larger_than_its_map_leaves_the_native_form_on_cpu():
    def form(size, platform):
        x = jax.ShapeDtypeStruct((1, size, size, 4), jnp.float32)
        k = jax.ShapeDtypeStruct((3, 3, 4, 4), jnp.float32)
        fn = jax.jit(lambda a, b: ops.conv(a, b))
        text = jax.export.export(fn, platforms=[platform])(x, k).mlir_module()
        return "native" if "stablehlo.convolution" in text else "dot"

    assert [form(s, "cpu") for s in (1, 2, 3, 4)] == ["dot", "dot", "native", "native"]
    assert form(2, "cuda") == "native"


@pytest.mark.parametrize("kind", ["depthwise", "grouped1", "pointwise", "dense"])
def test_hessian_vector_products(kind):
    """Forward over reverse and reverse over reverse agree with lax's."""
    groups, c_in, c_out, size, _ = KINDS[kind]
    spec = {"strides": (2, 1), "padding": ((1, 0), (1, 1)), "dilation": (1, 1), "groups": groups}
    rng = np.random.default_rng(1)
    x, dx = rng.standard_normal((2, 2, 6, 5, c_in)).astype(np.float32)
    k, dk = rng.standard_normal((2, *size, c_in // groups, c_out)).astype(np.float32)

    def products(conv, x, k, dx, dk):
        loss = lambda a, b: jnp.sum(jnp.tanh(conv(a, b)) ** 2)  # noqa: E731
        grad = jax.grad(loss, (0, 1))
        forward = jax.jvp(grad, (x, k), (dx, dk))[1]

        def along(a, b):
            ga, gb = grad(a, b)
            return jnp.vdot(ga, dx) + jnp.vdot(gb, dk)

        return forward, jax.grad(along, (0, 1))(x, k)

    @jax.jit
    def run(*args):
        form = "dot" if kind == "dense" else "auto"
        ours = products(lambda a, b: ops.conv(a, b, form=form, precision="highest", **spec), *args)
        return ours, products(_reference(spec), *args)

    ours, want = run(x, k, dx, dk)
    for got, ref in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        scale = max(1.0, float(np.abs(ref).max()))
        np.testing.assert_allclose(got, ref, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("kind", ["depthwise", "grouped3", "pointwise", "dense"])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 3)], ids=str)
def test_vmap(kind, axes):
    """vmap of the convolution and of its gradients equals a loop."""
    groups, c_in, c_out, size, _ = KINDS[kind]
    rng = np.random.default_rng(2)
    x = rng.standard_normal((3, 2, 7, 6, c_in)).astype(np.float32)
    k = rng.standard_normal((3, *size, c_in // groups, c_out)).astype(np.float32)
    args = [v[0] if axis is None else np.moveaxis(v, 0, axis) for v, axis in zip((x, k), axes)]

    def part(x, k):
        form = "dot" if kind == "dense" else "auto"
        conv = lambda a, b: ops.conv(a, b, groups=groups, padding=1, form=form)  # noqa: E731
        y, vjp = jax.vjp(conv, x, k)
        return y, vjp(jnp.sin(y))

    mapped, looped = jax.jit(
        lambda a, b: (
            jax.vmap(part, axes)(a, b),
            [part(*(v.take(i, ax) if ax is not None else v for v, ax in zip((a, b), axes)))
             for i in range(3)],
        )
    )(*args)  # fmt: skip
    looped = jax.tree.map(lambda *v: np.stack(v), *looped)
    for got, ref in zip(jax.tree.leaves(mapped), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(got, ref, rtol=1e-4, atol=1e-4)


def test_bfloat16_accumulates_in_float32():
    x = jnp.full((1, 9, 9, 4), 1.0, jnp.bfloat16)
    k = jnp.full((9, 9, 1, 4), 1.0, jnp.bfloat16).at[0, 0].set(256.0)
    y = jax.jit(lambda a, b: ops.depthwise(a, b, padding="VALID", form="shift"))(x, k)
    assert y.dtype == jnp.bfloat16
    # 256 + 80: bfloat16 sums would stop at 256, where its spacing is 2
    np.testing.assert_array_equal(np.asarray(y, np.float32), 336.0)


def test_each_platform_gets_its_own_form():
    x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    k = jax.ShapeDtypeStruct((3, 3, 1, 4), jnp.float32)

    def text(platform):
        fn = jax.jit(lambda a, b: ops.depthwise(a, b))
        return jax.export.export(fn, platforms=[platform])(x, k).mlir_module()

    assert "stablehlo.convolution" not in text("cpu")
    assert "stablehlo.convolution" in text("cuda")
    assert "stablehlo.convolution" in text("tpu")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("depthwise", "cnnjax_depthwise_conv"),
        ("grouped3", "cnnjax_grouped_conv"),
        ("pointwise", "cnnjax_pointwise_conv"),
    ],
)
def test_jaxpr_is_recognised(kind, name):
    groups, c_in, c_out, size, _ = KINDS[kind]
    x = jax.ShapeDtypeStruct((1, 9, 8, c_in), jnp.float32)
    k = jax.ShapeDtypeStruct((*size, c_in // groups, c_out), jnp.float32)
    options = {"strides": (2, 1), "padding": "SAME", "dilation": (1, 2), "groups": groups}
    jaxpr = jax.make_jaxpr(lambda a, b: ops.conv(a, b, **options))(x, k)
    (eqn,) = jaxpr.jaxpr.eqns
    assert eqn.params["name"] == name
    spec = ops.recognise(eqn)
    assert spec == ops.recognise(eqn.params["jaxpr"].jaxpr.eqns[0])
    assert spec is not None
    want = jax.eval_shape(_reference(options), x, k)
    again = jax.eval_shape(lambda a, b: primitives.as_lax(a, b, spec), x, k)
    assert spec.groups == groups
    assert spec.strides == (2, 1)
    assert spec.dilation == (1, 2)
    assert again.shape == want.shape == eqn.outvars[0].aval.shape
    assert ops.recognise(jax.make_jaxpr(jnp.sin)(1.0).jaxpr.eqns[0]) is None


def test_data_parallel_over_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rng = np.random.default_rng(3)
    x = rng.standard_normal((16, 6, 6, 4)).astype(np.float32)
    kd = rng.standard_normal((3, 3, 1, 4)).astype(np.float32)
    kp = rng.standard_normal((1, 1, 4, 8)).astype(np.float32)

    def loss(kd, kp, x):
        return jnp.mean(jnp.square(ops.pointwise(ops.depthwise(x, kd), kp)))

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    one = step(kd, kp, x)
    many = step(kd, kp, jax.device_put(x, split))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    rng = np.random.default_rng(4)
    x = rng.standard_normal((8, 5, 5, 4)).astype(np.float32)
    k = rng.standard_normal((3, 3, 1, 4)).astype(np.float32)

    def local(x, k):
        grad = jax.grad(lambda k: jnp.sum(jnp.square(ops.depthwise(x, k))))(k)
        return ops.depthwise(x, k), grad

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=(spec("data"), spec())
    )
    y, grad = jax.jit(mapped)(x, k)
    want_y, want_grad = jax.jit(local)(x, k)
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.method("shufflenet_v1")
def test_channel_shuffle():
    """Output channel j * g + i is input channel i * (C / g) + j."""
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 1, 12)
    got = np.asarray(ops.channel_shuffle(jnp.asarray(x), 3))
    want = np.empty_like(x)
    for i, j in itertools.product(range(3), range(4)):
        want[..., j * 3 + i] = x[..., i * 4 + j]
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="5 groups don't divide 12"):
        ops.channel_shuffle(jnp.asarray(x), 5)


@pytest.mark.method("shufflenet_v1")
@pytest.mark.parametrize("groups", [1, 2, 3, 8, 12, 24])
def test_both_forms_of_channel_shuffle_agree_in_every_transformation(groups):
    rng = np.random.default_rng(groups)
    x, t = (jnp.asarray(rng.standard_normal((2, 3, 2, 24)), jnp.float32) for _ in range(2))
    plain = functools.partial(shuffle.transposed, groups=groups)
    np.testing.assert_array_equal(shuffle.stacked(x, groups), plain(x))
    ours = functools.partial(ops.channel_shuffle, groups=groups)

    def everything(f):
        def run(x, t):
            y, tangent = jax.jvp(f, (x,), (t,))
            grad = jax.grad(lambda x: jnp.vdot(f(x), t))(x)
            twice = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(f(x) ** 3))(x)))(x)
            return y, tangent, grad, twice, jax.vmap(f, 1, 2)(x), jax.vmap(f, 4, 0)(x[..., None])

        return jax.jit(run)(x, t)

    for a, b in zip(everything(ours), everything(plain)):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_array_equal(ours(x), plain(x))
    half = x.astype(jnp.bfloat16)
    assert ours(half).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 3), "feature_group_count": 4, "strides": 2},
        {"kernel_size": (3, 3), "feature_group_count": 2, "padding": ((1, 0), (2, 1))},
        {"kernel_size": (1, 1), "use_bias": False},
        {"kernel_size": (3, 3), "kernel_dilation": 2, "padding": "VALID"},
        {"kernel_size": (3, 3), "padding": "CIRCULAR", "feature_group_count": 4},
        {"kernel_size": (3,), "feature_group_count": 4},
        {"kernel_size": (3, 3), "input_dilation": 2, "padding": ((1, 1), (2, 0))},
        {"kernel_size": (1, 1), "dtype": jnp.bfloat16},
    ],
    ids=str,
)
def test_layer_is_nnx_conv(options):
    ours = ops.Conv(4, 8, rngs=nnx.Rngs(0), **options)
    theirs = nnx.Conv(4, 8, rngs=nnx.Rngs(0), **options)
    assert isinstance(ours, nnx.Conv)
    shape = (2, 7, 4) if len(ours.kernel_size) == 1 else (2, 7, 6, 4)
    x = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    got, want = ours(x), theirs(x)
    assert got.dtype == want.dtype
    tol = 2e-2 if got.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=tol, atol=tol
    )


def test_bad_input():
    x, k = jnp.zeros((1, 4, 4, 6)), jnp.zeros((3, 3, 1, 6))
    with pytest.raises(ValueError, match="does not fit 6 input"):
        ops.conv(x, k, groups=4)
    with pytest.raises(ValueError, match="Did you mean 'shift'"):
        ops.depthwise(x, k, form="shifts")
    with pytest.raises(ValueError, match="dense convolution has the forms native, dot, not 'shi"):
        ops.conv(x, jnp.zeros((3, 3, 6, 2)), form="shift")
    with pytest.raises(ValueError, match='padding must be "SAME"'):
        ops.depthwise(x, k, padding="SAM")
    with pytest.raises(ValueError, match="strides must be"):
        ops.depthwise(x, k, strides=0)
    with pytest.raises(ValueError, match="don't divide into groups of 4"):
        ops.grouped(x, jnp.zeros((1, 1, 4, 4)))
