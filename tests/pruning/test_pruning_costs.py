"""Costs printed in papers, from the graph alone: ThiNet's networks, the reduced recipes' widths."""

from __future__ import annotations

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnnjax
from cnnjax import graph as G
from cnnjax import pruning

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def decide(name, size, ratio, **fields):
    model = cnnjax.models.abstract(name, **fields)
    graph = G.trace(model, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    kernels = [layer.kernel for layer in graph.layers if layer.macs]
    scores = {k: np.arange(float(graph.shapes[k][-1])) for k in kernels}
    ratio = ratio([g.name for g in graph.groups]) if callable(ratio) else ratio
    return graph, kernels, pruning.select_channels(graph, scores, ratio=ratio)


@pytest.mark.method("thinet")
def test_thinet_conv_and_gap_of_vgg16():
    """Half of conv1_1 ... conv4_3; GAP: an average and one dense layer of 512 in place of three."""

    def half(names):
        return {n: 0.5 for n in names if n.startswith("stages/") and n[7] != "4"}

    graph, kernels, keep = decide("vgg16", 224, half)
    costs = pruning.CostModel(graph)
    assert (costs.params(keep.alive), 2 * costs.macs(keep.alive)) == (131_452_552, 9_582_411_776)
    convs = [k for k in kernels if k.startswith("stages/")]
    paths = [*convs, *(k.replace("kernel", "bias") for k in convs)]
    part = pruning.CostModel(graph, variables=paths)
    assert part.params(keep.alive) + 513_000 == 8_322_696
    dense = 25_088 * 4096 + 4096 * 4096 + 4096 * 1000
    assert 2 * (costs.macs(keep.alive) - dense + 512_000) == 9_336_168_448


@pytest.mark.method("thinet")
@pytest.mark.parametrize(
    ("kept", "params", "flops"), [(0.7, 16.945, 4.880), (0.5, 12.382, 3.413), (0.3, 8.665, 2.195)]
)
def test_thinet_of_resnet50(kept, params, flops):
    """``floor(kept w)`` of the first two convolutions of every bottleneck."""

    def inner(names):
        return {n: 1 - kept for n in names if n.endswith(("conv1", "conv2")) and "/" in n}

    graph, _, keep = decide("resnet50_v1", 224, inner)
    costs = pruning.CostModel(graph)
    assert round(costs.params(keep.alive) / 1e6, 3) == params
    assert round(2 * costs.macs(keep.alive) / 1e9, 3) == flops


@pytest.mark.method("l1_filter_pruning")
@pytest.mark.parametrize(
    ("config", "model", "macs", "weights"),
    [
        ("cifar10_vgg16_pruning", "vgg16_cifar", 206_279_680, 5_390_176),
        ("cifar10_resnet56_pruning", "resnet56_cifar", 90_907_264, 732_016),
    ],
)
def test_widths_of_the_recipes_are_the_papers(config, model, macs, weights):
    ratio = runpy.run_path(str(CONFIGS / f"{config}.py"))["paper_ratios"]()
    graph, kernels, keep = decide(model, 32, ratio)
    costs = pruning.CostModel(graph, variables=kernels)
    assert (costs.macs(keep.alive), costs.params(keep.alive)) == (macs, weights)


@pytest.mark.method("l1_filter_pruning")
@pytest.mark.parametrize("config", ["cifar10_vgg16_pruning", "cifar10_resnet56_pruning"])
def test_cuts_in_the_result_files_are_those_of_abstract_shapes(config):
    """What a run says of its network at the paper's ratios; all trainable scalars count."""
    record = json.loads((CONFIGS / "results" / f"{config}.json").read_text())
    point = next(p for p in record["branches"] if p["branch"] == "l1")
    ratio = runpy.run_path(str(CONFIGS / f"{config}.py"))["paper_ratios"]()
    model = record["config"]["model"]
    graph, _, keep = decide(model["name"], 32, ratio, **model["fields"])
    costs, whole = pruning.CostModel(graph), graph.alive()
    macs = costs.macs(keep.alive) / costs.macs(whole)
    weights = costs.params(keep.alive) / costs.params(whole)
    assert point["macs_share"]["mean"] == pytest.approx(macs, rel=1e-12)
    assert point["params_share"]["mean"] == pytest.approx(weights, rel=1e-12)
    if not record["reduced"] or model["name"] == "resnet56_cifar":  # widths of the paper
        published = {"vgg16_cifar": 206_279_680 / 313_463_808,
                     "resnet56_cifar": 90_907_264 / 125_485_696}  # fmt: skip
        assert macs == pytest.approx(published[model["name"]], rel=1e-12)


@pytest.mark.parametrize(("name", "size"), [("resnet20_cifar", 32), ("shufflenet_v1_g3", 64)])
def test_cost_of_many_decisions_is_that_of_each(name, size):
    """With plain channels and, in ShuffleNet, with joint ones of a channel shuffle."""
    model = cnnjax.models.abstract(name, num_classes=10)
    graph = G.trace(model, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    costs, rng = pruning.CostModel(graph), np.random.default_rng(0)
    alive = rng.random(graph.num_atoms) < 0.8
    atoms = rng.choice(np.flatnonzero(alive), 6, replace=False)
    each = [costs.macs(alive & (np.arange(graph.num_atoms) != a)) for a in atoms]
    np.testing.assert_array_equal(costs.macs_without(alive, atoms), each)
