"""Every kind of edit through an archive into a fresh process: the same bits, training goes on."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import archive, factorization, pruning, surgery
from cnnjax.graph import trace
from cnnjax.models.fold import fold_batchnorm

X = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
SHAPE = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)


def base():
    model = cnnjax.models.abstract("resnet20_cifar")
    rng = np.random.default_rng(1)

    def draw(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        if path.endswith(("var", "scale")):
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        fan = max(1, int(np.prod(x.shape[:-1]))) if len(x.shape) > 1 else 100
        return jnp.asarray(rng.standard_normal(x.shape) * np.sqrt(2 / fan), x.dtype)

    model = surgery.map_leaves(model, draw)
    model.eval()
    return model


def shrunk(model):
    graph = trace(model, SHAPE)
    scores = pruning.importance.l1(nnx.state(model, nnx.Param))
    return pruning.shrink(model, graph, pruning.select_channels(graph, scores, macs=0.5))


def shorter(model):
    return pruning.remove_blocks(model, ["layer1/1", "layer3/2"], SHAPE)


def factorized(model):
    rules = {"layer3/*/conv2": factorization.Spatial(4, always=True)}
    return factorization.factorize(model, rules, SHAPE)


EDITS = {
    "folded": lambda m: fold_batchnorm(m, SHAPE),
    "factorized": factorized,
    "shorter": shorter,
    "all": lambda m: factorized(fold_batchnorm(shrunk(shorter(m)), SHAPE)),
}
SCRIPT = """
import json, sys, jax, jax.numpy as jnp, numpy as np
import pickle
def refuse(*a, **k): raise AssertionError("unpickling")
pickle.load = pickle.loads = pickle.Unpickler = refuse
from flax import nnx
import cnnjax
from cnnjax import surgery
x = jnp.asarray(np.load(sys.argv[1]))
out = {}
for name in sys.argv[3:]:
    model = cnnjax.load(name)
    split = nnx.split(model, nnx.Param, ...)
    def loss(params, rest, x):
        y = nnx.merge(split[0], params, rest, copy=True)(x)
        return (y ** 2).mean(), y
    (value, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(*split[1:], x)
    moved = sum(float(jnp.abs(g).sum()) > 0 for g in jax.tree.leaves(grads))
    key = name.rsplit("/", 1)[-1]
    out[key], out[key + ".moved"] = y, moved / len(jax.tree.leaves(grads))
    out[key + ".loss"] = value
np.savez(sys.argv[2], **out)
"""


def outputs(model):
    """The same program as in the other process."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, x):
        y = nnx.merge(graphdef, params, rest, copy=True)(x)
        return (y**2).mean(), y

    (value, y), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, rest, jnp.asarray(X))
    return value, y


@pytest.fixture(scope="module")
def models():
    start = base()
    return {name: edit(start) for name, edit in EDITS.items()}


@pytest.mark.parametrize("name", list(EDITS))
def test_an_archive_knows_every_edit(models, tmp_path, name):
    model = models[name]
    cnnjax.save(tmp_path / name, model)
    loaded = cnnjax.load(tmp_path / name)
    assert surgery.differences(model, loaded) == ([], {})
    a, b = surgery.leaves(model), surgery.leaves(loaded)
    assert list(a) == list(b)
    assert all(np.array_equal(a[p], b[p]) for p in a)
    manifest = archive.read_manifest(tmp_path / name)
    kinds = [edit["kind"] for edit in manifest["edits"]]
    assert kinds
    assert set(kinds) <= set(surgery.kinds())
    # data: numbers, names and lists; no source and no pickled object
    text = json.dumps(manifest)
    assert "lambda" not in text
    assert "def " not in text
    assert "import" not in text


def test_a_fresh_process_computes_the_same_bits_and_trains(models, tmp_path):
    np.save(tmp_path / "x.npy", X)
    for name, model in models.items():
        cnnjax.save(tmp_path / name, model)
    root = pathlib.Path(cnnjax.__file__).resolve().parents[1]
    env = os.environ | {
        "PYTHONPATH": str(root),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "x.npy", tmp_path / "out.npz",
         *(tmp_path / name for name in models)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    got = np.load(tmp_path / "out.npz")
    for name, model in models.items():
        value, y = outputs(model)
        np.testing.assert_array_equal(got[name], y)
        np.testing.assert_array_equal(got[f"{name}.loss"], value)
        assert got[f"{name}.moved"] == 1.0
