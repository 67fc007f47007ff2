"""Factorized networks: exact at full rank for every geometry, cheaper otherwise, save and load."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import factorization as f

pytestmark = pytest.mark.usefixtures("numpy_kernels")
KERNELS = [(1, 1), (3, 3), (5, 5), (7, 7), (1, 5)]
PADDINGS = ["SAME", "VALID", ((1, 2), (0, 1))]
RULES = {
    "basis": f.Basis(1.0, always=True),
    "spatial": f.Spatial(1.0, always=True),
    "tucker": f.Tucker2(1.0, always=True),
}


def conv(kernel, stride, dilation, padding, groups, bias, seed=0):
    layer = nnx.Conv(
        8,
        8,
        kernel,
        stride,
        padding=padding,
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=bias,
        rngs=nnx.Rngs(seed),
    )
    if bias:
        layer.bias[...] = jnp.arange(8.0)
    return layer


class Wrapped(nnx.Module):
    """One convolution inside a network."""

    def __init__(self, layer):
        self.conv = layer

    def __call__(self, x):
        return self.conv(x)


GRID = list(
    itertools.product(KERNELS, (1, 2), (1, 2), PADDINGS, (1, 2, 4), (True, False), (15, 14))
)


def check_exact(cases, rules):
    run = jax.jit(lambda g, s, x: nnx.merge(g, s)(x), static_argnums=0)
    for kernel, stride, dilation, padding, groups, bias, size in cases:
        model = Wrapped(conv(kernel, stride, dilation, padding, groups, bias))
        x = np.random.default_rng(0).normal(size=(1, size + 3, size, 8)).astype(np.float32)
        expected = np.asarray(run(*nnx.split(model), x))
        for name in rules:
            small = f.factorize(model, RULES[name])
            assert isinstance(small.conv, nnx.Sequential)
            got = np.asarray(run(*nnx.split(small), x))
            assert got.shape == expected.shape
            error = np.abs(got - expected).max() / np.abs(expected).max()
            assert error < 1e-5, (name, kernel, stride, dilation, padding, groups, bias, size)


@pytest.mark.method("chain_apply")
def test_replacement_is_exact_on_a_sample_of_the_grid():
    # 109 is prime: every value of every axis of the grid occurs
    check_exact(GRID[::109], RULES)


@pytest.mark.slow
@pytest.mark.method("chain_apply")
@pytest.mark.parametrize("rule", RULES)
def test_replacement_is_exact_on_the_whole_grid(rule):
    check_exact(GRID, [rule])


class Net(nnx.Module):
    """conv-BN-ReLU, a grouped convolution, a depthwise one, a dense head."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 16, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(16, rngs=rngs)
        self.blocks = nnx.List(
            [
                nnx.Conv(16, 32, (3, 3), 2, rngs=rngs),
                nnx.Conv(32, 32, (3, 3), feature_group_count=2, rngs=rngs),
                nnx.Conv(32, 32, (3, 3), feature_group_count=32, rngs=rngs),
            ]
        )
        self.head = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.head(x.mean((1, 2)))


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


EXAMPLE = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.float32)


def outputs(model, seed=0):
    x = np.random.default_rng(seed).normal(size=(2, 12, 12, 3)).astype(np.float32)
    model = nnx.view(model, use_running_average=True)
    return np.asarray(jax.jit(lambda g, s: nnx.merge(g, s)(x), static_argnums=0)(*nnx.split(model)))


@pytest.mark.method("one_shot_whole_network")
@pytest.mark.parametrize(
    "rule",
    [
        f.Basis(f.MacsRatio(0.5)),
        f.Spatial(f.MacsRatio(0.5)),
        f.Tucker2(f.MacsRatio(0.5)),
        f.CP(f.MacsRatio(0.3), iterations=5, restarts=1),
        f.CP(f.MacsRatio(0.3), solver="tpm", separable=False),
    ],
    ids=["basis", "spatial", "tucker", "cp4", "cp-tpm"],
)
def test_predicted_costs_equal_counted_ones(net, rule):
    before = {p: np.asarray(v) for p, v in cnnjax.tree.flatten(nnx.state(net)).items()}
    decided = f.plan(net, {"blocks/*": rule}, EXAMPLE)
    small = f.factorize(net, decided)
    by_path = {p.path: p for p in decided.layers}
    assert by_path["blocks/2"].kept == "depthwise"
    profile = cnnjax.profile(small, EXAMPLE)
    old = cnnjax.profile(net, EXAMPLE)
    saved = sum(p.macs[0] - p.macs[1] for p in decided.layers)
    assert old.macs - profile.macs == saved > 0
    gone = sum(p.params[0] - p.params[1] for p in decided.layers)
    assert old.params - profile.params == gone
    for path in ("blocks/0", "blocks/1"):
        macs = by_path[path].macs
        assert macs[1] <= rule.rank.ratio * macs[0]
    # no original kernel is left for a factorized layer, and the input model is untouched
    assert "blocks/0/kernel" not in cnnjax.tree.flatten(nnx.state(small))
    after = cnnjax.tree.flatten(nnx.state(net))
    assert all((before[p] == np.asarray(v)).all() for p, v in after.items())
    assert outputs(small).shape == (2, 32)


@pytest.mark.method("tucker2")
def test_ranks_by_energy_evbmf_and_shares(net):
    rules = {
        "blocks/0": f.Tucker2("evbmf", always=True),
        "blocks/1": f.Spatial(f.Energy(0.9)),
        "head": f.Basis(0.25),
        "stem": f.Basis(3),
    }
    decided = {p.path: p for p in f.plan(net, rules, EXAMPLE).layers}
    kernel = np.asarray(net.blocks[0].kernel[...])
    assert decided["blocks/0"].ranks == f.tucker2_ranks(kernel)
    assert decided["head"].ranks == (8,)
    assert decided["stem"].ranks == (3,)
    energies = []
    for block in np.split(np.asarray(net.blocks[1].kernel[...]), 2, axis=-1):
        s = np.linalg.svd(block.transpose(2, 0, 3, 1).reshape(48, 48), compute_uv=False)
        energies.append(int(np.argmax(np.cumsum(s**2) >= 0.9 * np.sum(s**2))) + 1)
    found = decided["blocks/1"]
    assert (
        found.ranks == (max(energies),) or found.kept == f"rank ({max(energies)},) is not cheaper"
    )


@pytest.mark.method("svd_dense")
def test_whole_network_at_full_rank_is_the_same(net):
    rules = {"head": f.Basis(1.0, always=True), "**": f.Tucker2(1.0, always=True)}
    same = f.factorize(net, rules, EXAMPLE)
    np.testing.assert_allclose(outputs(same), outputs(net), atol=1e-5)


@pytest.mark.method("iterative_layerwise_finetune")
def test_layer_by_layer_without_training_equals_one_shot(net):
    rule = f.Tucker2(0.5, always=True)
    one_shot = f.factorize(net, {"blocks/[01]": rule}, EXAMPLE)
    step = f.factorize(net, {"blocks/0": rule}, EXAMPLE)
    step = f.factorize(step, {"blocks/1": rule}, EXAMPLE)
    np.testing.assert_array_equal(outputs(step), outputs(one_shot))


def test_a_factorized_network_trains(net):
    small = f.factorize(net, {"blocks/0": f.CP(4, iterations=2, restarts=1)}, EXAMPLE)
    graphdef, params, rest = nnx.split(small, nnx.Param, ...)
    x = jnp.ones((2, 12, 12, 3))
    gradient = jax.jit(
        jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, rest, copy=True)(x) ** 2))
    )(params)
    flat = cnnjax.tree.flatten(gradient)
    assert "blocks/0/layers/3/kernel" in flat
    assert all(np.isfinite(g).all() for g in flat.values())


def test_bad_input(net):
    with pytest.raises(ValueError, match="'block/\\*' matches no convolution"):
        f.plan(net, {"block/*": f.Basis()}, EXAMPLE)
    with pytest.raises(ValueError, match="blocks/0: Basis rank is 0; expected 1 to 32"):
        f.plan(net, {"blocks/0": f.Basis(0)}, EXAMPLE)
    with pytest.raises(ValueError, match="rank is 33; expected 1 to 32"):
        f.plan(net, {"blocks/0": f.Basis(33)}, EXAMPLE)
    with pytest.raises(ValueError, match="needs example="):
        f.plan(net, {"blocks/0": f.Basis(f.MacsRatio(0.5))})
    assert f.plan(net, {"head": f.Basis(np.int64(3))}, EXAMPLE).layers[0].ranks == (3,)
    for make in (f.MacsRatio, f.Energy):
        with pytest.raises(ValueError, match=r"is 1.2; expected a share in \(0, 1\]"):
            make(1.2)
    with pytest.raises(ValueError, match="'vbmf'"):
        f.plan(net, {"blocks/0": f.Tucker2("vbmf")}, EXAMPLE)
    broken = nnx.clone(net)
    broken.stem.kernel[...] = broken.stem.kernel[...].at[0, 0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="kernel of stem of shape .* holds 1 non-finite"):
        f.plan(broken, {"stem": f.Basis(2)}, EXAMPLE)


def test_what_is_no_rule(net, as_user):
    for rules in ({"blocks/0": "basis"}, {"blocks/0": f.Basis}, "basis"):
        with pytest.raises(ValueError, match=r"expected a rule, e.g. Basis\(8\)"):
            f.plan(net, rules, EXAMPLE)


class Twins(nnx.Module):
    """Three convolutions of one shape."""

    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for conv in self.convs:
            x = conv(x)
        return x


@pytest.mark.method("cp4_conv")
@pytest.mark.parametrize("separable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_layers_of_one_shape_are_fitted_side_by_side(separable, monkeypatch):
    net = Twins(nnx.Rngs(0))
    for k, conv in enumerate(net.convs):
        conv.bias[...] = jnp.full(8, float(k))
    rule = f.CP(6, separable=separable, iterations=8, restarts=2)
    together = f.factorize(net, rule)
    monkeypatch.setattr(f.CP, "side_by_side", lambda *_: False)
    alone = f.factorize(net, rule)
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 8)).astype(np.float32)
    for a, b in zip(together.convs, alone.convs):
        assert [m.kernel.shape for m in a.layers] == [m.kernel.shape for m in b.layers]
        np.testing.assert_allclose(a(x), b(x), atol=2e-2)
