"""The report's accept line: exact counts, masked against shrunk, ratios from raw counts."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import graph, models, pruning, report


class Wide(nnx.Module):
    """Two convolutions and a dense layer; ``width`` channels in between."""

    def __init__(self, width, *, rngs):
        self.a = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.b = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.b(jax.nn.relu(self.a(x))))
        return self.fc(x.mean((1, 2)))


def masked_and_shrunk(width, ratio, image):
    """The network, the one with whole filters masked, and the smaller one."""
    model = Wide(width, rngs=nnx.Rngs(0))
    model.eval()
    example = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    found = graph.trace(model, example)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = pruning.magnitude_mask(
        params, ratio, granularity="filter", scope="layer", include=("a/**", "b/**")
    )
    gated = nnx.clone(model)
    state = nnx.state(gated, nnx.Param)
    nnx.replace_by_pure_dict(state, pruning.apply_mask(params, mask))
    nnx.update(gated, state)
    small = pruning.shrink(gated, found, pruning.dead_channels(found, mask))
    return model, gated, small, example


@pytest.mark.method("evaluation_report")
def test_masked_and_shrunk_agree_but_only_the_shrunk_one_costs_less():
    model, gated, small, example = masked_and_shrunk(16, 0.75, (8, 8, 3))
    x = np.random.default_rng(0).normal(size=(20, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(gated(x), small(x), atol=1e-5)  # so any accuracy is equal
    dense, masked, shrunk = (report.measure(m, example) for m in (model, gated, small))
    # an unstructured runtime does all dense products; the mask only lowers the effective ones
    assert masked["macs"] == dense["macs"] == 64 * 9 * (3 * 16 + 16 * 16) + 160
    assert shrunk["macs"] == 64 * 9 * (3 * 4 + 4 * 4) + 40
    assert masked["params"] == dense["params"] > shrunk["params"] == 9 * 28 + 4 + 4 + 50
    assert shrunk["effective_macs"] == shrunk["macs"]
    # reads of dead channels are still counted: filters only were masked
    assert shrunk["macs"] < masked["effective_macs"] < masked["macs"]
    for one in (dense, masked, shrunk):
        assert one["compression"] == one["params"] / one["nonzeros"]  # from the raw counts
        assert one["bytes"] == 4 * one["params"]
        assert one["sparse_bytes"] <= one["bytes"]
    assert masked["activation_peak"] == dense["activation_peak"] > shrunk["activation_peak"]


@pytest.mark.method("evaluation_report")
@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        # batch norm's scale and shift counted; the pruning papers' tables leave them out
        ("resnet56_cifar", 853_018, 125_485_696),
        ("resnet110_cifar", 1_727_962, 252_887_680),
    ],
)
def test_counts_of_the_reference_networks(name, params, macs):
    profile = graph.profile(
        models.abstract(name), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    )
    assert (profile.params, profile.macs) == (params, macs)


@pytest.mark.slow
@pytest.mark.method("evaluation_report")
def test_only_shrinking_lowers_the_latency():
    model, gated, small, _ = masked_and_shrunk(96, 0.75, (32, 32, 3))
    run = nnx.jit(lambda m, x: m(x))
    x = jnp.ones((8, 32, 32, 3))
    best = [np.inf] * 3
    for _ in range(15):  # taking turns, the cheapest of each
        for i, m in enumerate((model, gated, small)):
            began = time.perf_counter()
            jax.block_until_ready(run(m, x))
            best[i] = min(best[i], time.perf_counter() - began)
    dense, masked, shrunk = best
    assert shrunk < 0.5 * dense
    assert masked > 0.7 * dense
