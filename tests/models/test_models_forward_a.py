"""Every classical, residual and dense architecture runs forward and backward at a small size."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import models_a_oracle as oracle
import models_small
import numpy as np
import pytest
from flax import nnx

from cnnjax import models, tree

SMALL = [
    *(row for row in models_small.CLASSICAL if row[0] != "plain_cnn"),
    (
        "highway_10",
        12,
        {"stages": ((4, 1, 3), (4, 1, 2)), "stage_dropout": (0.3, 0.5), "image_size": 12},
    ),
    ("preact_resnet200", 32, {"stages": (1, 1), "widths": (8, 16), "stem_width": 8}),
    ("rir_18_wide_projection", 8, {"stages": (1, 1), "width": 4}),
]
IDS = [row[0] for row in SMALL]
# one of each kind of unit; the others, alike, are slow
QUICK = (
    "lenet_5_1998",
    "vgg16_bn",
    "highway_10",
    "resnet50",
    "resnet1202_cifar",
    "preact_resnet110",
    "wrn_28_10",
    "ror_3_110",
    "rir_18_wide",
    "densenet_40_12",
    "ccnn_gender",
)
BACKWARD = [
    pytest.param(*row, id=row[0], marks=() if row[0] in QUICK else pytest.mark.slow)
    for row in SMALL
]


def build(name, fields, **more):
    """A small model with random values, its image channels and a batch of two."""
    fields = {"num_classes": 5, **fields, **more}
    model = models.create(name, rngs=nnx.Rngs(0), **fields)
    return oracle.fill(model)


def images(size, channels, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, size, size, channels)).astype(np.float32)


@pytest.mark.parametrize(("name", "size", "fields"), BACKWARD)
def test_every_parameter_has_a_finite_gradient(name, size, fields):
    channels = models.config(name).in_channels
    model = build(name, fields)
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, rest, x):
        def loss(params):
            m = nnx.merge(graphdef, params, rest, copy=True)
            logits, maps = m(x, return_features=True)
            return jnp.mean(jnp.square(logits - 1.0)), (logits, maps, nnx.state(m, nnx.BatchStat))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (logits, maps, stats)), grads = step(params, rest, images(size, channels))
    assert logits.shape == (2, 5)
    assert np.isfinite(loss)
    assert maps
    for name_of_map, value in maps.items():
        assert np.all(np.isfinite(value)), name_of_map
        assert value.shape[0] == 2
    for path, grad in tree.flatten(grads).items():
        assert np.all(np.isfinite(grad)), path
        assert np.any(np.asarray(grad) != 0), path
    # every batch norm has seen the batch
    before = tree.flatten(nnx.state(model, nnx.BatchStat))
    for path, value in tree.flatten(stats).items():
        assert not np.array_equal(value, before[path]), path


BFLOAT = [r for r in SMALL if r[0] in ("resnet1202_cifar", "densenet_40_12")]


def check_bfloat16(name, size, fields):
    channels = models.config(name).in_channels
    full, half = build(name, fields), build(name, fields, dtype="bfloat16")
    full.eval()
    half.eval()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(half, nnx.Param)))
    graphdefs = [nnx.split(m)[0] for m in (full, half)]
    state = nnx.split(full)[1]

    @jax.jit
    def both(state, x):
        return [nnx.merge(g, state)(x, return_features=True) for g in graphdefs]

    (want, _), (got, maps) = both(state, images(size, channels))
    assert got.dtype == jnp.float32
    assert all(m.dtype == jnp.bfloat16 for m in maps.values())
    scale = float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(got, want, atol=0.06 * scale)


@pytest.mark.parametrize(("name", "size", "fields"), BFLOAT, ids=[r[0] for r in BFLOAT])
def test_bfloat16_stays_near_float32(name, size, fields):
    check_bfloat16(name, size, fields)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "fields"), SMALL, ids=IDS)
def test_bfloat16_of_every_architecture(name, size, fields):
    check_bfloat16(name, size, fields)


REMAT = [
    ("resnet20_cifar", 8, {"blocks_per_stage": 1, "widths": (4, 8)}),
    ("stochastic_depth_1202", 8, {"blocks_per_stage": 4, "widths": (4, 8)}),
    ("densenet_40_12", 8, {"stages": (2, 1), "growth": 4, "dropout": 0.2}),
]


@pytest.mark.parametrize(("name", "size", "fields"), REMAT, ids=[r[0] for r in REMAT])
def test_remat_changes_neither_gradients_nor_statistics(name, size, fields):
    model, other = build(name, fields), build(name, fields, remat=True)
    x = images(size, 3)
    state = nnx.split(model, nnx.Param, ...)[1:]

    @jax.jit
    def both(state, x):
        out = []
        for m in (model, other):
            graphdef = nnx.split(m)[0]

            def loss(params, graphdef=graphdef):
                net = nnx.merge(graphdef, params, state[1], copy=True)
                return jnp.sum(jnp.square(net(x))), nnx.state(net, nnx.BatchStat)

            out.append(jax.grad(loss, has_aux=True)(state[0]))
        return out

    plain, remat = both(state, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), plain, remat)


def test_a_scanned_network_equals_the_unrolled_one():
    fields = {"num_classes": 5, "blocks_per_stage": 3, "widths": (4, 8)}
    plain = oracle.fill(models.create("resnet20_cifar", rngs=nnx.Rngs(0), **fields))
    scanned = models.create("resnet20_cifar", rngs=nnx.Rngs(0), scan=True, **fields)
    values = tree.flatten(nnx.state(plain, nnx.Any(nnx.Param, nnx.BatchStat)))

    def take(path, leaf):
        if "/repeated/" not in path:
            return values[path]
        head, tail = path.split("/1/repeated/")
        return np.stack([values[f"{head}/{i}/{tail}"] for i in (1, 2)])

    nnx.update(
        scanned, tree.map_with_path(take, nnx.state(scanned, nnx.Any(nnx.Param, nnx.BatchStat)))
    )
    outs = []
    for model in (plain, scanned):
        model.train()
        outs.append(nnx.jit(lambda m, x: m(x))(model, images(8, 3)))
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    a = plain.layer2[2].bn2.mean[...]
    b = scanned.layer2[1].repeated.bn2.mean[...][1]
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.method("resnet_cifar")
def test_1202_layers_compile_like_a_few():
    """The training step's program doesn't grow with the depth, and compiles in seconds."""

    def lowered(**fields):
        model = models.abstract("resnet1202_cifar", **fields)
        model.train()
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def step(params, rest, x):
            def loss(params):
                m = nnx.merge(graphdef, params, rest, copy=True)
                return jnp.mean(jnp.square(m(x))), nnx.state(m, nnx.BatchStat)

            return jax.grad(loss, has_aux=True)(params)

        x = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
        return jax.jit(step).lower(params, rest, x)

    deep, shallow = lowered(), lowered(blocks_per_stage=4)
    assert len(deep.as_text()) < 1.1 * len(shallow.as_text())
    begin = time.process_time()
    deep.compile()
    assert time.process_time() - begin < 60


@pytest.mark.parametrize(
    ("name", "fields", "shape", "message"),
    [
        ("resnet20_cifar", {}, (2, 32, 32, 1), "built for 3 input channels, got 1"),
        ("resnet20_cifar", {}, (32, 32, 3), r"takes images \(N, H, W, C\)"),
        ("resnet20_cifar", {}, (1, 3, 8, 3), "at least 4x4"),
        ("alexnet", {}, (1, 62, 62, 3), "at least 63x63"),
        ("lenet_5_caffe", {}, (1, 32, 32, 1), "built for 28x28 images, got 32x32"),
    ],
)
def test_bad_images_are_refused(name, fields, shape, message):
    model = models.abstract(name, **fields)
    with pytest.raises(ValueError, match=message):
        model(np.zeros(shape, np.float32))


def test_unknown_features_are_refused():
    model = models.create("lenet_300_100", rngs=nnx.Rngs(0), image_size=4)
    x = np.zeros((1, 4, 4, 1), np.float32)
    logits, maps = model(x, return_features="fc1")
    assert list(maps) == ["fc1"]
    assert maps["fc1"].shape == (1, 300)
    np.testing.assert_array_equal(logits, model(x))
    with pytest.raises(ValueError, match="no feature 'fc9' here. Did you mean"):
        model(x, return_features=("fc1", "fc9"))
