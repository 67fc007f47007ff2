"""Data parallelism: 8 simulated devices against one, and two real processes against one."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from training_helpers import ArrayIterator, TinyConv, arrays
from training_worker import build

from cnnjax import training

HERE = pathlib.Path(__file__).parent


def _single(steps):
    _, step, state = build(6)
    data = ArrayIterator(arrays(), 16)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, next(data))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_equal_one(accumulate):
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices")
    mesh = training.data_mesh()
    assert mesh.axis_names == ("data",)
    out = []
    for parallel in (None, mesh):
        schedule = training.build_schedule(
            training.ScheduleConfig("cosine", base=0.1), total_steps=6
        )
        tx = training.build_optimizer(training.OptimizerConfig(weight_decay=1e-3), schedule)
        network, state = training.create_state(TinyConv(rngs=nnx.Rngs(0)), tx, ema=True)
        config = training.StepConfig(ema_decay=0.9, accumulate=accumulate)
        step = training.make_train_step(network, tx, config=config, mesh=parallel)
        test = training.make_eval_step(network, mesh=parallel)
        put = None if parallel is None else (lambda b: training.shard_batch(b, mesh))
        result = training.fit(
            step,
            state,
            ArrayIterator(arrays(), 16),
            training.FitConfig(5, log_every=1, progress=False),
            mesh=parallel,
            evaluate=lambda s, t=test, p=put: training.evaluate(t, s, [arrays(32)], put=p),
        )
        out.append(result)
    one, eight = out
    for a, b in zip(one.history, eight.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert one.last()["top1"] == eight.last()["top1"]
    # BatchNorm's statistics and dropout's masks are those of the global batch
    for a, b in zip(
        jax.tree.leaves((one.state.params, one.state.stats, one.state.ema)),
        jax.tree.leaves((eight.state.params, eight.state.stats, eight.state.ema)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    leaf = jax.tree.leaves(eight.state.params)[0]
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.sharding.device_set) == 8


def test_shard_batch_places_rows_and_refuses_odd_ones():
    mesh = training.data_mesh()
    n = mesh.size
    batch = {"image": np.arange(2 * n * 3).reshape(2 * n, 3), "label": np.arange(2 * n)}
    out = training.shard_batch(batch, mesh)
    np.testing.assert_array_equal(out["image"], batch["image"])
    assert out["image"].addressable_shards[0].data.shape == (2, 3)
    stacked = training.shard_batch({"image": np.zeros((3, n, 2))}, mesh, stacked=True)
    assert stacked["image"].addressable_shards[0].data.shape == (3, 1, 2)
    with pytest.raises(ValueError, match=f"{2 * n - 1} rows .* {n} devices"):
        training.shard_batch({"label": np.zeros(2 * n - 1)}, mesh)


def test_replicate_copies():
    mesh = training.data_mesh()
    tree = {"a": jax.numpy.arange(3.0), "key": jax.random.key(3)}
    out = training.replicate(tree, mesh)
    out["a"].delete()
    np.testing.assert_array_equal(tree["a"], [0, 1, 2])
    assert out["key"].sharding.is_fully_replicated
    np.testing.assert_array_equal(jax.random.key_data(out["key"]), [0, 3])


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _launch(workdir, processes):
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    env["JAX_PLATFORMS"] = "cpu"
    env["CNNJAX_TEST_CACHE"] = jax.config.jax_compilation_cache_dir
    port = _free_port()
    running = [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / "training_worker.py"),
                "distributed",
                str(port),
                str(processes),
                str(i),
                str(workdir),
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        outputs = [p.communicate(timeout=150) for p in running]
    finally:
        for p in running:
            if p.poll() is None:
                p.kill()
                p.communicate()
    for p, (_, err) in zip(running, outputs, strict=True):
        assert p.returncode == 0, err[-3000:]
    return [out.split("DIGEST ")[1].split()[0] for out, _ in outputs]


def test_two_processes_equal_one(tmp_path):
    # 2 processes with 2 devices each; each reads its half of every batch
    digests = _launch(tmp_path, 2)
    assert digests[0] == digests[1]
    state, losses = _single(6)
    got = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(got["losses"], losses, atol=1e-5)
    for path, leaf in jax.tree.leaves_with_path(state.params):
        np.testing.assert_allclose(got[jax.tree_util.keystr(path)], leaf, rtol=1e-5, atol=1e-5)
    # a second start finds the run complete, with the same parameters
    assert _launch(tmp_path, 2) == digests


def test_incomplete_or_wrong_addresses_are_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ValueError, match="give all three"):
        training.initialize_distributed()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is 'two'"):
        training.initialize_distributed()
