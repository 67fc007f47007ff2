"""Programs that the tests run as processes of their own: ``python training_worker.py WHAT ...``."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import threading
import time

import jax
import numpy as np
from flax import nnx
from training_helpers import ArrayIterator, TinyConv, arrays, digest

from cnnjax import training


def build(total: int):
    schedule = training.build_schedule(
        training.ScheduleConfig("cosine", base=0.1, unit="steps", warmup=4), total_steps=total
    )
    tx = training.build_optimizer(training.OptimizerConfig(weight_decay=1e-3), schedule)
    network, state = training.create_state(TinyConv(rngs=nnx.Rngs(0)), tx, seed=7, ema=True)
    config = training.StepConfig(ema_decay=0.9)
    step = training.make_train_step(network, tx, config=config, learning_rate=schedule)
    return network, step, state


class Slow(ArrayIterator):
    """Leaves time to be killed in."""

    pause = 0.0

    def __next__(self):
        time.sleep(self.pause)
        return super().__next__()


def _die_in_a_save(folder: pathlib.Path) -> None:
    """Kills the process as soon as an unfinished checkpoint is seen on the disk."""
    while True:
        if any("tmp" in p.name for p in folder.glob("*")):
            os.kill(os.getpid(), signal.SIGKILL)


def run(workdir: str, total: str, pause: str, mode: str = "") -> None:
    """Trains with a checkpoint every 5 steps and prints the hash of all that was trained."""
    _, step, state = build(int(total))
    data = Slow(arrays(), 16)
    data.pause = float(pause)
    if mode == "die-in-save":
        folder = pathlib.Path(workdir) / "checkpoints"
        threading.Thread(target=_die_in_a_save, args=(folder,), daemon=True).start()
    config = training.FitConfig(int(total), log_every=4, checkpoint_every=5, progress=False)
    result = training.fit(step, state, data, config, workdir=workdir)
    print("DIGEST", digest(result.state), flush=True)


def distributed(port: str, processes: str, index: str, workdir: str) -> None:
    """Trains data-parallel as one of several processes and prints the losses."""
    training.initialize_distributed(f"127.0.0.1:{port}", int(processes), int(index))
    mesh = training.data_mesh()
    _, step, state = build(6)
    data = ArrayIterator(arrays(), 16, part=int(index), parts=int(processes))
    config = training.FitConfig(6, log_every=1, checkpoint_every=3, progress=False)
    result = training.fit(step, state, data, config, workdir=workdir, mesh=mesh)
    params = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), result.state.params))
    if jax.process_index() == 0:
        losses = [r["loss"] for r in result.history if r["kind"] == "train"]
        flat = {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(params)}
        np.savez(pathlib.Path(workdir) / "out.npz", losses=losses, **flat)
    print("DIGEST", digest(params), flush=True)


if __name__ == "__main__":
    cache = os.environ.get("CNNJAX_TEST_CACHE")
    training.enable_compilation_cache(cache if cache else None, min_seconds=0)
    {"run": run, "distributed": distributed}[sys.argv[1]](*sys.argv[2:])
