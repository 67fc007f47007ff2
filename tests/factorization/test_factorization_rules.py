"""Rules of whole-kernel Tucker, transforms, learned and clustered filters, predicted parameters."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from flax import nnx

import cnnjax
from cnnjax import factorization as f
from cnnjax import pruning, surgery

pytestmark = pytest.mark.usefixtures("numpy_kernels")
FULL = {
    "tucker": f.Tucker(1.0, always=True),
    "dct": f.SeparableTransform(1.0, always=True),
    "haar": f.SeparableTransform(1.0, transform="haar", always=True),
    "filters": f.SeparableFilters(1.0, always=True),
    "biclustered": f.Biclustered(1.0, always=True),
    "predicted": f.Predicted(1.0, damping=1e-6, scale=0.5, always=True),
}
# exact on a few geometries in test_factorization_named.py, here on the whole grid
NAMED = {
    name: f.make_rule(name, 1.0, always=True)
    for name in ("dual_basis", "tensor_train", "asymmetric_3d", "jaderberg_scheme1")
}
SIZES = {"haar": (2, 4), "predicted": (3, 3)}  # Haar needs even kernels; tap prediction some taps
GRID = list(
    itertools.product(
        (None, (1, 1), (1, 3), (5, 5)),
        (1, 2),
        (1, 2),
        ("SAME", "VALID", ((1, 2), (0, 1))),
        (1, 2),
        (True, False),
        (15, 14),
    )
)


class Wrapped(nnx.Module):
    """One layer inside a network."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


def conv(kernel, inputs=8, outputs=8, **options):
    layer = nnx.Conv(inputs, outputs, kernel, rngs=nnx.Rngs(0), **options)
    if layer.bias is not None:
        layer.bias[...] = jnp.arange(float(outputs))
    return layer


def with_kernel(kernel, **options):
    kh, kw, i, o = np.shape(kernel)
    layer = conv((kh, kw), i, o, **options)
    layer.kernel[...] = jnp.asarray(kernel, jnp.float32)
    return Wrapped(layer)


def check_exact(name, cases):
    run = jax.jit(lambda g, s, x: nnx.merge(g, s)(x), static_argnums=0)
    for size, stride, dilation, padding, groups, bias, n in cases:
        kernel = SIZES.get(name, (3, 3)) if size is None else size
        if name in ("haar", "predicted") and size is not None:
            continue
        groups = 1 if name in ("biclustered", "jaderberg_scheme1") else groups
        model = Wrapped(
            conv(
                kernel,
                strides=stride,
                kernel_dilation=dilation,
                padding=padding,
                feature_group_count=groups,
                use_bias=bias,
            )
        )
        x = np.random.default_rng(0).normal(size=(1, n + 3, n, 8)).astype(np.float32)
        expected = np.asarray(run(*nnx.split(model), x))
        small = f.factorize(model, (FULL | NAMED)[name])
        assert isinstance(small.layer, nnx.Sequential)
        got = np.asarray(run(*nnx.split(small), x))
        assert got.shape == expected.shape
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error < 1e-5, (name, kernel, stride, dilation, padding, groups, bias, n, error)


@pytest.mark.method("tucker_hooi")
@pytest.mark.method("separable_transform")
@pytest.mark.method("learn_separable_filters")
@pytest.mark.method("biclustered_low_rank")
@pytest.mark.method("predict_parameters")
@pytest.mark.parametrize("name", FULL)
def test_full_rank_is_the_same_layer(name):
    check_exact(name, [(None, 2, 1, ((1, 2), (0, 1)), 2, True, 14), (None, 1, 2, "SAME", 1, 0, 15)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FULL, *NAMED])
def test_full_rank_on_the_whole_grid(name):
    check_exact(name, GRID)


def composed(model, rule, example=None):
    """The kernel that the replacement of ``layer`` computes, and the replacement."""
    small = f.factorize(model, {"layer": rule}, example)
    kernel = model.layer.kernel
    kh, kw, i, _ = kernel.shape
    x = np.zeros((i, 2 * kh - 1, 2 * kw - 1, i), np.float32)
    x[np.arange(i), kh - 1, kw - 1, np.arange(i)] = 1
    bias = 0 if model.layer.bias is None else np.asarray(model.layer.bias[...])
    y = np.asarray(jax.jit(lambda g, s: nnx.merge(g, s)(x), static_argnums=0)(*nnx.split(small)))
    y = y - bias
    return y[:, ::-1, ::-1].transpose(1, 2, 0, 3), small


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.method("tucker_hooi")
def test_tucker_layer_is_the_decomposition():
    kernel = normal(3, 3, 8, 6).astype(np.float32)
    model = with_kernel(kernel, padding="VALID")
    ranks = (2, 1, 4, 3)
    # few sweeps: neither stops before the other by the last digits of its own program
    got, _ = composed(model, f.Tucker(ranks, sweeps=5, always=True))
    core, factors = f.tucker_hooi(kernel, ranks, sweeps=5)
    core, *u = (np.asarray(a, np.float64) for a in (core, *factors))
    np.testing.assert_allclose(got, np.einsum("pqrs,ap,bq,ir,os->abio", core, *u), atol=1e-4)
    # planted multilinear ranks come back whole
    planted = np.einsum(
        "pqrs,ap,bq,ir,os->abio",
        normal(2, 2, 3, 4),
        *(normal(n, r, seed=n + r) for n, r in ((3, 2), (3, 2), (8, 3), (6, 4))),
    )
    got, _ = composed(
        with_kernel(planted, padding="VALID"), f.Tucker((2, 2, 3, 4), sweeps=30, always=True)
    )
    np.testing.assert_allclose(got, planted, atol=1e-4 * np.abs(planted).max())


@pytest.mark.method("separable_transform")
def test_dct_layer_keeps_the_low_frequencies():
    kernel = normal(4, 3, 5, 6)
    got, small = composed(with_kernel(kernel, padding="VALID"), f.SeparableTransform((2, 3)))
    coefficients = scipy.fft.dctn(kernel, axes=(0, 1), norm="ortho")
    coefficients[2:] = 0
    np.testing.assert_allclose(
        got, scipy.fft.idctn(coefficients, axes=(0, 1), norm="ortho"), atol=1e-5
    )
    # the transform is given: only the mix and the bias are trained
    trained = cnnjax.tree.flatten(nnx.state(small, nnx.Param))
    assert sorted(trained) == ["layer/layers/2/bias", "layer/layers/2/kernel"]
    with pytest.raises(ValueError, match="even"):
        f.factorize(with_kernel(kernel), f.SeparableTransform(2, transform="haar"))


@pytest.mark.method("learn_separable_filters")
def test_learned_filters_find_planted_ones():
    v, h = normal(3, 5), normal(3, 5, seed=1)
    kernel = np.einsum("ma,mb,mio->abio", v, h, normal(3, 6, 7, seed=2))
    rule = f.SeparableFilters(3, steps=1500)
    got, small = composed(with_kernel(kernel, padding="VALID"), rule)
    assert np.linalg.norm(got - kernel) < 2e-3 * np.linalg.norm(kernel)
    vertical = np.asarray(small.layer.layers[0].kernel[...])[:, 0, 0]
    assert vertical.shape == (5, 6 * 3)
    # every input has the same three filters
    np.testing.assert_array_equal(vertical.reshape(5, 6, 3)[:, :1].repeat(6, 1).reshape(5, 18),
                                  vertical)  # fmt: skip


@pytest.mark.method("monochromatic_conv")
def test_monochromatic_layer_of_planted_colours():
    g = np.random.default_rng(0)
    colours = np.abs(g.standard_normal((4, 3)))
    spatial = g.standard_normal((3, 3, 16))
    kernel = np.einsum("abo,oi->abio", spatial, colours[g.permutation(np.arange(16) % 4)])
    got, small = composed(with_kernel(kernel, padding="VALID"), f.Monochromatic(4))
    np.testing.assert_allclose(got, kernel, atol=1e-5)
    kinds = [type(m).__name__ for m in small.layer.layers]
    assert kinds == ["Conv", "Conv", "Reorder"]
    assert small.layer.layers[1].feature_group_count == 4
    with pytest.raises(ValueError, match="16 outputs do not divide into 5"):
        f.factorize(with_kernel(kernel), f.Monochromatic(5))
    decided = f.plan(with_kernel(kernel), f.Monochromatic(0.4, always=True))
    assert decided.layers[0].ranks == (4,)  # 6 does not divide 16


@pytest.mark.method("biclustered_low_rank")
def test_biclustered_layer_of_planted_blocks():
    g = np.random.default_rng(1)
    labels_in, labels_out = g.permutation(8) % 2, g.permutation(12) % 2
    # each block has input and output rank 2; clusters share a mean that tells them apart
    kernel = np.zeros((3, 3, 8, 12))
    for a, b in itertools.product((0, 1), (0, 1)):
        rows, columns = np.flatnonzero(labels_in == a), np.flatnonzero(labels_out == b)
        u = np.stack([np.ones(4), 0.1 * g.standard_normal(4)], 1)
        w = np.stack([np.ones(6), 0.1 * g.standard_normal(6)], 1)
        core = g.standard_normal((3, 3, 2, 2))
        kernel[:, :, rows[:, None], columns] = np.einsum("xypq,ip,oq->xyio", core, u, w)
    got, small = composed(with_kernel(kernel, padding="VALID"), f.Biclustered(2, clusters=(2, 2)))
    np.testing.assert_allclose(got, kernel, atol=1e-4)
    assert [getattr(m, "feature_group_count", 0) for m in small.layer.layers] == [0, 2, 4, 0, 2, 0]
    # one block is plain Tucker-2
    noise = with_kernel(normal(3, 3, 8, 12), padding="VALID")
    one, _ = composed(noise, f.Biclustered((3, 4), clusters=(1, 1)))
    plain, _ = composed(noise, f.Tucker2((3, 4)))
    np.testing.assert_allclose(one, plain, atol=1e-4)
    with pytest.raises(ValueError, match="8 inputs do not divide into 3"):
        f.factorize(noise, f.Biclustered(1, clusters=(3, 2)))


@pytest.mark.method("predict_parameters")
def test_predicted_taps_are_gated_by_smoothness():
    places = np.stack(np.mgrid[:7, :7], -1).reshape(-1, 2)
    alike = np.exp(-((places[:, None] - places[None]) ** 2).sum(-1) / (2 * 2.0**2))
    smooth = np.linalg.cholesky(alike + 1e-9 * np.eye(49)) @ normal(49, 8 * 8)
    rule = f.Predicted(16, scale=2.0)
    kernel = smooth.reshape(7, 7, 8, 8)
    got, small = composed(with_kernel(kernel, padding="VALID"), rule)
    assert np.linalg.norm(got - kernel) < 0.15 * np.linalg.norm(kernel)
    assert sorted(cnnjax.tree.flatten(nnx.state(small, nnx.Param))) == [
        "layer/layers/1/bias",
        "layer/layers/1/kernel",
    ]
    noise = with_kernel(normal(7, 7, 8, 8))
    assert "not smooth" in f.plan(noise, rule).layers[0].kept
    assert f.plan(noise, f.Predicted(16, scale=2.0, always=True)).layers[0].kept is None


def replayed(model, small):
    """What an archive does: the record's edits on the abstract original, then the numbers."""
    again = surgery.replay(surgery.abstract(model), surgery.edits_of(small))
    return surgery.fill(again, surgery.leaves(small))


class Dense(nnx.Module):
    """A hidden dense layer and a head."""

    def __init__(self, inputs, rngs):
        self.hidden, self.head = nnx.Linear(inputs, 24, rngs=rngs), nnx.Linear(24, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))


@pytest.mark.method("predict_parameters")
@pytest.mark.parametrize("groups", [1, 3])
def test_predicted_dense_layers(groups):
    model = Dense(16, nnx.Rngs(0))
    x = normal(64, 3).astype(np.float32) @ normal(3, 16, seed=1).astype(np.float32)
    rule = f.Predicted(4, kernel="covariance", groups=groups, damping=1e-6)
    decided = f.plan(model, {"hidden": rule}, x[:1])
    with pytest.raises(ValueError, match="with_input_covariances"):
        f.factorize(model, decided)
    decided = f.with_input_covariances(model, decided, [x[:40], x[40:]])
    measured = np.asarray(decided.layers[0].rule.covariance)
    np.testing.assert_allclose(measured, x.T @ x, rtol=1e-4)
    small = f.factorize(model, decided)
    # inputs of rank 3: four rows say everything about the answers
    np.testing.assert_allclose(small(x), model(x), atol=1e-2 * np.abs(model(x)).max())
    before, after = cnnjax.profile(model, x[:1]), cnnjax.profile(small, x[:1])
    entry = decided.layers[0]
    assert before.params - after.params == entry.params[0] - entry.params[1] == (16 - 4) * 24
    assert before.macs - after.macs == entry.macs[0] - entry.macs[1]
    np.testing.assert_array_equal(replayed(model, small)(x), small(x))
    with pytest.raises(ValueError, match="grid"):
        f.factorize(model, {"head": f.Predicted(2, grid=(5, 5), always=True)})


NET = {
    "a": f.Monochromatic(4),
    "b": f.Biclustered(2),
    "c": f.SeparableTransform(2),
    "d": f.Tucker((2, 2, 4, 4)),
    "e": f.SeparableFilters(2, steps=20),
}


class Net(nnx.Module):
    """Five convolutions and a head."""

    def __init__(self, rngs):
        for name, inputs in zip("abcde", (3, 8, 8, 8, 8)):
            setattr(self, name, nnx.Conv(inputs, 8, (3, 3), rngs=rngs))
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        for name in "abcde":
            x = nnx.relu(getattr(self, name)(x))
        return self.head(x.mean((1, 2)))


@pytest.mark.method("separable_transform")
def test_costs_saving_training_and_shrinking():
    net = Net(nnx.Rngs(0))
    example = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    decided = f.plan(net, NET, example)
    small = f.factorize(net, decided)
    assert all(p.ranks for p in decided.layers)
    before, after = cnnjax.profile(net, example), cnnjax.profile(small, example)
    assert before.params - after.params == sum(p.params[0] - p.params[1] for p in decided.layers)
    assert before.macs - after.macs == sum(p.macs[0] - p.macs[1] for p in decided.layers)
    run = jax.jit(lambda g, s, x: nnx.merge(g, s)(x), static_argnums=0)
    x = normal(2, 8, 8, 3).astype(np.float32)
    again = replayed(net, small)
    np.testing.assert_array_equal(run(*nnx.split(again), x), run(*nnx.split(small), x))
    assert isinstance(again.c.layers[0].kernel, f.Fixed)
    graphdef, params, rest = nnx.split(small, nnx.Param, ...)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, rest, copy=True)(x) ** 2)))
    sizes = [float(jnp.abs(g).max()) for g in jax.tree.leaves(grads(params))]
    assert min(sizes) > 0
    # what a reordering touches stays whole, the rest can be cut
    graph = cnnjax.graph.trace(small, x)
    keep = pruning.select_channels(
        graph, pruning.importance.l1(nnx.state(small, nnx.Param)), ratio=0.5
    )
    cut = pruning.shrink(small, graph, keep)
    assert cnnjax.profile(cut, example).params < after.params
    assert np.isfinite(np.asarray(run(*nnx.split(cut), x))).all()
