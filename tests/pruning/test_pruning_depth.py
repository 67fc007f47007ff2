"""Depth pruning: which blocks can go, which do, and that the rest computes the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import pruning, surgery
from cnnjax.models.mobilenet import InvertedResidual, MobileNetConfig
from cnnjax.pruning import importance


class Post(nnx.Module):
    """relu(x + f(x)), as in ResNet v1."""

    def __init__(self, width, rngs, stride=1):
        self.conv1 = nnx.Conv(width, width, (3, 3), strides=stride, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(width, rngs=rngs)
        self.stride = stride

    def __call__(self, x):
        y = self.bn(self.conv2(nnx.relu(self.conv1(x))))
        return nnx.relu(x[:, :: self.stride, :: self.stride] + y)


class Pre(nnx.Module):
    """x + f(x), as in ResNet v2, with the addition in a jitted helper."""

    def __init__(self, width, rngs):
        self.bn = nnx.BatchNorm(width, rngs=rngs)
        self.conv = nnx.Conv(width, width, (3, 3), rngs=rngs)

    def __call__(self, x):
        return jax.jit(jnp.add)(self.conv(nnx.relu(self.bn(x))), x)


class Plain(nnx.Module):
    """Same shape, no shortcut."""

    def __init__(self, width, rngs):
        self.conv = nnx.Conv(width, width, (3, 3), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.conv(x))


class Gated(nnx.Module):
    """A highway: the input is scaled, so it is no identity path."""

    def __init__(self, width, rngs):
        self.h = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.t = nnx.Conv(width, width, (3, 3), rngs=rngs)

    def __call__(self, x):
        t = nnx.sigmoid(self.t(x))
        return self.h(x) * t + x * (1 - t)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.stage = nnx.Sequential(Post(6, rngs), Post(6, rngs))
        self.down = Post(6, rngs, stride=2)
        self.plain = Plain(6, rngs)
        self.gated = Gated(6, rngs)
        self.pre = nnx.List([Pre(6, rngs), Pre(6, rngs)])
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = self.gated(self.plain(self.down(self.stage(nnx.relu(self.stem(x))))))
        for block in self.pre:
            x = block(x)
        return self.head(x.mean((1, 2)))


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
BLOCKS = ("stage/layers/0", "stage/layers/1", "pre/0", "pre/1")


@pytest.fixture(scope="module")
def net():
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))

    def draw(path, x):
        numbers = rng.normal(size=x.shape)
        return jnp.asarray(np.abs(numbers) + 0.5 if "var" in path else 0.3 * numbers, x.dtype)

    return surgery.map_leaves(model, draw)


def test_residual_blocks_are_found_and_others_are_not(net):
    assert pruning.removable_blocks(net, X) == BLOCKS
    assert pruning.removable_blocks(surgery.abstract(net), X) == BLOCKS
    assert pruning.removable_blocks(net, X, exclude="pre/*") == BLOCKS[:2]
    with pytest.raises(ValueError, match="exclude 'prea' matches nothing"):
        pruning.removable_blocks(net, X, exclude="prea")


def test_looking_leaves_the_model_as_it_is(net):
    before = {p: (type(m), id(m)) for p, m in surgery.modules(net).items()}
    values = {p: np.asarray(x).tobytes() for p, x in surgery.leaves(net).items()}
    pruning.removable_blocks(net, X)
    assert {p: (type(m), id(m)) for p, m in surgery.modules(net).items()} == before
    assert {p: np.asarray(x).tobytes() for p, x in surgery.leaves(net).items()} == values


def evaluate(model):
    view = nnx.view(model, use_running_average=True)
    graphdef, state = nnx.split(view)
    return jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, X)


def test_without_a_block_the_network_computes_what_it_does_with_a_zero_branch(net):
    small = pruning.remove_blocks(net, ["stage/layers/1", "pre/0"], X)
    zero = ("stage/layers/1/bn/scale", "stage/layers/1/bn/bias", "pre/0/conv/")
    dead = surgery.map_leaves(net, lambda p, x: x * 0 if p.startswith(zero) else x)
    np.testing.assert_allclose(evaluate(small), evaluate(dead), rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(evaluate(net) - evaluate(dead))).max() > 1e-3
    assert [e["path"] for e in surgery.edits_of(small)] == ["stage/layers/1", "pre/0"]
    assert pruning.removable_blocks(small, X) == ("stage/layers/0", "pre/1")


def test_scores_of_blocks(net):
    scores = importance.l1(nnx.state(net, nnx.Param))
    values = surgery.leaves(net)
    got = pruning.block_scores(scores, BLOCKS, reduce="mean")
    for block in BLOCKS:
        mine = [np.abs(np.asarray(x)).ravel() for p, x in values.items()
                if p.startswith(block + "/") and x.ndim >= 2]  # fmt: skip
        assert got[block] == pytest.approx(np.concatenate(mine).mean(), rel=1e-6)
    total = pruning.block_scores(scores, BLOCKS, reduce="sum")
    assert total["pre/0"] == pytest.approx(got["pre/0"] * 9 * 36, rel=1e-6)
    with pytest.raises(ValueError, match="hold nothing of the block 'x'"):
        pruning.block_scores(scores, ["x"])
    with pytest.raises(ValueError, match="reduce 'max' is unknown"):
        pruning.block_scores(scores, BLOCKS, reduce="max")


def test_selection_by_ratio_count_and_budget(net):
    scores = dict(zip(BLOCKS, (3.0, 1.0, 2.0, 4.0)))
    assert pruning.select_blocks(scores, ratio=0.5) == ("stage/layers/1", "pre/0")
    assert pruning.select_blocks(scores, ratio=0.3) == ("stage/layers/1", "pre/0")  # rounded up
    assert pruning.select_blocks(scores, count=1) == ("stage/layers/1",)
    full = cnnjax.profile(net, X).macs
    for budget in (0.6, round(0.6 * full)):
        chosen = pruning.select_blocks(scores, macs=budget, model=net, inputs=(X,))
        small = pruning.remove_blocks(net, chosen, X)
        assert cnnjax.profile(small, X).macs <= 0.6 * full
        fewer = pruning.remove_blocks(net, chosen[:-1], X)
        assert cnnjax.profile(fewer, X).macs > 0.6 * full
    with pytest.raises(ValueError, match="out of reach"):
        pruning.select_blocks(scores, macs=0.01, model=net, inputs=(X,))
    with pytest.raises(ValueError, match="exactly one"):
        pruning.select_blocks(scores)
    with pytest.raises(ValueError, match="needs model="):
        pruning.select_blocks(scores, macs=0.5)
    with pytest.raises(ValueError, match="between 0 and 4 blocks"):
        pruning.select_blocks(scores, count=5)


def test_blocks_that_cannot_go_are_refused(net):
    with pytest.raises(ValueError, match="'plain' is no residual block"):
        pruning.remove_blocks(net, ["plain"], X)
    with pytest.raises(KeyError, match="no module at 'pre/7'"):
        pruning.remove_blocks(net, ["pre/7"], X)


def test_registry_resnet(tmp_path):
    model = cnnjax.models.abstract("resnet20_cifar")
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    found = pruning.removable_blocks(model, x)
    assert found == ("layer1/0", "layer1/1", "layer1/2", "layer2/1", "layer2/2", "layer3/1",
                     "layer3/2")  # fmt: skip
    small = pruning.remove_blocks(model, found[:3], x)
    assert cnnjax.profile(model, x).macs - cnnjax.profile(small, x).macs == 6 * 2_359_296


class Mobile(nnx.Module):
    """Inverted residuals of the registry's MobileNetV2: no activation behind the addition."""

    def __init__(self, rngs):
        config = MobileNetConfig()
        self.stem = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        shapes = [(4, 4, 1, 6), (4, 6, 2, 6), (6, 6, 1, 6), (6, 6, 1, 1)]
        self.blocks = nnx.List([InvertedResidual(config, *s, rngs=rngs) for s in shapes])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def test_inverted_residuals_are_found():
    blank = cnnjax.models.abstract("mobilenet_v2_035")
    blocks = pruning.removable_blocks(blank, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    # repeats with stride 1: 1 + 2 + 3 + 2 + 2 of the seventeen
    assert blocks == tuple(f"blocks/{i}" for i in (2, 4, 5, 7, 8, 9, 11, 12, 14, 15))


def test_inverted_residuals_go_and_the_rest_computes_as_with_their_branches_at_zero():
    rng = np.random.default_rng(0)
    model = surgery.map_leaves(
        nnx.eval_shape(lambda: Mobile(nnx.Rngs(0))),
        lambda _, a: jnp.asarray(np.abs(rng.normal(size=a.shape)) * 0.3 + 0.1, a.dtype),
    )
    model.eval()
    blocks = pruning.removable_blocks(model, X)
    assert blocks == ("blocks/0", "blocks/2", "blocks/3")
    scores = {b: float(i) for i, b in enumerate(blocks)}
    gone = pruning.select_blocks(scores, macs=0.8, model=model, inputs=(X,))
    assert gone == blocks[:1]
    small = pruning.remove_blocks(model, gone, X)
    assert cnnjax.profile(small, X).macs <= 0.8 * cnnjax.profile(model, X).macs
    # the last normalization of a removed block's branch multiplies it with zero
    norms = [p for p in surgery.leaves(model) if p.endswith("/scale")]
    last = {[p for p in norms if p.startswith(f"{b}/")][-1].rpartition("/")[0] for b in gone}
    gated = surgery.map_leaves(
        model, lambda p, a: a * 0 if p.rpartition("/")[0] in last and "var" not in p else a
    )
    run = nnx.jit(lambda m: m(X))
    np.testing.assert_allclose(run(small), run(gated), rtol=1e-5)
    assert np.abs(np.asarray(run(small)) - np.asarray(run(model))).max() > 1e-2
