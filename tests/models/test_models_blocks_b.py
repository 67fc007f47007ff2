"""Blocks against NumPy transcriptions of their formulas (float64, direct loops over taps)."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import models_b_oracle as oracle
import numpy as np
import pytest
from flax import nnx

from cnnjax import models, ops
from cnnjax.models import (
    fractalnet,
    inception_blocks,
    inception_resnet,
    maxout_nin,
    mobilenet,
    nin,
    shufflenet,
    xception,
)


def _x(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _run(module, *args):
    graphdef, state = nnx.split(module)
    return np.asarray(jax.jit(lambda s, *a: nnx.merge(graphdef, s)(*a))(state, *args))


def _close(got, want, tol=1e-4):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol * max(1.0, np.abs(want).max()))


# --- mobile nets ----------------------------------------------------------------------------------


@pytest.mark.method("mobilenet_v2")
@pytest.mark.parametrize(
    ("stride", "expansion", "out", "padding"),
    [(1, 6, 8, "torch"), (2, 6, 8, "torch"), (1, 1, 16, "torch"), (2, 2, 16, "SAME")],
)
def test_inverted_residual(stride, expansion, out, padding):
    config = mobilenet.MobileNetConfig(padding=padding)
    block = mobilenet.InvertedResidual(config, 8, out, stride, expansion, rngs=nnx.Rngs(0))
    oracle.randomise(block)
    x = 3 * _x(2, 8, 6, 8)
    y = x if expansion == 1 else oracle.relu6(oracle.unit(x, block.expand))
    pads = oracle.same_pads((8, 6), (3, 3), stride) if padding == "SAME" else None
    width = 8 * expansion
    y = oracle.relu6(oracle.unit(y, block.depthwise, stride, pads, width))
    y = oracle.unit(y, block.project)  # linear
    assert (stride == 1 and out == 8) == block.residual
    _close(_run(block, x), x + y if block.residual else y)


@pytest.mark.method("mobilenet_v1")
def test_separable_unit():
    config = mobilenet.MobileNetConfig(activation="relu", padding="SAME")
    block = oracle.randomise(mobilenet.Separable(config, 6, 10, 2, rngs=nnx.Rngs(0)))
    x = _x(2, 8, 7, 6)
    pads = oracle.same_pads((8, 7), (3, 3), 2)
    y = oracle.relu(oracle.unit(x, block.depthwise, 2, pads, 6))
    _close(_run(block, x), oracle.relu(oracle.unit(y, block.pointwise)))


@pytest.mark.method("mobilenet_v2")
def test_channel_rounding():
    """max(8, floor((v + 4) / 8) 8), and 8 more where that is below 0.9 v."""
    for value in np.arange(1.0, 200.0, 0.7):
        nearest = max(8, int(np.floor((value + 4) / 8)) * 8)
        want = nearest + 8 if nearest < 0.9 * value else nearest
        assert mobilenet.round_channels(value) == want


@pytest.mark.method("shufflenet_v1")
@pytest.mark.parametrize(("groups", "stride"), list(itertools.product((1, 2, 3), (1, 2))))
def test_shuffle_unit(groups, stride):
    c_in = 24 if stride == 1 else 12
    unit = shufflenet.ShuffleUnit(c_in, 24, stride, groups, rngs=nnx.Rngs(0))
    oracle.randomise(unit)
    x = np.abs(_x(2, 6, 5, c_in))
    y = oracle.relu(oracle.unit(x, unit.reduce, groups=groups))
    shuffled = np.empty_like(y)
    per = 6 // groups
    for g, j in itertools.product(range(groups), range(per)):
        shuffled[..., j * groups + g] = y[..., g * per + j]
    y = oracle.unit(shuffled, unit.depthwise, stride, groups=6)
    y = oracle.unit(y, unit.expand, groups=groups)
    if stride == 1:
        want = oracle.relu(x + y)
    else:
        short = oracle.pool(x, 3, 2, ((1, 1), (1, 1)), "avg")
        want = oracle.relu(np.concatenate([short, y], axis=-1))
    _close(_run(unit, x), want)


# --- Inception family -----------------------------------------------------------------------------


@pytest.mark.method("inception_v3")
@pytest.mark.parametrize("count_pad", [False, True])
def test_inception_module_notation(count_pad):
    """Branch order, (height, width) of 1x7, splits, pads and what the average counts."""
    config = inception_blocks.InceptionConfig(count_include_pad=count_pad, bn_epsilon=1e-3)
    builder = inception_blocks.Builder(
        4, inception_blocks.unit_of(config), count_include_pad=count_pad, rngs=nnx.Rngs(0)
    )
    module = builder.add(("1x1 3", "1x1 2 -> {1x3 3, 3x1 2}", "1x5 2 -> 3x3 3", "avg3 -> 1x1 2"))
    assert builder.channels == 3 + 5 + 3 + 2
    oracle.randomise(module)
    x = _x(2, 6, 7, 4)
    a, b, c, d = module.branches
    act = lambda x, layer: oracle.relu(oracle.unit(x, layer))  # noqa: E731
    assert c.steps[0].conv.kernel.shape[:2] == (1, 5)
    inner = act(x, b.steps[0])
    one = ((1, 1), (1, 1))
    mean = oracle.pool(x, 3, 1, one, "avg" if count_pad else "avg_valid")
    want = [
        act(x, a),
        act(inner, b.steps[1].branches[0]),
        act(inner, b.steps[1].branches[1]),
        act(act(x, c.steps[0]), c.steps[1]),
        act(mean, d.steps[1]),
    ]
    _close(_run(module, x), np.concatenate(want, axis=-1))


@pytest.mark.method("inception_v2")
def test_strided_steps_pad_as_marked():
    config = inception_blocks.InceptionConfig()
    builder = inception_blocks.Builder(3, inception_blocks.unit_of(config), rngs=nnx.Rngs(0))
    module = builder.add(("3x3/2 S 4", "max3/2 S"))
    oracle.randomise(module)
    x = _x(1, 8, 6, 3) - 5.0  # all negative: zero padding of a max pool would show
    same = oracle.same_pads((8, 6), (3, 3), 2)
    assert same == ((0, 1), (0, 1))
    want = [
        oracle.relu(oracle.unit(x, module.branches[0], 2, same)),
        oracle.pool(x, 3, 2, same, "max"),
    ]
    _close(_run(module, x), np.concatenate(want, axis=-1))
    builder = inception_blocks.Builder(3, inception_blocks.unit_of(config), rngs=nnx.Rngs(0))
    valid = oracle.randomise(builder.add("3x3/2 V 4"))
    none = ((0, 0), (0, 0))
    _close(_run(valid, x), oracle.relu(oracle.unit(x, valid, 2, none)))
    with pytest.raises(ValueError, match="neither a convolution nor a pooling"):
        builder.add("3x3/2 Q 4")


@pytest.mark.method("googlenet")
@pytest.mark.parametrize("size", [7, 8])
def test_caffe_pools_round_up(size):
    pool = inception_blocks.Pool("max", 3, 2, "ceil", False)
    x = _x(1, size, size, 2)
    out = -(-(size - 3) // 2) + 1
    over = (out - 1) * 2 + 3 - size
    _close(_run(pool, x), oracle.pool(x, 3, 2, ((0, over), (0, over)), "max"))


@pytest.mark.method("googlenet")
def test_caffe_response_norm():
    """x / (1 + alpha / 5 * sum of squares over 5 channels)^0.75."""
    from cnnjax.models import googlenet

    x = 20 * _x(1, 2, 3, 9)
    want = np.empty_like(x, dtype=np.float64)
    for c in range(9):
        window = x[..., max(0, c - 2) : c + 3].astype(np.float64)
        want[..., c] = x[..., c] / (1 + 1e-4 / 5 * (window**2).sum(-1)) ** 0.75
    norm = googlenet.ResponseNorm()
    _close(np.asarray(norm(jnp.asarray(x))), want, 1e-5)
    # it is differentiated inside jit, along a random direction
    d = _x(1, 2, 3, 9, seed=1)
    slope = jax.jit(lambda x, d: jnp.vdot(jax.grad(lambda x: jnp.sum(jnp.sin(norm(x))))(x), d))
    ends = [float(jnp.sum(jnp.sin(norm(jnp.asarray(x + s * d))))) for s in (1e-2, -1e-2)]
    np.testing.assert_allclose(slope(x, d), (ends[0] - ends[1]) / 2e-2, rtol=5e-3)


@pytest.mark.method("inception_resnet_v2")
@pytest.mark.parametrize("relu", [True, False])
def test_scaled_residual(relu):
    config = inception_blocks.InceptionConfig()
    builder = inception_blocks.Builder(5, inception_blocks.unit_of(config), rngs=nnx.Rngs(0))
    branches, inner = builder.branches(("1x1 3", "1x1 2 -> 1x3 2 -> 3x1 4"))
    assert (inner, builder.channels) == (7, 5)
    block = inception_resnet.ResidualBlock(
        branches, inner, 5, scale=0.17, relu=relu, rngs=nnx.Rngs(0)
    )
    oracle.randomise(block)
    x = _x(2, 5, 4, 5)
    act = lambda x, layer: oracle.relu(oracle.unit(x, layer))  # noqa: E731
    second = x
    for step in branches.branches[1].steps:
        second = act(second, step)
    joined = np.concatenate([act(x, branches.branches[0]), second], axis=-1)
    up = oracle.conv(joined, block.up.kernel[...]) + np.asarray(block.up.bias[...])
    want = x + 0.17 * up
    _close(_run(block, x), oracle.relu(want) if relu else want)


@pytest.mark.method("xception")
@pytest.mark.parametrize(
    ("stride", "first_relu", "padding"), [(2, True, "SAME"), (2, False, "torch"), (1, True, "SAME")]
)
def test_xception_block(stride, first_relu, padding):
    config = xception.XceptionConfig(padding=padding)
    widths = (6, 8) if stride == 2 else (4, 4, 4)
    block = xception.XceptionBlock(
        config, 4, widths, stride=stride, first_relu=first_relu, rngs=nnx.Rngs(0)
    )
    oracle.randomise(block)
    x = _x(2, 8, 8, 4)
    y = x
    for i, unit in enumerate(block.units):
        y = y if i == 0 and not first_relu else oracle.relu(y)
        channels = y.shape[-1]
        y = oracle.conv(y, unit.depthwise.kernel[...], groups=channels)
        y = oracle.norm(oracle.conv(y, unit.pointwise.kernel[...]), unit.bn)
    if stride == 2:
        pads = ((0, 1), (0, 1)) if padding == "SAME" else ((1, 1), (1, 1))
        y = oracle.pool(y, 3, 2, pads, "max")
        none = ((0, 0), (0, 0))
        want = y + oracle.unit(x, block.shortcut, 2, none)
    else:
        want = x + y
    _close(_run(block, x), want)


# --- NiN family -----------------------------------------------------------------------------------


@pytest.mark.method("cic")
@pytest.mark.parametrize(("features", "window", "size"), [(8, 5, 1), (12, 3, 3), (16, 12, 1)])
def test_window_layer_is_a_masked_dense_convolution(features, window, size):
    layer = nin.WindowConv(12, features, window, size, rngs=nnx.Rngs(0))
    oracle.randomise(layer)
    kernel = np.asarray(layer.conv.kernel[...])
    assert kernel.shape == (size, size, window, features)
    dense = np.zeros((size, size, 12, features))
    for o in range(features):
        # Python rounds half to even, the library half up: compare starts to within that
        start = layer.starts[o]
        assert abs(start - o * (12 - window) / max(1, features - 1)) <= 0.5
        dense[:, :, start : start + window, o] = kernel[..., o]
    x = _x(2, 5, 6, 12)
    _close(_run(layer, x), oracle.conv(x, dense) + np.asarray(layer.conv.bias[...]))


@pytest.mark.method("cic")
def test_windows_slide_by_one_where_the_widths_fit():
    assert nin.window_starts(20, 16, 5) == tuple(range(16))
    starts = nin.window_starts(192, 160, 9)
    assert starts[0] == 0
    assert starts[-1] == 192 - 9
    assert all(0 <= b - a <= 2 for a, b in itertools.pairwise(starts))
    with pytest.raises(ValueError, match="wider than the 4 input"):
        nin.window_starts(4, 3, 5)


@pytest.mark.method("cic")
def test_window_layer_holds_no_dense_kernel():
    """Truly sparse: neither parameters nor multiply-adds of the masked weights."""
    layer = nin.WindowConv(64, 48, 5, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    jaxpr = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, jnp.zeros((1, 4, 4, 64)))
    assert oracle.count_macs(jaxpr.jaxpr) == 4 * 4 * 48 * 5
    assert sum(v.size for v in jax.tree.leaves(state)) == 48 * 5 + 48


@pytest.mark.method("maxout_nin")
def test_maxout_takes_consecutive_maps():
    x, ct = _x(2, 3, 3, 20), _x(2, 3, 3, 4)
    x[..., 7] = x[..., 8] = 9.0  # a tie: the first
    y, pull = jax.vjp(lambda x: ops.maxout(x, 5), jnp.asarray(x))
    groups = [x[..., u * 5 : u * 5 + 5] for u in range(4)]
    np.testing.assert_array_equal(y, np.stack([g.max(-1) for g in groups], axis=-1))
    first = np.stack([np.eye(5)[g.argmax(-1)] for g in groups], axis=-2)
    np.testing.assert_array_equal(pull(ct)[0], (ct[..., None] * first).reshape(x.shape))
    t = _x(2, 3, 3, 20)
    tangent = jax.jvp(lambda x: ops.maxout(x, 5), (jnp.asarray(x),), (t,))[1]
    np.testing.assert_array_equal(tangent, (t.reshape(*t.shape[:-1], 4, 5) * first).sum(-1))
    # not shared by a count of equal entries, which may be none, and then 0 / 0
    program = str(jax.make_jaxpr(pull)(jnp.asarray(ct)))
    assert " div " not in program
    with pytest.raises(ValueError, match="3 pieces don't divide 20"):
        ops.maxout(jnp.asarray(x), 3)


@pytest.mark.method("maxout_nin")
def test_maxout_mlp():
    block = maxout_nin.MaxoutMlp(4, (6, 5, 3), 3, 2, dtype=None, rngs=nnx.Rngs(0))
    oracle.randomise(block)
    x = _x(2, 5, 5, 4)

    def unit(x, layer):
        bias = np.asarray(layer.conv.bias[...])
        return oracle.norm(oracle.conv(x, layer.conv.kernel[...]) + bias, layer.bn)

    y = unit(x, block.conv)  # no activation
    for layer in (block.mlp1, block.mlp2):
        z = unit(y, layer)
        y = np.maximum(z[..., 0::2], z[..., 1::2])
    assert block.conv.bn.epsilon == 1e-4
    _close(_run(block, x), y)


@pytest.mark.parametrize(("name", "norm"), [("nin_cifar", False), ("mpnin", True)])
def test_nin_forward(name, norm):
    """The whole network, its pools rounding up and the average leaving the overhang out."""
    model = models.create(name, num_classes=3, rngs=nnx.Rngs(0))
    oracle.randomise(model)
    x = _x(1, 8, 8, 3)
    y = x
    for i, mlp in enumerate(model.mlps):
        for unit in mlp.units:
            y = oracle.conv(y, unit.conv.kernel[...]) + np.asarray(unit.conv.bias[...])
            y = oracle.relu(oracle.norm(y, unit.bn) if norm else y)
        if i < 2:
            kind = "max" if i == 0 else "avg_valid"
            y = oracle.pool(y, 3, 2, ((0, 1), (0, 1)), kind)
    _close(_run(model, x), y.mean((1, 2)))


# --- FractalNet -----------------------------------------------------------------------------------


def _recursive(columns, z, unit):
    """f_{C+1}(z) = join(f_C(f_C(z)), conv(z)): the outputs that meet in f_C's join, unjoined."""
    count = len(columns)
    if count == 1:
        return [unit(z, next(columns[0]))]
    inner = np.mean(_recursive(columns[:-1], z, unit), axis=0)
    return [*_recursive(columns[:-1], inner, unit), unit(z, next(columns[-1]))]


@pytest.mark.method("fractalnet")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fractal_block_is_the_recursion(count):
    block = fractalnet.FractalBlock(3, 4, count, 0.15, dropout=0.1, rngs=nnx.Rngs(0))
    oracle.randomise(block)
    assert [len(c) for c in block.columns] == [2 ** (count - 1 - j) for j in range(count)]
    x = _x(2, 4, 4, 3)
    columns = [iter(list(c)) for c in block.columns]
    want = np.mean(_recursive(columns, x, lambda z, u: oracle.relu(oracle.unit(z, u))), axis=0)
    _close(_run(block, x), want)


@pytest.mark.method("fractalnet")
def test_drop_path_masks():
    """Local: rate p, never empty; exact survivor distribution. Global: the drawn column alone."""
    batch, rate = 20_000, 0.15
    whole = jnp.arange(batch) >= batch // 2
    column = jax.random.randint(jax.random.key(1), (batch,), 0, 3)
    mask = np.asarray(
        jax.jit(lambda k: fractalnet.join_mask(k, (0, 1, 2), rate, column, whole))(
            jax.random.key(0)
        )
    )
    local, chosen = mask[:, : batch // 2], mask[:, batch // 2 :]
    assert local.sum(0).min() >= 1
    # P(input lives) = (1 - p) + p^J / J
    expected = 1 - rate + rate**3 / 3
    assert np.abs(local.mean(1) - expected).max() < 4 * np.sqrt(0.15 * 0.85 / (batch // 2))
    np.testing.assert_array_equal(chosen.sum(0), 1)
    np.testing.assert_array_equal(chosen.argmax(0), np.asarray(column)[batch // 2 :])
    # a join that the global column doesn't take part in keeps all
    pair = np.asarray(fractalnet.join_mask(jax.random.key(2), (0, 1), rate, column, whole))
    absent = np.asarray(column)[batch // 2 :] == 2
    np.testing.assert_array_equal(pair[:, batch // 2 :][:, absent], 1)


@pytest.mark.method("fractalnet")
def test_join_divides_by_the_survivors():
    a, b, c = (_x(4, 2, 2, 3, seed=s) for s in range(3))
    mask = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]], np.float32)
    b[0] = np.inf  # dropped there: must not spread
    got = np.asarray(fractalnet.join([jnp.asarray(v) for v in (a, b, c)], jnp.asarray(mask)))
    want = np.stack([a[0], (a[1] + b[1]) / 2, b[2], (a[3] + b[3] + c[3]) / 3])
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.method("fractalnet")
def test_global_drop_path_is_one_column_of_the_whole_network():
    model = models.create(
        "fractalnet_cifar", widths=(4, 6), dropout=(), num_classes=5, drop_path=0.3,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    oracle.randomise(model)
    x = _x(12, 8, 8, 3)

    @jax.jit
    def run(state):
        model = nnx.merge(graphdef, state)
        singles = [model.single_column(x, j) for j in range(3)]
        plain = model(x)
        model.drop_path.deterministic = False
        column = nnx.clone(model).drop_path(12)["column"]
        return singles, plain, model(x), column

    graphdef, state = nnx.split(model)
    singles, plain, dropped, column = run(state)
    assert len(np.unique(np.asarray(column)[6:])) > 1
    want = np.stack([np.asarray(singles[c])[i] for i, c in enumerate(np.asarray(column))])
    np.testing.assert_allclose(np.asarray(dropped)[6:], want[6:], rtol=1e-4, atol=1e-5)
    # the local half mixes paths: neither the plain mean nor one column for all of them
    assert np.abs(np.asarray(dropped)[:6] - np.asarray(plain)[:6]).max() > 1e-3
    np.testing.assert_array_equal(np.asarray(run(state)[1]), np.asarray(plain))
    with pytest.raises(ValueError, match=r"column must be in 0 \.\.\. 2"):
        model.single_column(x, 3)
