"""Counts against the catalogue and by hand; memory against a brute-force simulation."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import graph

# (name, fields, side of the input, channels, params, MACs): the catalogue's regression index
CATALOGUE = [
    ("lenet_300_100", {}, 28, 1, 266_610, 266_200),
    ("lenet_5", {}, 32, 1, 61_706, 416_520),
    ("lenet_5_caffe", {}, 28, 1, 431_080, 2_293_000),
    ("alexnet", {}, 224, 3, 61_100_840, 714_188_480),
    ("alexnet_caffe", {}, 227, 3, 60_965_224, 724_406_816),
    ("zfnet", {}, 224, 3, 62_357_608, 1_168_032_896),
    ("vgg16", {}, 224, 3, 138_357_544, 15_470_264_320),
    ("vgg16_bn", {}, 224, 3, 138_365_992, 15_470_264_320),
    ("vgg19", {}, 224, 3, 143_667_240, 19_632_062_464),
    ("vgg16_cifar", {}, 32, 3, 14_987_722, 313_463_808),
    ("vgg19_cifar", {}, 32, 3, 20_035_018, 398_136_320),
    ("inception_v3", {}, 299, 3, 23_834_568, 5_713_216_096),
    ("inception_v4", {}, 299, 3, 42_679_816, 12_253_974_624),
    ("xception", {}, 299, 3, 22_855_952, 8_357_403_496),
    ("nin_cifar", {}, 32, 3, 966_986, 222_486_528),
    ("maxout_nin", {}, 32, 3, 1_614_294, 496_656_384),
    ("resnet18", {}, 224, 3, 11_689_512, 1_814_073_344),
    ("resnet34", {}, 224, 3, 21_797_672, 3_663_761_408),
    ("resnet50", {}, 224, 3, 25_557_032, 4_089_184_256),
    ("resnet20_cifar", {}, 32, 3, 269_722, 40_551_040),
    ("resnet56_cifar", {}, 32, 3, 853_018, 125_485_696),
    ("resnet110_cifar", {}, 32, 3, 1_727_962, 252_887_680),
    ("preact_resnet164", {}, 32, 3, 1_703_258, 244_500_992),
    ("resnext50_32x4d", {}, 224, 3, 25_028_904, 4_230_479_872),
    ("wrn_16_8", {}, 32, 3, 10_961_370, 1_548_145_664),
    ("densenet121", {}, 224, 3, 7_978_856, 2_834_161_664),
    ("densenet_40_12", {}, 32, 3, 1_019_722, 264_812_928),
    ("mobilenet_v1", {}, 224, 3, 4_231_976, 568_740_352),
    ("mobilenet_v2", {}, 224, 3, 3_504_872, 300_774_272),
    ("shufflenet_v1_g1", {}, 224, 3, 1_531_936, 143_078_976),
    ("shufflenet_v1_g3", {}, 224, 3, 1_865_728, 137_460_672),
    ("shufflenet_v1_g8", {}, 224, 3, 2_434_768, 138_365_952),
]  # fmt: skip


@pytest.mark.parametrize("case", CATALOGUE, ids=lambda c: c[0])
def test_counts_equal_the_catalogue(case):
    name, fields, side, channels, params, macs = case
    if name not in cnnjax.models.names():
        pytest.skip(f"{name} is not in the registry yet")
    model = cnnjax.models.abstract(name, **fields)
    model.eval()
    found = cnnjax.profile(model, jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32))
    assert (found.params, found.macs) == (params, macs)
    assert sum(layer.params for layer in found.layers) == params
    assert sum(layer.macs for layer in found.layers if layer.kind != "matmul") == macs


X = jax.ShapeDtypeStruct((4, 8, 8, 6), jnp.float32)


class Mixed(nnx.Module):
    """Every kind of contraction once, one layer twice, and an attention product."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(6, 8, (3, 3), strides=2, rngs=rngs)
        self.twice = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)
        self.depthwise = nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs)
        self.grouped = nnx.Conv(16, 8, (1, 1), feature_group_count=4, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (2, 2), strides=(2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(4))
        self.dense = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = self.twice(nnx.relu(self.twice(self.conv(x))))
        x = self.up(self.grouped(self.depthwise(x)))
        x = (self.norm(x) * self.gain[...]).reshape(x.shape[0], -1, 4)
        x = jnp.einsum("nij,njc->nic", jnp.einsum("nic,njc->nij", x, x), x)
        return self.dense(x.mean(1))


def test_hand_counted_layers_for_one_example_whatever_the_batch():
    model = nnx.eval_shape(lambda: Mixed(nnx.Rngs(0)))
    found = cnnjax.profile(model, X)
    want = {
        "conv": (3 * 3 * 6 * 8 + 8, 16 * 9 * 6 * 8, 1),
        "twice": (9 * 64, 2 * 16 * 9 * 64, 2),
        "depthwise": (9 * 16 + 16, 16 * 9 * 16, 1),
        "grouped": (4 * 8 + 8, 16 * 4 * 8, 1),
        "up": (4 * 8 * 4 + 4, 16 * 4 * 8 * 4, 1),  # one kernel for each input position
        "norm": (8, 0, 0),
        "": (4, 0, 0),
        "dense": (25, 20, 1),
    }
    got = {c.path: (c.params, c.macs, c.calls) for c in found.layers if c.kind != "matmul"}
    assert got == want
    assert found.matmul_macs == 2 * 64 * 64 * 4
    assert found.macs == sum(macs for _, macs, _ in want.values())
    assert found.params == sum(params for params, _, _ in want.values())
    assert found.state_bytes == 4 * 8
    assert found.batch == 4
    assert [c.path for c in found.layers if c.path] == [
        "conv", "twice", "depthwise", "grouped", "up", "norm", "dense",
    ]  # fmt: skip
    one = cnnjax.profile(model, jax.ShapeDtypeStruct((1, 8, 8, 6), jnp.float32))
    assert (one.macs, one.params, one.matmul_macs) == (found.macs, found.params, found.matmul_macs)
    assert 4 * one.activation_peak == found.activation_peak


def test_table_and_json():
    model = nnx.eval_shape(lambda: Mixed(nnx.Rngs(0)))
    found = cnnjax.profile(model, X)
    table = str(found)
    assert "depthwise" in table
    assert "BatchNorm" in table
    assert f"{found.macs:,}" in table
    data = json.loads(json.dumps(found.to_json()))
    assert data["macs"] == found.macs
    assert len(data["layers"]) == len(found.layers)
    assert found.layer("grouped").macs == 512
    with pytest.raises(KeyError, match="Did you mean 'grouped'"):
        found.layer("groupd")


def test_connection_tables_count_only_their_connections():
    mask = np.zeros((3, 3, 6, 4), bool)
    mask[..., :3, :2] = True
    model = nnx.Conv(6, 4, (3, 3), use_bias=False, mask=jnp.asarray(mask), rngs=nnx.Rngs(0))
    found = cnnjax.profile(nnx.Sequential(model), X)
    assert found.params == 9 * 6
    assert found.macs == 64 * 9 * 6


def peak_by_hand(sizes, steps, results):
    """Brute force: which buffers are still needed after each step, summed."""
    best = 0
    for i in range(len(steps)):
        needed_later = {b for reads, _ in steps[i + 1 :] for b in reads} | set(results)
        made = {b for _, out in steps[: i + 1] for b in out} | {"x"}
        during = (needed_later & made) | set(steps[i][1]) | set(steps[i][0])
        best = max(best, sum(sizes[b] for b in during))
    return best


def test_activation_peak_by_liveness():
    k = {n: jax.ShapeDtypeStruct((1, 1, *s), jnp.float32) for n, s in
         {"a": (2, 8), "b": (8, 4), "c": (2, 4)}.items()}  # fmt: skip

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def net(v, x):
        left = conv(jnp.maximum(conv(x, v["a"]), 0), v["b"])  # the relu is in place
        right = conv(x, v["c"])
        return jnp.concatenate([left, right], -1)

    x = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
    found = cnnjax.profile(net, x, variables=k)
    unit = 4 * 16
    sizes = {"x": 2 * unit, "h": 8 * unit, "left": 4 * unit, "right": 4 * unit, "out": 8 * unit}
    steps = [(["x"], ["h"]), (["h"], ["left"]), (["x"], ["right"]), (["left", "right"], ["out"])]
    assert found.activation_peak == peak_by_hand(sizes, steps, ["out"]) == 16 * unit
    assert found.activation_total == 24 * unit
    assert found.macs == 16 * (16 + 32 + 8)


def test_loops_branches_and_inner_calls():
    w = {"w": jax.ShapeDtypeStruct((6, 6), jnp.float32)}

    @jax.jit
    def inner(x, w):
        return x @ w

    def net(v, x):
        x = jax.checkpoint(inner)(x, v["w"])
        x, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ v["w"]), None), x, None, length=5)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ v["w"] @ v["w"], lambda x: x @ v["w"], x)

    found = cnnjax.profile(net, jax.ShapeDtypeStruct((2, 6), jnp.float32), variables=w)
    assert found.macs == 36 * (1 + 5 + 2)
    assert found.params == 36


def test_the_librarys_own_convolutions_are_counted_whole():
    from cnnjax import ops

    model = nnx.eval_shape(
        lambda: nnx.Sequential(
            ops.Conv(6, 6, (3, 3), feature_group_count=6, rngs=nnx.Rngs(0)),
            ops.Conv(6, 8, (1, 1), rngs=nnx.Rngs(0)),
        )
    )
    found = cnnjax.profile(model, X)
    assert [c.macs for c in found.layers] == [64 * 9 * 6, 64 * 6 * 8]


def test_bad_input():
    model = nnx.eval_shape(lambda: Mixed(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="needs an example input"):
        cnnjax.profile(model)
    with pytest.raises(ValueError, match=r"can't be traced on inputs \(4, 8, 8, 5\)"):
        cnnjax.profile(model, jax.ShapeDtypeStruct((4, 8, 8, 5), jnp.float32))
    with pytest.raises(TypeError, match=r"nnx\.Module, or a function with variables="):
        cnnjax.profile(lambda x: x, X)


def test_latency_of_a_module_and_of_a_function():
    x = jnp.ones((4, 16))
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    for found in (graph.latency(model, x, calls=5), graph.latency(jnp.tanh, x, calls=5)):
        assert 0 < found.best <= found.median <= found.p90
        assert found.calls == 5
        assert found.batch == 4
        np.testing.assert_allclose(found.throughput, 4 / found.median)
        assert found.compile > 0
        assert "median" in str(found)
        json.dumps(found.to_json())
    with pytest.raises(ValueError, match="calls must be >= 1"):
        graph.latency(jnp.tanh, x, calls=0)


def test_latency_grows_with_work():
    x = jnp.ones((256, 256))

    def many(x):
        return jax.lax.fori_loop(0, 60, lambda _, y: y @ x / 256, x)

    few = graph.latency(lambda x: x @ x, x, calls=10)
    assert graph.latency(many, x, calls=10).best > 5 * few.best


def test_energy_is_measured_or_a_labelled_proxy(monkeypatch):
    from cnnjax.graph import timing as module

    x = jnp.ones((4, 16))
    monkeypatch.setattr(module, "_counter", lambda: None)
    found = graph.energy(jnp.tanh, x, macs=1000, nbytes=400)
    assert found.source == "proxy"
    assert not found.measured
    np.testing.assert_allclose(found.joules, 1e-12 * (1000 * 4.6 + 100 * 640))
    with pytest.raises(ValueError, match="no energy counter"):
        graph.energy(jnp.tanh, x)
    ticks = iter([10.0, 16.0])
    monkeypatch.setattr(module, "_counter", lambda: (lambda: next(ticks), "rapl"))
    found = graph.energy(jnp.tanh, x, seconds=0.05)
    assert found.measured
    assert 0 < found.joules <= 6.0
