"""Saving and loading: a fresh process, no code, atomicity, and clear errors."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cnnjax
from cnnjax import archive, surgery

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import archive_factory  # noqa: E402

NAME = "archive_factory:make"
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 3)), jnp.float32)


def shrunk(mode="eval"):
    """A user's model with two of six channels removed and a replaced head."""
    model = archive_factory.make(rngs=nnx.Rngs(3))
    getattr(model, mode)()
    kept, params = [0, 1, 3, 5], surgery.leaves(model)
    axes = {"conv1/kernel": {3: kept}, "conv1/bias": {0: kept}, "conv2/kernel": {2: kept, 3: kept},
            "conv2/bias": {0: kept}, "head/kernel": {0: kept}}  # fmt: skip
    axes |= {f"norm/{n}": {0: kept} for n in ("scale", "bias", "mean", "var")}
    model = surgery.rebuild(model, {p: surgery.take(params[p], a) for p, a in axes.items()})
    head = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(1)), nnx.gelu,
                          nnx.Linear(3, 4, rngs=nnx.Rngs(2)))  # fmt: skip
    return surgery.replace(model, "head", head)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = shrunk()
    path = tmp_path_factory.mktemp("a") / "model"
    cnnjax.save(path, model, factory=NAME, kwargs={"width": 6}, metadata={"accuracy": 0.9})
    return path, model


def same_bytes(a, b):
    x, y = surgery.leaves(a), surgery.leaves(b)
    assert list(x) == list(y)
    for p in x:
        u, v = x[p], y[p]
        if jnp.issubdtype(u.dtype, jax.dtypes.prng_key):
            u, v = jax.random.key_data(u), jax.random.key_data(v)
        assert u.dtype == v.dtype
        assert np.asarray(u).tobytes() == np.asarray(v).tobytes(), p


def test_round_trip_is_bit_for_bit_with_modes_and_record(saved):
    path, model = saved
    loaded = cnnjax.load(path, trust={NAME})
    same_bytes(model, loaded)
    assert surgery.differences(model, loaded) == ([], {})
    assert surgery.edits_of(loaded) == surgery.edits_of(model)
    assert loaded.norm.use_running_average
    np.testing.assert_array_equal(loaded(X), model(X))
    assert archive.read_manifest(path)["metadata"] == {"accuracy": 0.9}


def test_saved_again_from_the_loaded_model(saved, tmp_path):
    path, model = saved
    loaded = cnnjax.load(path, factory=archive_factory.make)
    cnnjax.save(tmp_path / "again", loaded)
    same_bytes(model, cnnjax.load(tmp_path / "again", trust=NAME))


SCRIPT = """
import sys, numpy as np, jax, jax.numpy as jnp, optax
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("cloudpickle", "dill"):
            raise AssertionError(f"{name} imported")
sys.meta_path.insert(0, Refuse())
import pickle
def refuse(*a, **k): raise AssertionError("unpickling")
pickle.load = pickle.loads = pickle.Unpickler = refuse
from flax import nnx
import cnnjax
model = cnnjax.load(sys.argv[1], trust={"archive_factory:make"})
x = jnp.asarray(np.load(sys.argv[2]))
out = model(x)
model.train()
optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
def loss(m): return (m(x) ** 2).mean()
value, grads = nnx.value_and_grad(loss)(model)
optimizer.update(model, grads)
np.savez(sys.argv[3], out=out, value=value, kernel=model.conv1.kernel[...])
"""


def test_fresh_process_gives_the_same_bits_and_goes_on_training(saved, tmp_path):
    path, model = saved
    np.save(tmp_path / "x.npy", X)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, tmp_path / "x.npy", tmp_path / "out.npz"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    got = np.load(tmp_path / "out.npz")
    np.testing.assert_array_equal(got["out"], model(X))
    here = surgery.copy(model)
    here.train()
    optimizer = nnx.Optimizer(here, optax.sgd(0.1), wrt=nnx.Param)
    value, grads = nnx.value_and_grad(lambda m: (m(X) ** 2).mean())(here)
    optimizer.update(here, grads)
    np.testing.assert_array_equal(got["value"], value)
    np.testing.assert_array_equal(got["kernel"], here.conv1.kernel[...])


def test_registry_model_needs_neither_factory_nor_trust(tmp_path):
    model = cnnjax.models.create("lenet_5", rngs=nnx.Rngs(0))
    cnnjax.save(tmp_path / "m", model)
    loaded = cnnjax.load(tmp_path / "m")
    same_bytes(model, loaded)
    assert loaded.provenance == model.provenance
    manifest = archive.read_manifest(tmp_path / "m")
    assert manifest["base"]["factory"] == "lenet_5"
    (tmp_path / "m" / "manifest.json").write_text(
        json.dumps(manifest | {"base": {"factory": "lenet_6", "kwargs": {}}})
    )
    with pytest.raises(archive.ArchiveError, match="unknown model 'lenet_6'.*Did you mean"):
        cnnjax.load(tmp_path / "m")


def test_factories_run_only_when_trusted(saved, monkeypatch):
    path, _ = saved
    monkeypatch.setattr(archive_factory, "make", lambda **k: pytest.fail("ran"))
    for trust in ((), {"archive_factory:make_other"}, "archive_factory"):
        with pytest.raises(archive.ArchiveError, match=r"not trusted.*pass trust=\{'archive_fac"):
            cnnjax.load(path, trust=trust)


def test_the_archive_holds_data_only(saved):
    path, _ = saved
    files = [p for p in path.rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in (".py", ".pyc", ".pkl", ".pickle", ".so")]
    for file in files:
        head = file.read_bytes()
        assert not head.startswith(b"\x80\x04"), file  # a pickle's first bytes
        assert b"lambda" not in head or file.name != "manifest.json"
    json.loads((path / "manifest.json").read_text())


def edit_manifest(path, target, **changes):
    shutil.copytree(path, target)
    manifest = json.loads((target / "manifest.json").read_text())
    for key, value in changes.items():
        manifest[key] = value(manifest[key]) if callable(value) else value
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_broken_archives_are_named(saved, tmp_path):
    path, _ = saved

    def check(target, message, error=archive.ArchiveError):
        with pytest.raises(error, match=message):
            cnnjax.load(target, trust={NAME})

    check(tmp_path / "none", "no archive at", FileNotFoundError)
    check(edit_manifest(path, tmp_path / "v", version=7), "format version 7.*reads version 1")
    check(edit_manifest(path, tmp_path / "f", format="x"), "not the manifest of a cnnjax archive")
    target = edit_manifest(path, tmp_path / "j")
    (target / "manifest.json").write_text("{")
    check(target, "is not JSON")
    target = edit_manifest(path, tmp_path / "m")
    shutil.rmtree(target / "arrays")
    check(target, "'arrays' is missing", FileNotFoundError)
    check(
        edit_manifest(path, tmp_path / "e", edits=lambda e: e[:1]),
        r"arrays do not fit the model.*the archive lacks head/(bias|kernel)",
    )
    check(
        edit_manifest(path, tmp_path / "u", edits=lambda e: [*e, {"kind": "opaqe"}]),
        "cannot be made again: unknown edit kind 'opaqe'",
    )

    def other_shape(arrays):
        return arrays | {"conv1/bias": arrays["conv1/bias"] | {"shape": [5]}}

    check(
        edit_manifest(path, tmp_path / "s", arrays=other_shape),
        r"conv1/bias is \(5,\), the model needs \(4,\)",
    )

    def other_sum(arrays):
        return arrays | {"conv1/bias": arrays["conv1/bias"] | {"crc32": 1}}

    check(edit_manifest(path, tmp_path / "c", arrays=other_sum), "array conv1/bias is damaged")


def test_a_model_changed_behind_surgerys_back_is_not_saved(tmp_path):
    model = archive_factory.make(rngs=nnx.Rngs(0))
    model.head = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    with pytest.raises(archive.ArchiveError, match=r"differences.*head.*cnnjax\.surgery only"):
        cnnjax.save(tmp_path / "m", model, factory=NAME)
    assert list(tmp_path.iterdir()) == []


def test_unknown_base_and_bad_factories(tmp_path):
    model = archive_factory.make(rngs=nnx.Rngs(0))
    with pytest.raises(archive.ArchiveError, match="came from is unknown"):
        cnnjax.save(tmp_path / "m", model)
    with pytest.raises(TypeError, match="belongs to factory="):
        cnnjax.save(tmp_path / "m", model, kwargs={})
    with pytest.raises(archive.ArchiveError, match="not of the form"):
        cnnjax.save(tmp_path / "m", model, factory="make")
    with pytest.raises(archive.ArchiveError, match="cannot be imported"):
        cnnjax.save(tmp_path / "m", model, factory="archive_factory:mak")
    with pytest.raises(archive.ArchiveError, match="top level"):
        cnnjax.save(tmp_path / "m", model, factory=lambda: model)
    abstract = surgery.abstract(model)
    with pytest.raises(archive.ArchiveError, match="abstract: there are no numbers"):
        cnnjax.save(tmp_path / "m", abstract, factory=NAME)


def test_overwriting_is_explicit_and_a_failure_keeps_the_old_archive(saved, tmp_path, monkeypatch):
    _, model = saved
    path = tmp_path / "m"
    cnnjax.save(path, model, factory=NAME)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        cnnjax.save(path, model, factory=NAME)
    before = (path / "manifest.json").read_bytes()
    changed = surgery.map_leaves(model, lambda p, x: x * 2 if p == "conv1/bias" else x)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(archive.arrays, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            cnnjax.save(path, changed, factory=NAME, overwrite=True)
    real = os.rename

    def second_rename_fails(a, b):
        if pathlib.Path(a).name == "new":
            raise OSError("rename refused")
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_rename_fails)
        with pytest.raises(OSError, match="rename refused"):
            cnnjax.save(path, changed, factory=NAME, overwrite=True)
    assert (path / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    same_bytes(model, cnnjax.load(path, trust={NAME}))
    cnnjax.save(path, changed, factory=NAME, overwrite=True)
    same_bytes(changed, cnnjax.load(path, trust={NAME}))
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="not an archive"):
        cnnjax.save(tmp_path / "mine", model, factory=NAME, overwrite=True)
