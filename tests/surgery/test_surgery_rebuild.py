"""Rebuild: new leaves, mended attributes, an untouched input, and refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import surgery


def snapshot(model):
    """Everything observable of a model: bytes of the leaves, static attributes, object ids."""
    leaves = {
        p: np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ).tobytes()
        for p, x in surgery.leaves(model).items()
    }
    modules = {p: (id(m), dict(_static(m))) for p, m in surgery.modules(model).items()}
    return leaves, modules


def _static(module):
    from cnnjax.surgery.walk import statics

    return statics(module)


def leaf(shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def cut(layer, shapes, static=None):
    """The layer under a root, rebuilt with leaves of the given shapes."""
    root = nnx.Sequential(layer)
    before = snapshot(root)
    out = surgery.rebuild(
        root,
        {f"layers/0/{name}": leaf(shape) for name, shape in shapes.items()},
        static={"layers/0": static} if static else None,
    )
    assert snapshot(root) == before
    return out.layers[0]


# (layer, new leaf shapes, expected attributes, input shape, output shape)
def cases():
    r = nnx.Rngs(0)
    conv = {"kernel_init": nnx.initializers.ones_init(), "rngs": r}
    return {
        "conv": (
            nnx.Conv(6, 8, (3, 3), **conv),
            {"kernel": (3, 3, 4, 5), "bias": (5,)},
            {"in_features": 4, "out_features": 5, "kernel_shape": (3, 3, 4, 5)},
            (1, 5, 5, 4),
            (1, 5, 5, 5),
        ),
        "grouped": (
            nnx.Conv(8, 12, (1, 1), feature_group_count=4, **conv),
            {"kernel": (1, 1, 1, 8), "bias": (8,)},
            {"in_features": 4, "out_features": 8, "feature_group_count": 4},
            (1, 2, 2, 4),
            (1, 2, 2, 8),
        ),
        "depthwise": (
            nnx.Conv(6, 12, (3, 3), feature_group_count=6, use_bias=False, **conv),
            {"kernel": (3, 3, 1, 8)},
            {"in_features": 4, "out_features": 8, "feature_group_count": 4},
            (1, 4, 4, 4),
            (1, 4, 4, 8),
        ),
        "conv_transpose": (
            nnx.ConvTranspose(6, 8, (2, 2), strides=(2, 2), **conv),
            {"kernel": (2, 2, 3, 5), "bias": (5,)},
            {"in_features": 3, "out_features": 5},
            (1, 3, 3, 3),
            (1, 6, 6, 5),
        ),
        "conv_transpose_tk": (
            nnx.ConvTranspose(6, 8, (2, 2), strides=(2, 2), transpose_kernel=True, **conv),
            {"kernel": (2, 2, 5, 3), "bias": (5,)},
            {"in_features": 3, "out_features": 5},
            (1, 3, 3, 3),
            (1, 6, 6, 5),
        ),
        "linear": (
            nnx.Linear(6, 4, **conv),
            {"kernel": (5, 3), "bias": (3,)},
            {"in_features": 5, "out_features": 3},
            (2, 5),
            (2, 3),
        ),
        "linear_general": (
            nnx.LinearGeneral(6, (2, 4), rngs=r),
            {"kernel": (5, 2, 3), "bias": (2, 3)},
            {"in_features": (5,), "out_features": (2, 3)},
            (2, 5),
            (2, 2, 3),
        ),
        "einsum": (
            nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=r),
            {"kernel": (6, 2, 3), "bias": (6, 3)},
            {"kernel_shape": (6, 2, 3), "bias_shape": (6, 3)},
            (1, 5, 2),
            (1, 5, 6, 3),
        ),
        "batch_norm": (
            nnx.BatchNorm(6, rngs=r),
            dict.fromkeys(("scale", "bias", "mean", "var"), (4,)),
            {"num_features": 4},
            (2, 3, 3, 4),
            (2, 3, 3, 4),
        ),
        "layer_norm": (
            nnx.LayerNorm(6, rngs=r),
            {"scale": (4,), "bias": (4,)},
            {"num_features": 4},
            (2, 4),
            (2, 4),
        ),
        "rms_norm": (
            nnx.RMSNorm(6, rngs=r),
            {"scale": (4,)},
            {"num_features": 4},
            (2, 4),
            (2, 4),
        ),
        "instance_norm": (
            nnx.InstanceNorm(6, rngs=r),
            {"scale": (4,), "bias": (4,)},
            {"num_features": 4},
            (2, 3, 3, 4),
            (2, 3, 3, 4),
        ),
        "group_norm": (
            nnx.GroupNorm(8, num_groups=2, rngs=r),
            {"scale": (4,), "bias": (4,)},
            {"num_groups": 2, "group_size": 2},
            (2, 3, 3, 4),
            (2, 3, 3, 4),
        ),
        "embed": (
            nnx.Embed(10, 6, rngs=r),
            {"embedding": (10, 4)},
            {"num_embeddings": 10, "features": 4},
            "ids",
            (2, 4),
        ),
        "prelu": (nnx.PReLU(), {}, {}, (2, 4), (2, 4)),
        "attention": (
            nnx.MultiHeadAttention(4, 8, decode=False, rngs=r),
            {
                **{f"{n}/kernel": (8, 3, 2) for n in ("query", "key", "value")},
                **{f"{n}/bias": (3, 2) for n in ("query", "key", "value")},
                "out/kernel": (3, 2, 8),
            },
            {"num_heads": 3, "qkv_features": 6, "out_features": 8},
            (1, 5, 8),
            (1, 5, 8),
        ),
    }


@pytest.mark.parametrize("name", sorted(cases()))
def test_attributes_follow_the_shapes_and_the_layer_runs(name):
    layer, shapes, expected, x, out = cases()[name]
    small = cut(layer, shapes)
    assert {k: getattr(small, k) for k in expected} == expected
    arg = jax.ShapeDtypeStruct(*(((2,), jnp.int32) if x == "ids" else (x, jnp.float32)))
    graphdef, state = nnx.split(small)
    got = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, arg)
    assert got.shape == out


def test_whole_groups_need_the_count_from_the_caller():
    conv = nnx.Conv(8, 12, (1, 1), feature_group_count=4, rngs=nnx.Rngs(0))
    small = cut(conv, {"kernel": (1, 1, 2, 6), "bias": (6,)}, {"feature_group_count": 2})
    assert (small.in_features, small.out_features, small.feature_group_count) == (4, 6, 2)
    norm = nnx.GroupNorm(8, num_groups=4, rngs=nnx.Rngs(0))
    small = cut(norm, {"scale": (4,), "bias": (4,)}, {"num_groups": 2})
    assert (small.num_groups, small.group_size) == (2, 2)


def test_shapes_that_cannot_be_are_refused():
    conv = nnx.Conv(8, 12, (1, 1), feature_group_count=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layers/0: 7 output channels do not divide into 4"):
        cut(conv, {"kernel": (1, 1, 2, 7), "bias": (7,)})
    depthwise = nnx.Conv(6, 12, (3, 3), feature_group_count=6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiplier 2 cannot have 7"):
        cut(depthwise, {"kernel": (3, 3, 1, 7), "bias": (7,)})
    norm = nnx.GroupNorm(8, num_groups=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="6 channels do not divide into 4 normalization"):
        cut(norm, {"scale": (6,), "bias": (6,)})
    linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the rank must stay"):
        cut(linear, {"kernel": (6, 4, 1)})
    with pytest.raises(ValueError, match="dtype int32, expected float32"):
        surgery.rebuild(linear, {"bias": jnp.zeros(4, jnp.int32)})
    with pytest.raises(KeyError, match="Did you mean 'kernel'"):
        surgery.rebuild(linear, {"kernl": jnp.zeros((6, 4))})
    with pytest.raises(KeyError, match="no module at 'head'"):
        surgery.rebuild(linear, {}, static={"head": {"out_features": 3}})


class Scale(nnx.Module):
    """A user's layer that remembers its size."""

    def __init__(self, features):
        self.features = features
        self.weight = nnx.Param(jnp.ones(features))

    def __call__(self, x):
        return x * self.weight.reshape(1, self.features)


class Bare(nnx.Module):
    """A container with a bare parameter and a size of its own that nothing uses up."""

    def __init__(self, width):
        self.gain = nnx.Param(jnp.ones(width))
        self.linear = nnx.Linear(width, 3, rngs=nnx.Rngs(0))
        self.depth = 7


def test_unknown_layer_type_with_a_stale_attribute_is_refused_by_name_and_path():
    root = nnx.Sequential(Scale(5))
    with pytest.raises(ValueError, match=r"layer type Scale at 'layers/0'.*'features' = 5.*stale"):
        surgery.rebuild(root, {"layers/0/weight": leaf((3,))})


def test_registering_by_rule_or_by_declaration_makes_it_known():
    class ByRule(Scale):
        pass

    @surgery.register(ByRule)
    def _(layer, old):
        assert old == {"weight": (5,)}
        layer.features = layer.weight.shape[0]

    class Declared(Scale):
        pass

    surgery.register(Declared, attributes={"features": ("weight", 0)})
    for cls in (ByRule, Declared):
        small = surgery.rebuild(nnx.Sequential(cls(5)), {"layers/0/weight": leaf((3,))})
        assert small.layers[0].features == 3
        assert small(jnp.ones((2, 3))).shape == (2, 3)

    class Other(nnx.Module):
        pass

    with pytest.raises(ValueError, match="'Conv' is taken by flax"):
        surgery.register(Other, attributes={}, name="Conv")


def test_bare_parameters_and_containers_need_no_registration():
    small = surgery.rebuild(Bare(5), {"gain": leaf((4,)), "linear/kernel": leaf((4, 3))})
    assert small.gain.shape == (4,)
    assert small.linear.in_features == 4
    assert small.depth == 7


def test_result_shares_no_variable_with_the_input():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    before = snapshot(model)
    out = surgery.rebuild(model, {"layers/0/kernel": leaf((3, 4))})
    for variable in jax.tree.leaves(nnx.state(out), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        variable[...] = jnp.zeros_like(variable[...])
    out.layers[0].out_features = 99
    assert snapshot(model) == before


def test_works_on_abstract_models():
    model = nnx.eval_shape(lambda: nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    small = surgery.rebuild(model, {"kernel": jax.ShapeDtypeStruct((5, 4), jnp.float32)})
    assert small.in_features == 5
    assert isinstance(small.kernel.get_value(), jax.ShapeDtypeStruct)


def test_take_slices_concrete_abstract_and_traced_leaves():
    x = leaf((3, 4, 5))
    want = np.asarray(x)[:, [0, 2]][..., [1, 3, 4]]
    axes = {1: [0, 2], -1: [1, 3, 4]}
    np.testing.assert_array_equal(surgery.take(x, axes), want)
    np.testing.assert_array_equal(jax.jit(lambda x: surgery.take(x, axes))(x), want)
    assert surgery.take(jax.ShapeDtypeStruct((3, 4, 5), jnp.float32), axes).shape == want.shape
    assert isinstance(surgery.take(np.asarray(x), axes), np.ndarray)
