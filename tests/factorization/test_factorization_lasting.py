"""Factorized networks last: exact at full rank, saved and loaded elsewhere, shrunk, trained."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import factorization as f
from cnnjax import models, pruning, surgery

CP = f.CP(6, iterations=2, restarts=1, always=True)
CASES = {
    "resnet": (
        ("resnet20_cifar", {"blocks_per_stage": 1, "widths": (8, 8, 16), "num_classes": 5}),
        (2, 8, 8, 3),
        {"**/conv1": f.Spatial(0.4), "layer3/**": CP, "**": f.Tucker2(0.5), "fc": None},
    ),
    "vgg": (
        (
            "vgg16",
            {"stages": (1, 1), "widths": (8, 16), "norm": True, "hidden": 16, "num_classes": 5},
        ),
        (2, 8, 8, 3),
        {"stages/**": f.Basis(0.5), "fc[12]": f.Basis(0.25)},
    ),
}


def made(name):
    (model, fields), shape, rules = CASES[name]
    rng = np.random.default_rng(0)

    def leaf(path, a):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return jnp.zeros(a.shape, a.dtype)
        if path.endswith(("var", "scale")):
            return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)
        return jnp.asarray(0.2 * rng.standard_normal(a.shape), a.dtype)

    whole = surgery.map_leaves(models.create(model, rngs=nnx.Rngs(0), **fields), leaf)
    return evaluated(whole), jax.ShapeDtypeStruct(shape, jnp.float32), rules


def evaluated(model):
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


def outputs(model, example):
    x = np.random.default_rng(1).standard_normal(example.shape).astype(np.float32)
    graphdef, state = nnx.split(evaluated(model))
    return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    whole, example, rules = made(request.param)
    rules = {k: v for k, v in rules.items() if k != "fc" or request.param == "resnet"}
    return whole, f.factorize(whole, rules, example), example


@pytest.mark.method("svd_dense")
@pytest.mark.parametrize("name", CASES)
def test_full_rank_is_the_same_network(name):
    whole, example, _ = made(name)
    full = {
        "**/conv1": f.Spatial(1.0, always=True),
        "fc*": f.Basis(1.0, always=True),
        "**": f.Tucker2(1.0, always=True),
    }
    full = full if name == "resnet" else {k: v for k, v in full.items() if k != "**/conv1"}
    same = f.factorize(whole, full, example)
    chains = [m for m in surgery.modules(same).values() if isinstance(m, nnx.Sequential)]
    assert len(chains) >= 4
    expected = outputs(whole, example)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(outputs(same, example) / scale, expected / scale, atol=1e-5)


SCRIPT = """
import sys
import jax, numpy as np
from flax import nnx
import cnnjax
model = cnnjax.load(sys.argv[1])
graphdef, state = nnx.split(
    nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
)
run = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))
np.save(sys.argv[3], np.asarray(run(state, np.load(sys.argv[2]))))
"""


@pytest.mark.slow
@pytest.mark.method("one_shot_whole_network")
def test_saved_and_loaded_in_a_fresh_process(case, tmp_path):
    _, small, example = case
    cnnjax.save(tmp_path / "small", small)
    x = np.random.default_rng(1).standard_normal(example.shape).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    places = [str(tmp_path / n) for n in ("small", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", SCRIPT, *places], check=True, timeout=300)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), outputs(small, example))


@pytest.mark.method("one_shot_whole_network")
def test_saved_and_loaded_bit_for_bit(case, tmp_path):
    _, small, example = case
    cnnjax.save(tmp_path / "small", small)
    again = cnnjax.load(tmp_path / "small")
    np.testing.assert_array_equal(outputs(again, example), outputs(small, example))


@pytest.mark.method("one_shot_whole_network")
def test_factors_shrink_further(case, tmp_path):
    _, small, example = case
    found = cnnjax.graph.trace(small, example)
    scores = pruning.importance.l1(nnx.to_pure_dict(nnx.state(small, nnx.Param)))
    keep = pruning.select_channels(found, scores, ratio=0.4)
    smaller = pruning.shrink(small, found, keep)
    before, after = cnnjax.profile(small, example), cnnjax.profile(smaller, example)
    assert after.params < 0.8 * before.params
    # ranks themselves have become smaller, not only the network's own channels
    widths = {
        path: [(layer.kernel.shape[-1]) for layer in module.layers[:-1]]
        for path, module in surgery.modules(small).items()
        if isinstance(module, nnx.Sequential)
    }
    assert widths
    thinner = [
        new.kernel.shape[-1] < old
        for path, olds in widths.items()
        for new, old in zip(surgery.module_at(smaller, path).layers, olds)
    ]
    assert sum(thinner) >= 3
    assert np.isfinite(outputs(smaller, example)).all()
    cnnjax.save(tmp_path / "smaller", smaller)
    again = cnnjax.load(tmp_path / "smaller")
    np.testing.assert_array_equal(outputs(again, example), outputs(smaller, example))


@pytest.mark.method("one_shot_whole_network")
def test_training_lowers_the_loss(case):
    _, small, example = case
    x = jnp.asarray(np.random.default_rng(2).standard_normal(example.shape), jnp.float32)
    labels = jnp.arange(example.shape[0]) % 5
    graphdef, params, rest = nnx.split(small, nnx.Param, ...)

    def loss(params):
        logits = nnx.merge(graphdef, params, rest, copy=True)(x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])

    @jax.jit
    def step(params):
        value, grads = jax.value_and_grad(loss)(params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda p, g: p - 1e-3 * g / norm, params, grads), value, grads

    first = None
    for _ in range(5):
        params, value, grads = step(params)
        first = value if first is None else first
        flat = cnnjax.tree.flatten(nnx.to_pure_dict(grads))
        assert all(np.abs(np.asarray(g)).max() > 0 for p, g in flat.items() if "kernel" in p)
    assert value < first
