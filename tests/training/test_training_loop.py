"""The loop: records, evaluation, resume, preemption, and its errors."""

from __future__ import annotations

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training_helpers import ArrayIterator, TinyMLP, arrays, digest

from cnnjax import training
from cnnjax.training import FitConfig, NonFiniteLossError, Preempted, StepConfig


def _setup(rate=0.1, **config):
    schedule = training.build_schedule(
        training.ScheduleConfig("linear", base=rate), total_steps=100
    )
    tx = training.build_optimizer(training.OptimizerConfig(), schedule)
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0)), tx)
    step = training.make_train_step(
        network, tx, config=StepConfig(**config), learning_rate=schedule
    )
    return network, step, state


def _data():
    return ArrayIterator(arrays(), 16)


def _quiet(total, **kwargs):
    return FitConfig(total, progress=False, **kwargs)


def test_records_are_exact_means(tmp_path):
    network, step, state = _setup()
    losses, expected = [], []
    data = _data()
    for _ in range(10):
        state, metrics = step(state, next(data))
        losses.append(float(metrics["loss"]))
    expected = digest(state)
    network, step, state = _setup()
    test = training.make_eval_step(network)
    calls = []

    def evaluate(s):
        calls.append(int(s.step))
        return training.evaluate(test, s, [arrays(32)])

    result = training.fit(
        step,
        state,
        _data(),
        _quiet(10, log_every=4, eval_every=6, checkpoint_every=5, tensorboard=True),
        workdir=tmp_path,
        evaluate=evaluate,
    )
    assert digest(result.state) == expected
    assert calls == [6, 10]
    train = [r for r in result.history if r["kind"] == "train"]
    # closed at every logging interval, evaluation and checkpoint
    assert [(r["step"], r["steps"]) for r in train] == [(4, 4), (5, 1), (6, 1), (8, 2), (10, 2)]
    done = 0
    for r in train:
        assert r["loss"] == pytest.approx(np.mean(losses[done : r["step"]]), rel=1e-6)
        done = r["step"]
    assert train[-1]["learning_rate"] == pytest.approx(0.1 * 0.91)
    assert result.last()["step"] == 10
    assert result.last()["count"] == 32
    assert result.history == training.read_jsonl(tmp_path / "metrics.jsonl")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    with pytest.raises(KeyError):
        result.last("other")


def test_resume_is_exact_and_complete_runs_do_nothing(tmp_path):
    _, step, state = _setup()
    whole = training.fit(step, state, _data(), _quiet(12), workdir=tmp_path / "a")
    _, step, state = _setup()
    training.fit(step, state, _data(), _quiet(7), workdir=tmp_path / "b")
    _, step, state = _setup()
    data = _data()
    result = training.fit(
        step, state, data, _quiet(12), workdir=tmp_path / "b", record={"name": "b"}
    )
    assert result.resumed_from == 7
    assert digest(result.state) == digest(whole.state)
    assert data.index == 12
    _, step, state = _setup()
    again = training.fit(step, state, _data(), _quiet(12), workdir=tmp_path / "b")
    assert again.resumed_from == 12
    assert digest(again.state) == digest(whole.state)
    assert again.history == result.history


def test_steps_per_call_in_the_loop(tmp_path):
    _, step, state = _setup()
    single = training.fit(step, state, _data(), _quiet(10, log_every=4))
    _, step, state = _setup(steps_per_call=4)
    many = training.fit(step, state, _data(), _quiet(10, log_every=4), workdir=tmp_path)
    for a, b in zip(
        jax.tree.leaves(single.state.params), jax.tree.leaves(many.state.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    keys = ("step", "steps")
    assert [[r[k] for k in keys] for r in many.history] == [
        [r[k] for k in keys] for r in single.history
    ]
    with pytest.raises(ValueError, match="3 is not a multiple of steps_per_call 4"):
        training.fit(step, many.state, _data(), _quiet(10, log_every=3))


def test_callbacks_change_the_state(tmp_path):
    _, step, state = _setup()
    seen = []

    def reset(state, now):
        seen.append(now)
        return state.replace(params=jax.tree.map(jnp.zeros_like, state.params))

    result = training.fit(step, state, _data(), _quiet(6), callbacks=[(3, reset)])
    assert seen == [3, 6]
    assert not any(np.any(p) for p in jax.tree.leaves(result.state.params))


@pytest.mark.parametrize("per_call", [1, 2])
def test_nan_names_step_rate_and_checkpoint(tmp_path, per_call):
    class Poisoned(ArrayIterator):
        def __next__(self):
            batch = super().__next__()
            if self.index == 8:  # the batch of step 7, counted from 0
                batch["image"] = batch["image"] * np.nan
            return batch

    _, step, state = _setup(steps_per_call=per_call)
    config = _quiet(20, log_every=10, checkpoint_every=4)
    with pytest.raises(NonFiniteLossError) as error:
        training.fit(step, state, Poisoned(arrays(), 16), config, workdir=tmp_path)
    assert error.value.step == 7
    assert error.value.learning_rate == pytest.approx(0.1 * 0.93)
    assert error.value.last_good == 4
    for part in ("nan", "step 7", "0.093", "last good checkpoint: step 4"):
        assert part in str(error.value)
    # what was saved is usable, and no record of the broken interval exists
    with training.Checkpointer(tmp_path / "checkpoints") as c:
        assert c.steps() == [4]
    assert [r["step"] for r in training.read_jsonl(tmp_path / "metrics.jsonl")] == [4]


def test_overflow_without_a_workdir():
    _, step, state = _setup(rate=1e30)
    with pytest.raises(NonFiniteLossError, match="no checkpoint was saved") as error:
        training.fit(step, state, _data(), _quiet(20, log_every=5))
    assert error.value.step < 5


def test_infinite_parameters_are_never_saved(tmp_path):
    _, step, state = _setup()
    bad = [(4, lambda s, now: s.replace(params=jax.tree.map(lambda p: p * jnp.inf, s.params)))]
    with pytest.raises(NonFiniteLossError, match="parameters are not finite at step 3"):
        training.fit(
            step, state, _data(), _quiet(8, checkpoint_every=4), workdir=tmp_path, callbacks=bad
        )
    with training.Checkpointer(tmp_path / "checkpoints") as c:
        assert c.latest() is None


def test_sigterm_saves_and_exits_zero(tmp_path):
    _, step, state = _setup()
    whole = training.fit(step, state, _data(), _quiet(12))
    old = signal.getsignal(signal.SIGTERM)

    def kill(state, now):
        if now == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return state

    _, step, state = _setup()
    with pytest.raises(Preempted) as error:
        training.fit(step, state, _data(), _quiet(12), workdir=tmp_path, callbacks=[(1, kill)])
    assert error.value.code == 0
    assert 5 <= error.value.step < 12
    assert signal.getsignal(signal.SIGTERM) is old
    _, step, state = _setup()
    result = training.fit(step, state, _data(), _quiet(12), workdir=tmp_path)
    assert result.resumed_from == error.value.step
    assert digest(result.state) == digest(whole.state)


def test_errors_before_training(tmp_path):
    def never(*_):
        raise AssertionError("trained")

    _, step, state = _setup()
    step = training.TrainStep(never, step.config)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        training.fit(step, state, _data(), _quiet(4), workdir=file)
    plain = iter([next(_data())] * 4)
    with pytest.raises(TypeError, match="get_state"):
        training.fit(step, state, plain, _quiet(4), workdir=tmp_path / "w")
    with pytest.raises(ValueError, match="total_steps"):
        FitConfig(0)
    with pytest.raises(ValueError, match="log_every"):
        FitConfig(1, log_every=-1)


def test_plain_iterators_work_without_a_workdir_and_may_not_end():
    batches = [next(_data())] * 3
    _, step, state = _setup()
    result = training.fit(step, state, iter(batches), _quiet(3))
    assert int(result.state.step) == 3
    _, step, state = _setup()
    with pytest.raises(ValueError, match="ended after 3 steps, 5 were asked"):
        training.fit(step, state, iter(batches), _quiet(5))


def test_resume_of_another_model(tmp_path):
    _, step, state = _setup()
    training.fit(step, state, _data(), _quiet(2), workdir=tmp_path)
    tx = optax.sgd(0.1)
    network, state = training.create_state(TinyMLP(rngs=nnx.Rngs(0), hidden=3), tx)
    step = training.make_train_step(network, tx)
    with pytest.raises(training.CheckpointMismatchError, match="first/kernel"):
        training.fit(step, state, _data(), _quiet(4), workdir=tmp_path)


def test_names_keep_stages_apart(tmp_path):
    for name in ("dense", "retrain"):
        _, step, state = _setup()
        training.fit(step, state, _data(), _quiet(2, name=name), workdir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "dense-checkpoints",
        "dense-metrics.jsonl",
        "retrain-checkpoints",
        "retrain-metrics.jsonl",
    ]
    lines = (tmp_path / "dense-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]
