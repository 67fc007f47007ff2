"""Real processes, killed at random moments, resumed: the same bytes as one that never died."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import pytest

from cnnjax import training

HERE = pathlib.Path(__file__).parent
TOTAL = 60
LIMIT = 90.0  # seconds a process may take before the test gives up


def _environment():
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    env["JAX_PLATFORMS"] = "cpu"
    env["CNNJAX_TEST_CACHE"] = jax.config.jax_compilation_cache_dir
    return env


def _launch(*args):
    return subprocess.Popen(
        [sys.executable, str(HERE / "training_worker.py"), *map(str, args)],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(process):
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.fixture
def start():
    """Starts workers; whatever still runs at the end is killed."""
    running = []

    def go(*args):
        running.append(_launch(*args))
        return running[-1]

    yield go
    for process in running:
        _end(process)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The hash of a run that is never killed."""
    process = _launch("run", tmp_path_factory.mktemp("whole"), TOTAL, 0)
    try:
        return _finish(process)
    finally:
        if process.poll() is None:
            _end(process)


def _finish(process):
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err[-3000:]
    return out.split("DIGEST ")[1].split()[0]


def _wait_for(process, condition):
    """Polls until the condition holds, or fails if the process ends or time runs out."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def _steps(folder):
    return [int(p.name) for p in folder.glob("*") if p.name.isdigit()]


def _newest(folder):
    return max(_steps(folder), default=0)


def _check_records(path):
    """Every step is in exactly one training record."""
    records = [r for r in training.read_jsonl(path) if r["kind"] == "train"]
    done = 0
    for record in records:
        assert record["step"] - record["steps"] == done, records
        done = record["step"]
    assert done == TOTAL


def test_killed_five_times_ends_with_the_same_bytes(tmp_path, start, whole):
    work = tmp_path / "killed"
    folder = work / "checkpoints"
    rng = random.Random(0)
    # once in the middle of a save: the process kills itself when it sees the unfinished folder
    process = start("run", work, TOTAL, 0, "die-in-save")
    assert process.wait(LIMIT) == -signal.SIGKILL
    assert _steps(folder) == []
    assert len(list(folder.iterdir())) == 1  # the unfinished one
    kills = 1
    while kills < 6:
        process = start("run", work, TOTAL, 0.02)
        at = _newest(folder)
        # get past the start-up and at least one save, so that the run moves on; then any moment
        _wait_for(process, lambda at=at: _newest(folder) > at)
        time.sleep(rng.uniform(0.0, 0.09))
        process.send_signal(signal.SIGKILL)
        assert process.wait(LIMIT) == -signal.SIGKILL
        kills += 1
    assert _newest(folder) < TOTAL
    assert _finish(start("run", work, TOTAL, 0)) == whole
    _check_records(work / "metrics.jsonl")
    assert sorted(p.name for p in folder.iterdir()) == ["55", "60"]


def test_sigterm_saves_and_exits_with_zero(tmp_path, start, whole):
    work = tmp_path / "w"
    process = start("run", work, TOTAL, 0.05)
    _wait_for(process, lambda: _newest(work / "checkpoints") >= 5)
    process.terminate()
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err[-3000:]
    assert "DIGEST" not in out
    saved = _newest(work / "checkpoints")
    assert 5 < saved < TOTAL
    assert _finish(start("run", work, TOTAL, 0)) == whole
    _check_records(work / "metrics.jsonl")
