"""Net2Net: same outputs, the paper's formulas, gradients as the oracle of the optimizer's state."""

from __future__ import annotations

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cnnjax
from cnnjax import distillation as D
from cnnjax import graph as G
from cnnjax import surgery, tree
from cnnjax.distillation import growth
from cnnjax.graph.tracing import evaluation_mode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "graph"))
import graph_zoo as zoo


class Net(nnx.Module):
    """conv-BN-ReLU-conv(stride 2)-BN-ReLU-flatten-dense."""

    def __init__(self, *, dtype=jnp.float32, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), param_dtype=dtype, rngs=rngs)
        self.bn1 = nnx.BatchNorm(8, param_dtype=dtype, rngs=rngs)
        self.conv2 = nnx.Conv(8, 6, (3, 3), strides=2, param_dtype=dtype, rngs=rngs)
        self.bn2 = nnx.BatchNorm(6, param_dtype=dtype, rngs=rngs)
        self.fc = nnx.Linear(4 * 4 * 6, 5, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        return self.fc(x.reshape(len(x), -1))


def make(dtype=jnp.float32):
    abstract = nnx.eval_shape(lambda: Net(dtype=dtype, rngs=nnx.Rngs(0)))
    model = zoo.fill(abstract)
    model.eval()
    return model


def images(n=2, dtype=np.float32):
    return np.random.default_rng(5).standard_normal((n, 8, 8, 3)).astype(dtype)


def outputs(model, *x):
    graphdef, state = nnx.split(evaluation_mode(model))
    call = jax.jit(lambda s, x: nnx.merge(graphdef, s, copy=True)(*x))
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, call(state, x))


@functools.cache
def widened():
    """Both layers of the network: 8 -> 13 and 6 -> 9, in float32."""
    model = make()
    graph = G.trace(model, jnp.zeros((2, 8, 8, 3)))
    one, first = D.widen(jax.random.key(1), model, graph, "conv1", 13)
    graph = G.trace(one, jnp.zeros((2, 8, 8, 3)))
    two, second = D.widen(jax.random.key(2), one, graph, "conv2/kernel", 9)
    return model, one, two, first, second


@pytest.mark.method("net2wider")
def test_widening_follows_the_papers_formulas():
    model, one, two, first, second = widened()
    a, b, c = (
        {k: np.asarray(v, np.float64) for k, v in surgery.leaves(m).items()}
        for m in (model, one, two)
    )
    for n, width, w in ((8, 13, first), (6, 9, second)):
        assert w.mapping.shape == (width,)
        np.testing.assert_array_equal(w.mapping[:n], np.arange(n))
        assert w.mapping.max() < n
        np.testing.assert_array_equal(w.copies, np.bincount(w.mapping)[w.mapping])
        assert sum(1 / w.copies) == pytest.approx(n)
    g, k = first.mapping, first.copies
    np.testing.assert_array_equal(b["conv1/kernel"], a["conv1/kernel"][..., g])
    for name in ("conv1/bias", "bn1/scale", "bn1/bias", "bn1/mean", "bn1/var"):
        np.testing.assert_array_equal(b[name], a[name][g])
    expected = a["conv2/kernel"][:, :, g] / k[:, None]
    np.testing.assert_allclose(b["conv2/kernel"], expected, rtol=1e-6)
    np.testing.assert_array_equal(b["fc/kernel"], a["fc/kernel"])
    # the dense layer after the flatten: (H, W, n, out) first
    g, k = second.mapping, second.copies
    dense = b["fc/kernel"].reshape(4, 4, 6, 5)[:, :, g] / k[:, None]
    np.testing.assert_allclose(c["fc/kernel"], dense.reshape(-1, 5), rtol=1e-6)
    x = images()
    want = outputs(model, x)
    np.testing.assert_allclose(outputs(two, x), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.method("net2wider")
def test_exact_in_float64():
    with jax.enable_x64(True):
        model = make(jnp.float64)
        x = images(dtype=np.float64)
        graph = G.trace(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
        wide, _ = D.widen(jax.random.key(3), model, graph, "conv1", 13, check=False)
        assert np.abs(outputs(wide, x) - outputs(model, x)).max() < 1e-10


@pytest.mark.method("net2wider")
def test_equal_width_is_the_identity_and_noise_is_of_its_order():
    model = make()
    x = images()
    graph = G.trace(model, jnp.zeros((2, 8, 8, 3)))
    same, w = D.widen(jax.random.key(1), model, graph, "conv1", 8)
    assert same is not model
    for p, leaf in surgery.leaves(same).items():
        np.testing.assert_array_equal(leaf, surgery.leaves(model)[p])
    np.testing.assert_array_equal(w.mapping, np.arange(8))
    want = outputs(model, x)
    change = []
    for noise in (1e-3, 1e-2):
        wide, w = D.widen(jax.random.key(1), model, graph, "conv1", 12, noise=noise, check=False)
        kernel = np.asarray(surgery.leaves(wide)["conv1/kernel"])
        old = np.asarray(surgery.leaves(model)["conv1/kernel"])
        np.testing.assert_array_equal(kernel[..., :8], old)  # only the copies are noisy
        spread = np.std(kernel[..., 8:] - old[..., w.mapping[8:]]) / np.std(old)
        assert 0.6 * noise < spread < 1.5 * noise
        change.append(np.abs(outputs(wide, x) - want).max())
    assert 5 < change[1] / change[0] < 20


def group_names(name):
    model, inputs = zoo.build(name)
    return model, inputs, G.trace(model, *inputs)


QUICK = ("residual_basic", "dense_blocks", "resnext", "shuffle1_g3", "inverted_residual")
# parts of one split that must grow together, and layers whose group count is written down
WHOLE = {"shuffle2", "c2f", "group_norm", "hard_coded", "res2net"}
# products of two activations over the channels, statistics over channels
INEXACT = {"cbam", "layer_norm", "attention", "attention_scaled", "non_local"}
INEXACT |= {"convnext", "multi_head", "weight_standardised"}


def widen_every_group(name, groups):
    model, inputs, graph = group_names(name)
    want = outputs(model, *inputs)
    done = 0
    for group in graph.groups[:groups]:
        for width in (group.size + 3, 2 * group.size):
            try:
                wide, w = D.widen(jax.random.key(0), model, graph, group.name, width, check=False)
            except ValueError:
                if width == 2 * group.size and name not in WHOLE | INEXACT:
                    raise
                continue
            got = outputs(wide, *inputs)
            both = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
            bad = any(np.abs(a - b).max() > 1e-5 * np.abs(b).max() for a, b in both)
            if bad and name in INEXACT:
                with pytest.raises(ValueError, match="changes the function"):
                    D.widen(jax.random.key(0), model, graph, group.name, width)
            else:
                assert not bad, (name, group.name)
            assert len(w.mapping) == width
            done += not bad
            break
    return done


@pytest.mark.method("net2wider")
@pytest.mark.parametrize("name", QUICK)
def test_residual_concat_grouped_and_depthwise(name):
    assert widen_every_group(name, 2) == 2


@pytest.mark.slow
@pytest.mark.method("net2wider")
@pytest.mark.parametrize("name", sorted(set(zoo.CASES)))
def test_every_topology(name):
    done = widen_every_group(name, 4)
    assert done or name in WHOLE | INEXACT


DEEP = ("1202", "1001", "200", "164", "152", "201", "161", "169", "110", "264", "101", "_250_")
NAMES = [n for n in cnnjax.models.names() if not any(part in n for part in DEEP)]


@pytest.mark.slow
@pytest.mark.method("net2wider")
@pytest.mark.parametrize("name", NAMES)
def test_registry_models_can_be_widened(name):
    """First, middle and last group, by the label check alone: nothing is computed."""
    model = cnnjax.models.abstract(name)
    image = jax.ShapeDtypeStruct((1, *cnnjax.models.input_shape(name)), np.float32)
    graph = G.trace(model, image)
    groups = {g.name: g for g in (graph.groups[0], graph.groups[len(graph.groups) // 2])}
    groups[graph.groups[-1].name] = graph.groups[-1]
    rng = np.random.default_rng(0)
    for group in groups.values():
        if group.statistic:
            continue
        w = growth.plan_widening(
            surgery.parts(model), model, graph, group.name, 2 * group.size, rng
        )
        assert sum(1 / w.copies) == pytest.approx(group.size)
        assert set(w.moves) == set(group.members)


@pytest.mark.method("net2wider")
def test_refusals():
    model, _, graph = group_names("layer_norm")
    with pytest.raises(ValueError, match="mean over channels"):
        D.widen(jax.random.key(0), model, graph, graph.groups[0].name, 32)
    model, _, graph = group_names("attention")
    with pytest.raises(ValueError, match="changes the function"):
        D.widen(jax.random.key(0), model, graph, "q", 2 * graph.group_of("q/kernel").size)
    model, _, graph = group_names("plain_flatten")
    with pytest.raises(ValueError, match="has 8 channels already"):
        D.widen(jax.random.key(0), model, graph, "c1", 7)
    with pytest.raises(KeyError, match="Did you mean 'c1'"):
        D.widen(jax.random.key(0), model, graph, "c11", 9)
    with pytest.raises(ValueError, match="'fc2' can't be widened exactly: .* is fixed"):
        D.widen(jax.random.key(0), model, graph, "fc2", 9)
    with pytest.raises(ValueError, match="noise is -1"):
        D.widen(jax.random.key(0), model, graph, "c1", 9, noise=-1.0)
    with pytest.raises(ValueError, match="abstract"):
        D.widen(jax.random.key(0), surgery.abstract(model), graph, "c1", 9)
    with pytest.raises(ValueError, match="another model"):
        D.widen(jax.random.key(0), make(), graph, "c1", 9)


@pytest.mark.method("net2wider")
def test_local_response_normalization_is_refused_by_name():
    """A copy beside a channel changes its neighbours' sums of squares."""

    class Normalized(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(3, 6, (3, 3), rngs=rngs)
            self.conv2 = nnx.Conv(6, 4, (3, 3), rngs=rngs)
            self.fc = nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, x):
            x = cnnjax.models.pools.local_response_norm(nnx.relu(self.conv1(x)))
            return self.fc(nnx.relu(self.conv2(x)).mean((1, 2)))

    model = zoo.fill(nnx.eval_shape(lambda: Normalized(nnx.Rngs(0))))
    x = images()
    graph = G.trace(model, x)
    with pytest.raises(ValueError, match="'conv1' can't be widened exactly: .*local_response_norm"):
        D.widen(jax.random.key(0), model, graph, "conv1", 9)
    wide, _ = D.widen(jax.random.key(0), model, graph, "conv2", 7)  # behind it: as ever
    want = outputs(model, x)
    np.testing.assert_allclose(outputs(wide, x), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.method("net2wider")
def test_optimizer_state_is_what_the_wide_networks_gradients_make():
    model, one, _, first, _ = widened()
    x, y = images(4), np.arange(4) % 5

    def gradients(m):
        graphdef, params, rest = nnx.split(m, nnx.Param, ...)

        def loss(p):
            logits = nnx.merge(graphdef, p, rest, copy=True)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        with jax.default_matmul_precision("highest"):
            return nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))

    narrow, wide = gradients(model), gradients(one)
    state = optax.ScaleByAdamState(
        count=jnp.array(3), mu=narrow, nu=jax.tree.map(lambda g: g * g, narrow)
    )
    grown = D.widen_tree((state,), first)[0]
    assert int(grown.count) == 3
    for path, g in tree.flatten(wide).items():
        scale = np.abs(g).max() + 1e-12
        np.testing.assert_allclose(tree.flatten(grown.mu)[path], g, atol=2e-5 * scale)
        np.testing.assert_allclose(tree.flatten(grown.nu)[path], g**2, atol=1e-4 * scale**2)
    with pytest.raises(ValueError, match="'hessian' hold"):
        D.widen_tree({"hessian": narrow}, first)
    for path, g in tree.flatten(
        D.widen_tree({"hessian": narrow}, first, orders={"hessian": 1})
    ).items():
        np.testing.assert_array_equal(g, tree.flatten(grown.mu)[path.removeprefix("hessian/")])
    values = nnx.to_pure_dict(nnx.state(model))
    for path, leaf in tree.flatten(D.widen_tree(values, first)).items():
        np.testing.assert_array_equal(leaf, surgery.leaves(one)[path])


def plain():
    model = nnx.eval_shape(
        lambda: cnnjax.models.create(
            "plain_cnn", widths=(4, 6), hidden=(8,), num_classes=3, rngs=nnx.Rngs(0)
        )
    )
    return zoo.fill(model), jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))


@pytest.mark.method("net2wider")
@pytest.mark.method("net2deeper")
def test_wider_and_deeper_networks_are_saved_and_loaded(tmp_path):
    model, x = plain()
    wide, _ = D.widen(jax.random.key(0), model, G.trace(model, x), "convs/0", 7)
    deep = D.deepen(wide, "convs/1", x, side="input", rngs=nnx.Rngs(0))
    cnnjax.save(tmp_path / "net", deep)
    again = cnnjax.load(tmp_path / "net")
    want = outputs(model, x)
    np.testing.assert_allclose(outputs(again, x), want, atol=1e-5 * np.abs(want).max())
    assert surgery.leaves(again)["convs/1/layers/0/kernel"].shape == (3, 3, 7, 7)


@pytest.mark.method("net2deeper")
def test_identity_layer_with_batch_norm():
    model = make()
    x = images(16)
    want = outputs(model, x)
    deep = D.deepen(model, "conv2", x, side="input", norm=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(outputs(deep, x), want, atol=1e-5 * np.abs(want).max())
    leaves = surgery.leaves(deep)
    kernel = np.zeros((3, 3, 8, 8))
    kernel[1, 1] = np.eye(8)
    np.testing.assert_array_equal(leaves["conv2/layers/0/kernel"], kernel)
    # the statistics of what the layer reads, by a separate computation
    _, seen = jax.jit(lambda x: G.capture(model, {"conv2": "input"})(x))(x)
    read = np.asarray(seen["conv2"], np.float64).reshape(-1, 8)
    np.testing.assert_allclose(leaves["conv2/layers/1/mean"], read.mean(0), atol=1e-5)
    np.testing.assert_allclose(leaves["conv2/layers/1/scale"], np.sqrt(read.var(0) + 1e-5), 1e-4)

    # training mode on the data of the statistics: only the new layer's normalization is by batch
    graphdef, params, rest = nnx.split(deep, nnx.Param, ...)

    def total(p, train):
        m = nnx.merge(graphdef, p, rest, copy=True)
        m.conv2.layers[1].use_running_average = not train
        out = m(x)
        return (out**2).sum(), out

    (_, out), grads = jax.jit(
        jax.value_and_grad(functools.partial(total, train=True), has_aux=True)
    )(params)
    np.testing.assert_allclose(out, want, atol=1e-4 * np.abs(want).max())
    assert np.abs(grads["conv2"]["layers"][0]["kernel"][...]).max() > 0


@pytest.mark.method("net2deeper")
def test_deepen_refuses_what_is_not_exact():
    model = make()
    x = images()
    with pytest.raises(ValueError, match="tanh is not idempotent"):
        D.deepen(model, "conv2", x, side="input", activation=jnp.tanh, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="isn't an output of relu"):
        D.deepen(model, "conv1", x, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="odd size"):
        D.deepen(model, "conv2", x, side="input", kernel_size=2, rngs=nnx.Rngs(0))
    with pytest.raises(KeyError, match="Did you mean 'conv1'"):
        D.deepen(model, "conv11", x, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="example"):
        D.deepen(model, "conv2", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="side is 'left'"):
        D.deepen(model, "conv2", x, side="left", rngs=nnx.Rngs(0))
