"""Units against direct NumPy transcriptions of their formulas (float64, evaluation mode)."""

from __future__ import annotations

import jax
import models_a_oracle as oracle
import models_b_oracle as direct
import numpy as np
import pytest
from flax import nnx

from cnnjax import models
from cnnjax.models import (
    blocks,
    densenet,
    highway,
    lenet_1998,
    preact,
    residual,
    rir,
    ror,
)

RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def run(module, *args):
    """The module's output in evaluation mode, compiled as a whole."""
    module.eval()
    graphdef, state = nnx.split(module)
    return jax.jit(lambda s, *a: nnx.merge(graphdef, s)(*a))(state, *args)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def kernel(layer):
    return layer.kernel[...]


def conv(x, layer, stride=1, pad=None, groups=1):
    pads = None if pad is None else ((pad, pad), (pad, pad))
    y = direct.conv(x, kernel(layer), stride, pads, groups)
    return y if layer.bias is None else y + np.asarray(layer.bias[...])


def bn_relu(x, bn):
    return direct.relu(direct.norm(np.asarray(x, np.float64), bn))


# --- functions ---


@pytest.mark.method("alexnet")
@pytest.mark.parametrize(("window", "k"), [(5, 2.0), (4, 1.0)])
def test_local_response_norm_is_its_formula(window, k):
    x = random(1, 2, 3, 9)
    want = np.empty_like(x, np.float64)
    for c in range(9):
        low, high = c - window // 2, c + window - window // 2
        part = x[..., max(0, low) : high].astype(np.float64)
        want[..., c] = x[..., c] / (k + 0.3 * np.sum(part**2, -1)) ** 0.75
    got = blocks.local_response_norm(x, window=window, alpha=0.3, beta=0.75, k=k)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 7), (3, 5), (10, 8)])
def test_adaptive_average_pool_has_torchs_bins(shape):
    x = random(1, *shape, 2)
    want = np.empty((1, 6, 6, 2))
    for i in range(6):
        for j in range(6):
            rows = slice(i * shape[0] // 6, -(-(i + 1) * shape[0] // 6))
            cols = slice(j * shape[1] // 6, -(-(j + 1) * shape[1] // 6))
            want[:, i, j] = x[:, rows, cols].mean((1, 2))
    got = jax.jit(lambda x: blocks.adaptive_avg_pool(x, 6))(x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "window", "stride", "pad", "out"),
    [(13, 3, 2, 0, 6), (26, 3, 2, 0, 13), (6, 3, 2, 1, 4), (5, 2, 2, 1, 3), (4, 1, 2, 0, 2)],
)
def test_ceil_pools_have_caffes_sizes(size, window, stride, pad, out):
    x = random(1, size, size, 1) - 5.0
    got = blocks.max_pool(x, window, stride, pad=pad, ceil=True)
    assert got.shape == (1, out, out, 1)
    # every window starts inside the padded image and sees at least one pixel
    for i in range(out):
        for j in range(out):
            a, b = i * stride - pad, j * stride - pad
            part = x[0, max(0, a) : a + window, max(0, b) : b + window, 0]
            assert got[0, i, j, 0] == part.max()


@pytest.mark.method("resnet_cifar")
def test_shortcut_a_subsamples_and_appends_zeros():
    x = random(1, 5, 5, 2)
    y = np.asarray(residual.shortcut_a(x, 5, 2))
    np.testing.assert_array_equal(y[..., :2], x[:, ::2, ::2])
    assert not y[..., 2:].any()
    both = np.asarray(residual.shortcut_a(x, 5, 2, zeros="both"))
    np.testing.assert_array_equal(both[..., 1:3], x[:, ::2, ::2])
    pooled = np.asarray(residual.shortcut_a(x[:, :4, :4], 3, 2, pool=True))
    close(pooled[..., :2], x[:, :4, :4].reshape(1, 2, 2, 2, 2, 2).mean((2, 4)))
    odd = np.asarray(residual.shortcut_a(x, 2, 2, pool=True))
    assert odd.shape == (1, 3, 3, 2)
    close(odd[0, 2, 0], x[0, 4, :2].mean(0))


# --- units ---


@pytest.mark.method("resnet_cifar")
@pytest.mark.parametrize("kind", ["A", "B"])
def test_basic_block(kind):
    unit = oracle.fill(residual.BasicBlock(3, 4, 2, shortcut=kind, rngs=nnx.Rngs(0)))
    x = random(2, 6, 6, 3)
    y = bn_relu(conv(x, unit.conv1, 2), unit.bn1)
    y = direct.norm(conv(y, unit.conv2), unit.bn2)
    if kind == "A":
        short = np.pad(x[:, ::2, ::2], ((0, 0),) * 3 + ((0, 1),))
    else:
        short = direct.unit(x, unit.downsample, 2)
    close(run(unit, x), direct.relu(short + y))


@pytest.mark.method("resnext50_32x4d")
@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
def test_grouped_bottleneck(stride_on):
    options = {"stride_on": stride_on, "groups": 2, "rngs": nnx.Rngs(0)}
    unit = oracle.fill(residual.Bottleneck(6, 4, 8, 2, **options))
    x = random(1, 7, 7, 6)
    first, second = (2, 1) if stride_on == "1x1" else (1, 2)
    y = bn_relu(conv(x, unit.conv1, first), unit.bn1)
    y = bn_relu(conv(y, unit.conv2, second, groups=2), unit.bn2)
    y = direct.norm(conv(y, unit.conv3), unit.bn3)
    close(run(unit, x), direct.relu(direct.unit(x, unit.downsample, 2) + y))


def branch(x, b, stride, deep):
    if b.leading:
        x = bn_relu(x, b.bn1)
    y = bn_relu(conv(x, b.conv1, stride), b.bn2)
    y = conv(y, b.conv2)
    return conv(bn_relu(y, b.bn3), b.conv3) if deep else y


@pytest.mark.method("preact_resnet")
@pytest.mark.method("multi_resnet")
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_preactivation_unit_shares_its_first_norm_where_the_width_changes(kind):
    options = {"kind": kind, "branches": 2, "rngs": nnx.Rngs(0)}
    unit = oracle.fill(preact.PreActUnit(4, 8, 2, **options))
    x = random(1, 6, 6, 4)
    h = bn_relu(x, unit.bn)
    total = sum(branch(h, b, 2, kind != "basic") for b in unit.body.branches)
    close(run(unit, x), conv(h, unit.projection, 2) + total)


@pytest.mark.method("multi_resnet")
def test_preactivation_branches_own_their_norms_elsewhere():
    unit = oracle.fill(preact.PreActUnit(8, 8, kind="bottleneck", branches=3, rngs=nnx.Rngs(0)))
    x = random(1, 5, 5, 8)
    close(run(unit, x), x + sum(branch(x, b, 1, True) for b in unit.body.branches))


@pytest.mark.method("rir")
@pytest.mark.parametrize("outer", [True, False])
def test_rir_block(outer):
    config = rir.RirConfig(outer_shortcut=outer)
    unit = oracle.fill(rir.RirBlock(3, 4, 2, config, rngs=nnx.Rngs(0)))
    r, t = random(1, 6, 6, 3), random(1, 6, 6, 3)
    want_r, want_t = r, t
    for layer, stride in ((unit.layer1, 1), (unit.layer2, 2)):
        short = want_r[:, ::stride, ::stride]
        short = np.pad(short, ((0, 0),) * 3 + ((0, 4 - short.shape[-1]),))
        new_r = conv(want_r, layer.conv_rr, stride) + conv(want_t, layer.conv_tr, stride) + short
        new_t = conv(want_r, layer.conv_rt, stride) + conv(want_t, layer.conv_tt, stride)
        want_r, want_t = bn_relu(new_r, layer.bn_r), bn_relu(new_t, layer.bn_t)
    if outer:
        want_r = want_r + np.pad(r[:, ::2, ::2], ((0, 0),) * 3 + ((0, 1),))
    got_r, got_t = run(unit, r, t)
    close(got_r, want_r)
    close(got_t, want_t)


@pytest.mark.method("highway")
def test_highway_layer_and_its_gate():
    layer = oracle.fill(highway.HighwayLayer(3, -2.0, dtype=None, rngs=nnx.Rngs(0)))
    x = random(2, 4, 4, 3)
    h = direct.relu(conv(x, layer.conv_h))
    t = 1 / (1 + np.exp(-conv(x, layer.conv_t)))
    close(run(layer, x), h * t + x * (1 - t))
    fresh = highway.HighwayLayer(3, -2.0, dtype=None, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(fresh.conv_t.bias[...], -2.0)
    np.testing.assert_array_equal(fresh.conv_h.bias[...], 0.0)


@pytest.mark.method("densenet121")
@pytest.mark.parametrize("bottleneck", [True, False])
def test_dense_layer_and_transition(bottleneck):
    config = densenet.DenseNetConfig(growth=2, bottleneck=bottleneck)
    layer = oracle.fill(densenet.DenseLayer(3, config, rngs=nnx.Rngs(0)))
    x = random(1, 4, 4, 3)
    y = conv(bn_relu(x, layer.bn1), layer.conv1) if bottleneck else x
    y = conv(bn_relu(y, layer.bn2), layer.conv2)
    close(run(layer, x), np.concatenate([x, y], -1))
    change = oracle.fill(densenet.Transition(3, 2, config, nnx.Rngs(0)))
    y = conv(bn_relu(x, change.bn), change.conv)
    close(run(change, x), y.reshape(1, 2, 2, 2, 2, 2).mean((2, 4)))


@pytest.mark.method("lenet_5")
def test_the_1998_partial_layer_equals_a_masked_dense_one():
    layer = oracle.fill(lenet_1998.PartialConv(pad=0, use_bias=True, rngs=nnx.Rngs(0)))
    x = random(2, 8, 8, 6)
    dense, bias = np.zeros((5, 5, 6, 16)), np.zeros(16)
    for maps, part in zip(layer.order, layer.parts, strict=True):
        for j, m in enumerate(maps):
            dense[:, :, list(lenet_1998.CONNECTIONS[m]), m] = part.kernel[...][..., j]
            bias[m] = part.bias[...][j]
    assert np.count_nonzero(dense) == 1500
    close(run(layer, x), direct.conv(x, dense, 1, ((0, 0), (0, 0))) + bias)


@pytest.mark.method("lenet_5")
def test_the_1998_table_subsampling_and_outputs():
    table = lenet_1998.CONNECTIONS
    assert [len(c) for c in table] == [3] * 6 + [4] * 9 + [6]
    assert table[4] == (4, 5, 0)
    assert table[11] == (5, 0, 1, 2)
    layer = oracle.fill(lenet_1998.Subsampling(3, rngs=nnx.Rngs(0)))
    x = random(1, 4, 4, 3)
    sums = x.reshape(1, 2, 2, 2, 2, 3).sum((2, 4))
    z = sums * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])
    close(run(layer, x), 1.7159 * np.tanh(2 * z / 3))
    net = oracle.fill(models.create("lenet_5_1998", rngs=nnx.Rngs(0)))
    logits, maps = nnx.jit(lambda m, x: m(x, return_features="f6"))(net, random(2, 32, 32, 1))
    codes = lenet_1998.codes(10)
    assert codes.shape == (10, 84)
    assert set(np.unique(codes)) == {-1.0, 1.0}
    assert len({tuple(c) for c in codes}) == 10
    distance = ((np.asarray(maps["f6"], np.float64)[:, None] - codes) ** 2).sum(-1)
    close(logits, -distance)


@pytest.mark.method("ror_3")
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ror_sums_its_level_shortcuts_in_each_stages_last_block(levels):
    net = oracle.fill(
        models.create(
            "ror_3_110",
            rngs=nnx.Rngs(0),
            blocks_per_stage=2,
            widths=(3, 4),
            levels=levels,
            num_classes=5,
        )
    )
    x = random(1, 6, 6, 3)
    h = first = bn_relu(conv(x, net.conv1), net.bn1)
    for i, stage in enumerate(net.stages):
        start = h
        for j, unit in enumerate(stage):
            stride = 2 if i and not j else 1
            y = bn_relu(conv(h, unit.conv1, stride), unit.bn1)
            y = direct.norm(conv(y, unit.conv2), unit.bn2)
            y = y + (direct.unit(h, unit.downsample, 2) if unit.project else h)
            if j == 1 and levels == 3:
                level = net.middles[i]
                y = y + direct.norm(conv(start, level.conv, 2 if i else 1), level.bn)
            if j == 1 and i == 1 and levels > 1:
                y = y + direct.norm(conv(first, net.root.conv, 2), net.root.bn)
            h = direct.relu(y)
    want = h.mean((1, 2)) @ np.asarray(net.fc.kernel[...]) + np.asarray(net.fc.bias[...])
    close(run(net, x), want)


@pytest.mark.method("ror_3")
def test_parameter_free_level_shortcut():
    config = ror.RorConfig(level_shortcut="A")
    level = ror.LevelShortcut(3, 5, 4, config, nnx.Rngs(0))
    x = random(1, 8, 8, 3)
    y = np.asarray(level(x))
    np.testing.assert_array_equal(y[..., :3], x[:, ::4, ::4])
    assert not y[..., 3:].any()


@pytest.mark.method("ccnn_gender")
@pytest.mark.method("cross_lenet_5")
@pytest.mark.parametrize(
    ("name", "size", "parts"),
    [("ccnn_gender", 16, ("s4", "s6")), ("cross_lenet_5", 32, ("s2", "s4", "c5"))],
)
def test_cross_connections_join_shallow_and_deep_maps(name, size, parts):
    net = oracle.fill(models.create(name, rngs=nnx.Rngs(0), image_size=size))
    graphdef, state = nnx.split(net)
    x = random(1, size, size, 1)
    _, maps = jax.jit(lambda s: nnx.merge(graphdef, s)(x, return_features=True))(state)
    joined = np.concatenate([np.asarray(maps[p]).reshape(1, -1) for p in parts], -1)
    np.testing.assert_array_equal(maps["joined"], joined)
    # the shallow maps are the plain chain's
    act = direct.relu if name == "ccnn_gender" else np.tanh
    pad = 2 if name == "ccnn_gender" else 0
    kind = "max" if name == "ccnn_gender" else "avg"
    h = direct.pool(act(conv(x, net.conv1, 1, pad)), 2, 2, ((0, 0), (0, 0)), kind)
    h = direct.pool(act(conv(h, net.conv3, 1, pad)), 2, 2, ((0, 0), (0, 0)), kind)
    close(maps["s4"], h)
