"""The shortcuts stand in the functions' places for one run only, and keep out of others' way."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import graph as g
from cnnjax import surgery
from cnnjax.graph import direct, shortcuts

PLACES = [(holder, name) for holder, name, _, _ in shortcuts._PLACES]
X = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)


def standing():
    return [getattr(holder, name) for holder, name in PLACES]


@pytest.fixture(autouse=True)
def as_found():
    before = standing()
    yield
    assert standing() == before
    assert shortcuts._running == 0


class Net(nnx.Module):
    def __init__(self, rngs, hook=None):
        self.conv1 = nnx.Conv(3, 4, (3, 3), padding=((1, 1), (1, 1)), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(8, 5, (1, 1), padding=((0, 0), (0, 0)), rngs=rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)
        self.hook = hook

    def __call__(self, x):
        x = jax.nn.relu(self.bn(self.conv1(x)))
        if self.hook is not None:
            self.hook()
        x = self.conv2(jnp.concatenate([x, x * 2], -1))
        return self.head(x.mean((1, 2)))


def net(hook=None):
    return nnx.eval_shape(lambda: Net(nnx.Rngs(0), hook))


def test_they_are_there_while_a_model_runs_and_gone_after():
    before, seen = standing(), []
    g.trace(net(lambda: seen.append(standing())), X)
    assert all(a is not b for a, b in zip(before, seen[0]))


def test_they_are_gone_after_an_exception_inside_the_model():
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        g.trace(net(fail), X)
    with pytest.raises(KeyError), shortcuts.shortcuts():
        raise KeyError("inside")


def test_who_has_patched_a_function_keeps_the_patch(monkeypatch):
    calls = []
    own = nnx.BatchNorm.__call__

    def patched(self, *args, **kwargs):
        calls.append(self)
        return own(self, *args, **kwargs)

    want = str(g.trace(net(), X))
    monkeypatch.setattr(nnx.BatchNorm, "__call__", patched)
    assert str(g.trace(net(), X)) == want
    assert calls
    assert nnx.BatchNorm.__call__ is patched
    # patched while the model runs, and never taken back: it stays as well
    first = jax.numpy.concatenate

    def other(*args, **kwargs):
        return first(*args, **kwargs)

    def patch():
        jax.numpy.concatenate = other

    try:
        assert str(g.trace(net(patch), X)) == want
        assert jax.numpy.concatenate is other
    finally:
        jax.numpy.concatenate = first
        if first is shortcuts._concatenate:  # pragma: no cover
            jax.numpy.concatenate = shortcuts._call_concatenate


def test_a_trace_inside_a_trace():
    inner = []
    outer = g.trace(net(lambda: inner.append(str(g.trace(net(), X)))), X)
    assert inner[0] == str(outer)


def test_other_arrays_are_computed_as_ever_meanwhile():
    rng = np.random.default_rng(0)
    real = surgery.map_leaves(
        net(), lambda _, a: jnp.asarray(0.5 + 0.1 * np.abs(rng.normal(size=a.shape)), a.dtype)
    )
    real.eval()
    x = jnp.asarray(rng.normal(size=X.shape), jnp.float32)
    want, got = real(x), []

    def elsewhere():  # in this thread everything is traced
        worker = threading.Thread(target=lambda: got.append(np.asarray(real(x))))
        worker.start()
        worker.join(60)

    g.trace(net(elsewhere), X)
    np.testing.assert_array_equal(got[0], want)


def test_threads_share_them():
    """One thread runs its model to the end while another stands in the middle of its own."""
    inside, go_on = threading.Event(), threading.Event()

    def wait():
        inside.set()
        assert go_on.wait(60)

    found, want = {}, str(g.trace(net(), X))
    slow = threading.Thread(target=lambda: found.update(slow=str(g.trace(net(wait), X))))
    slow.start()
    assert inside.wait(60)
    there = standing()
    found["fast"] = str(g.trace(net(), X))
    assert standing() == there
    go_on.set()
    slow.join(60)
    assert found == {"slow": want, "fast": want}


def test_the_fused_batchnorm_writes_down_what_its_steps_do(monkeypatch):
    """With and without scale and bias, on other axes: the same graph as step by step."""

    class Many(nnx.Module):
        def __init__(self, rngs):
            options = [(True, True), (True, False), (False, True), (False, False)]
            self.norms = nnx.List(
                [nnx.BatchNorm(4, use_scale=a, use_bias=b, rngs=rngs) for a, b in options]
            )
            self.stem = nnx.Conv(3, 4, (1, 1), rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            x = self.stem(x)
            for norm in self.norms:
                x = jax.nn.relu(norm(x))
            return self.head(x.mean((1, 2)))

    def make():
        read = g.trace(nnx.eval_shape(lambda: Many(nnx.Rngs(0))), X)
        return (str(read), [str(x) for x in read.layers], read.links, read.notes,
                [c for c, _ in read.literals])  # fmt: skip

    fused = []
    at_once = shortcuts._at_once
    monkeypatch.setattr(shortcuts, "_at_once", lambda *a: fused.append(at_once(*a)) or fused[-1])
    one = make()
    assert len(fused) == 4
    assert all(type(x) is direct.Labelled for x in fused)
    monkeypatch.setattr(shortcuts, "_at_once", lambda *a: None)
    assert make() == one
