"""A budget in measured seconds inside `select_channels`: with a clock that counts MACs."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import cnnjax
from cnnjax import graph as G
from cnnjax import pruning

X = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)


@pytest.fixture
def clock(monkeypatch):
    """A device whose seconds are a network's MACs; returns what was measured on it."""
    runs = []

    def latency(model, *inputs, calls, warmup):
        runs.append(cnnjax.profile(model, *inputs).macs)
        assert (calls, warmup) == (3, 1)
        return SimpleNamespace(median=float(runs[-1]))

    monkeypatch.setattr(importlib.import_module("cnnjax.pruning.latency"), "latency", latency)
    return runs


def test_the_widest_network_within_measured_seconds(clock):
    model = cnnjax.models.abstract("resnet20_cifar")
    read = G.trace(model, X)
    scores = {p: jax.numpy.arange(1.0, s[-1] + 1) for p, s in read.shapes.items() if len(s) == 4}
    full = cnnjax.profile(model, X).macs
    cost = pruning.measured_latency(model, read, calls=3, warmup=1)
    options = {"scope": "layer", "min_width": 1, "round_to": 2}
    keep = pruning.select_channels(read, scores, latency=0.5 * full, cost=cost, **options)
    left = cnnjax.profile(pruning.shrink(model, read, keep), X).macs
    assert left <= 0.5 * full
    # the same decision as for a budget of as many MACs, which counts instead of measuring
    other = pruning.select_channels(read, scores, macs=0.5, **options)
    assert (keep.alive == other.alive).all()
    # bisection: few networks are measured, each once
    assert len(clock) == len(set(clock)) <= 12
    with pytest.raises(ValueError, match="out of reach"):
        pruning.select_channels(read, scores, latency=1.0, cost=cost, **options)


def test_what_is_left_of_resnet56_is_counted_alike_by_the_profile():
    model = cnnjax.models.abstract("resnet56_cifar")
    read = G.trace(model, X)
    scores = {p: jax.numpy.arange(1.0, s[-1] + 1) for p, s in read.shapes.items() if len(s) == 4}
    keep = pruning.select_channels(read, scores, macs=0.5, scope="global", normalize="mean")
    found = cnnjax.profile(pruning.shrink(model, read, keep), X)
    costs = pruning.CostModel(read)
    assert found.macs == costs.macs(keep.alive) <= 0.5 * costs.macs(read.alive())
    assert found.params == costs.params(keep.alive)
