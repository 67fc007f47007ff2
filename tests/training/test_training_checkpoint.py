"""Checkpoints: round trips, refusal of other networks, damage, full disks."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training_helpers import TinyConv, TinyMLP, arrays, digest

from cnnjax import training
from cnnjax.training import Checkpointer, CheckpointError, CheckpointMismatchError


def _state(model=None, tx=None, **kwargs):
    tx = tx or optax.sgd(0.1, momentum=0.9)
    return training.create_state(model or TinyMLP(rngs=nnx.Rngs(0)), tx, **kwargs)[1]


def _at(state, step):
    return state.replace(step=jnp.asarray(step, jnp.int32))


def test_round_trip_of_everything(tmp_path):
    extra = {
        "mask": {"a": jnp.array([True, False])},
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(5),
        "list": [jnp.ones((), jnp.int8)],
    }
    tx = optax.adam(0.1)
    state = _at(_state(TinyConv(rngs=nnx.Rngs(0)), tx, ema=True, extra=extra, seed=3), 7)
    position = {"next": 12, "of": ["a", 1.5, None]}
    with Checkpointer(tmp_path / "c", config={"name": "x", "rate": 0.1}) as c:
        c.save(state, iterator=position)
    template = _state(TinyConv(rngs=nnx.Rngs(1)), tx, ema=True, extra=extra, seed=4)
    assert digest(template) != digest(state)
    with Checkpointer(tmp_path / "c") as c:
        got = c.restore(template)
    assert digest(got.state) == digest(state)
    assert jax.tree.structure(got.state) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(got.state)] == [
        x.dtype for x in jax.tree.leaves(state)
    ]
    assert got.iterator == position
    assert got.config == {"name": "x", "rate": 0.1}
    np.testing.assert_array_equal(
        jax.random.bits(got.state.extra["key"], (3,)), jax.random.bits(jax.random.key(5), (3,))
    )


def test_saved_bytes_survive_the_donation_of_the_state(tmp_path):
    tx = optax.sgd(0.1)
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), tx)
    step = training.make_train_step(network, tx)
    batch = arrays(16)
    expected = digest(state)
    with Checkpointer(tmp_path) as c:
        c.save(state, iterator=b"\x00\xff")
        for _ in range(3):  # reuses the buffers while the save goes on
            state, _ = step(state, batch)
        c.wait()
        got = c.restore(_state(tx=tx))
    assert digest(got.state) == expected
    assert got.iterator == b"\x00\xff"


def test_keeps_the_newest_and_skips_what_is_there(tmp_path):
    state = _state()
    with Checkpointer(tmp_path, keep=2) as c:
        assert c.latest() is None
        for s in (1, 2, 3, 3):
            c.save(_at(state, s))
        c.wait()
        assert c.steps() == [2, 3]
        assert int(c.restore(state, step=2).state.step) == 2
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 1.*\[2, 3\]"):
            c.restore(state, step=1)
    with Checkpointer(tmp_path / "none") as c, pytest.raises(FileNotFoundError, match="none"):
        c.restore(state)
    with pytest.raises(ValueError, match="keep"):
        Checkpointer(tmp_path, keep=0)


def test_checkpoint_of_another_model_names_the_paths(tmp_path):
    with Checkpointer(tmp_path) as c:
        c.save(_state(), wait=True)
        with pytest.raises(CheckpointMismatchError, match=r"missing: params/conv/bias"):
            c.restore(_state(TinyConv(rngs=nnx.Rngs(0))))
        wide = TinyMLP(rngs=nnx.Rngs(0), hidden=9)
        match = r"params/first/bias: float32\[8\], expected float32\[9\]"
        with pytest.raises(CheckpointMismatchError, match=match):
            c.restore(_state(wide))
        with pytest.raises(CheckpointMismatchError, match="opt_state"):
            c.restore(_state(tx=optax.adam(0.1)))
        with pytest.raises(CheckpointMismatchError, match="not in this run: opt_state"):
            c.restore(_state(tx=optax.sgd(0.1)))


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


# where one array can't be read, Orbax drops the readers of the others without awaiting them
ABANDONED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@ABANDONED
@pytest.mark.parametrize("damage", ["truncate", "delete", "flip"])
def test_damaged_checkpoint(tmp_path, damage):
    state = _state(TinyMLP(rngs=nnx.Rngs(0), hidden=64))
    with Checkpointer(tmp_path) as c:
        for s in (1, 2):
            c.save(_at(state, s), wait=True)
        largest = max(_files(tmp_path / "2" / "state"), key=lambda p: p.stat().st_size)
        data = bytearray(largest.read_bytes())
        if damage == "truncate":
            largest.write_bytes(data[: len(data) // 2])
        elif damage == "delete":
            largest.unlink()
        else:
            data[len(data) // 2] ^= 0xFF
            largest.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"2 is damaged.*go on from step 1"):
            c.restore(state)
        assert int(c.restore(state, step=1).state.step) == 1
    gc.collect()  # here, not within the next test


@ABANDONED
def test_missing_metadata(tmp_path):
    state = _state()
    with Checkpointer(tmp_path) as c:
        c.save(_at(state, 1), wait=True)
        for file in _files(tmp_path / "1" / "meta"):
            file.unlink()
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            c.restore(state)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    state = _state()
    with Checkpointer(tmp_path) as c:
        c.save(_at(state, 1), wait=True)

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as m:
            m.setattr(c._manager, "save", full)
            match = r"step 2 in .*No space left.*last good one is step 1"
            with pytest.raises(CheckpointError, match=match):
                c.save(_at(state, 2))
        assert c.steps() == [1]
        assert digest(c.restore(state).state) == digest(_at(state, 1))
        c.save(_at(state, 2), wait=True)  # there is space again
        assert c.steps() == [1, 2]


def test_really_full_file_system(tmp_path):
    # a limit on the size of files makes the write itself fail, in the background thread
    code = textwrap.dedent(
        """
        import resource, signal, sys
        import jax.numpy as jnp, numpy as np
        from cnnjax.training import Checkpointer, CheckpointError, TrainState
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        import jax
        noise = np.random.default_rng(0).normal(size=40_000).astype(np.float32)
        def state(step):
            return TrainState(jnp.int32(step), {"w": jnp.asarray(noise)}, {}, jax.random.key(0), ())
        c = Checkpointer(sys.argv[1])
        c.save(state(1), wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        try:
            c.save(state(2), wait=True)
        except CheckpointError as error:
            print("ERROR", error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, -1))
        c = Checkpointer(sys.argv[1])
        assert c.steps() == [1], c.steps()
        np.testing.assert_array_equal(c.restore(state(0)).state.params["w"], noise)
        print("INTACT")
        """
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "INTACT" in out.stdout, out.stderr[-2000:]
    assert "ERROR" in out.stdout
    assert "last good one is step 1" in out.stdout


def test_unwritable_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OSError, match="work folder cannot be written") as error:
        training.check_workdir(file / "below")
    assert str(file / "below") in str(error.value)
    assert not (tmp_path / "file").is_dir()


def test_position_that_is_not_json(tmp_path):
    with Checkpointer(tmp_path) as c:
        with pytest.raises(CheckpointError, match="neither bytes nor JSON-able"):
            c.save(_state(), iterator={"a": object()})
        with pytest.raises(TypeError):
            Checkpointer(tmp_path, config=object())
