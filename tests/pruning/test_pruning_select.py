"""Selection against numpy, exact costs against a second profile, budgets, options, refusals."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import graph as G
from cnnjax import pruning
from cnnjax.pruning import importance
from cnnjax.pruning.aggregate import score_atoms


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.conv1 = nnx.Conv(width, 12, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(12, rngs=rngs)
        self.conv2 = nnx.Conv(12, width, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(x + self.bn2(self.conv2(y)))


class Net(nnx.Module):
    """Stem, two residual blocks, a plain convolution, flatten, two dense layers."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Block(8, rngs) for _ in range(2)])
        self.last = nnx.Conv(8, 20, (3, 3), strides=2, rngs=rngs)
        self.fc1 = nnx.Linear(20 * 9, 16, rngs=rngs)
        self.fc2 = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.last(x)).reshape(x.shape[0], -1)
        return self.fc2(nnx.relu(self.fc1(x)))


X = jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)
RESIDUAL = ("stem", "blocks/0/conv2", "blocks/1/conv2")


@pytest.fixture(scope="module")
def net():
    """(model with random numbers, its graph, numpy parameters by path)."""
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    model = cnnjax.surgery.map_leaves(
        model, lambda _, x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    )
    graph = G.trace(model, X)
    return model, graph, {p: np.asarray(x) for p, x in cnnjax.surgery.leaves(model).items()}


def params_of(model):
    return nnx.state(model, nnx.Param)


def kept(keep, graph, path, axis=-1):
    return graph.axis(path, axis).kept(keep.alive)


@pytest.mark.method("l1_filter_pruning")
@pytest.mark.parametrize(("score", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.6, 0.85])
def test_layer_scope_removes_the_smallest_filters_and_ceil_of_the_ratio(net, score, power, ratio):
    model, graph, values = net
    keep = pruning.select_channels(
        graph, importance.get(score)(params_of(model)), ratio=ratio, reduce="sum"
    )

    def survivors(paths):
        total = sum(
            (np.abs(values[f"{p}/kernel"].astype(np.float64)) ** power)
            .reshape(-1, values[f"{p}/kernel"].shape[-1])
            .sum(0)
            for p in paths
        )
        gone = int(np.ceil(round(ratio * len(total), 9)))
        return np.sort(np.argsort(total, kind="stable")[gone:])

    for path in ("blocks/0/conv1", "blocks/1/conv1", "last", "fc1"):
        np.testing.assert_array_equal(kept(keep, graph, f"{path}/kernel"), survivors([path]))
    for path in RESIDUAL:
        np.testing.assert_array_equal(kept(keep, graph, f"{path}/kernel"), survivors(RESIDUAL))
    assert len(kept(keep, graph, "fc2/kernel")) == 4  # the model's output stays
    # the dense layer behind the flatten loses the rows of every position
    rows = (np.arange(9)[:, None] * 20 + kept(keep, graph, "last/kernel")).ravel()
    np.testing.assert_array_equal(kept(keep, graph, "fc1/kernel", 0), rows)


def test_reductions_over_the_axes_of_a_group(net):
    _, graph, _ = net
    rng = np.random.default_rng(1)
    scores = {f"{p}/kernel": rng.normal(size=8) for p in RESIDUAL}
    stack = np.stack([scores[f"{p}/kernel"] for p in RESIDUAL])
    atoms = graph.axis("stem/kernel").labels
    for how, want in {
        "sum": stack.sum(0), "mean": stack.mean(0), "max": stack.max(0), "min": stack.min(0),
        "l2": np.sqrt((stack**2).sum(0)),
    }.items():  # fmt: skip
        got, scored = score_atoms(graph, scores, reduce=how)
        np.testing.assert_allclose(got[atoms], want)
        assert scored.sum() == 8
    # an elementwise score: reduced within the filter
    weights = {"last/kernel": rng.normal(size=(3, 3, 8, 20))}
    atoms = graph.axis("last/kernel").labels
    for how, want in {
        "sum": weights["last/kernel"].sum((0, 1, 2)), "max": weights["last/kernel"].max((0, 1, 2)),
        "l2": np.sqrt((weights["last/kernel"] ** 2).sum((0, 1, 2))),
    }.items():  # fmt: skip
        got, _ = score_atoms(graph, weights, within=how)
        np.testing.assert_allclose(got[atoms], want)
    # of the dense layer's kernel only its outputs make channels
    got, _ = score_atoms(graph, {"fc1/kernel": np.ones((180, 16))})
    np.testing.assert_allclose(got[graph.axis("fc1/kernel").labels], 180)
    assert got[graph.axis("last/kernel").labels].sum() == 0


def test_global_scope_removes_the_lowest_anywhere(net):
    _, graph, _ = net
    rng = np.random.default_rng(2)
    scores = {f"{p}/kernel": rng.uniform(size=n) + low for p, n, low in (
        ("stem", 8, 0.6), ("blocks/0/conv1", 12, 0.0), ("blocks/1/conv1", 12, 0.2),
        ("last", 20, 0.4), ("fc1", 16, 0.5))}  # fmt: skip
    keep = pruning.select_channels(graph, scores, ratio=0.3, scope="global")
    flat = np.sort(np.concatenate(list(scores.values())))
    gone = int(np.ceil(0.3 * len(flat)))
    for path, s in scores.items():
        np.testing.assert_array_equal(kept(keep, graph, path), np.flatnonzero(s > flat[gone - 1]))


def test_global_scope_never_empties_a_group(net):
    _, graph, _ = net
    scores = {f"{p}/kernel": np.full(n, v) + np.arange(n) for p, n, v in (
        ("stem", 8, 1e3), ("blocks/0/conv1", 12, 0.0), ("last", 20, 1e3))}  # fmt: skip
    keep = pruning.select_channels(graph, scores, ratio=0.5, scope="global")
    assert len(kept(keep, graph, "blocks/0/conv1/kernel")) == 1
    keep = pruning.select_channels(graph, scores, ratio=0.5, scope="global", min_width=5)
    np.testing.assert_array_equal(kept(keep, graph, "blocks/0/conv1/kernel"), np.arange(7, 12))


def test_isomorphic_scope_ranks_among_equal_structures(net):
    _, graph, _ = net
    rng = np.random.default_rng(3)
    scores = {
        "blocks/0/conv1/kernel": rng.uniform(size=12),
        "blocks/1/conv1/kernel": rng.uniform(size=12) + 0.3,
        "last/kernel": rng.uniform(size=20) + 5,
        "fc1/kernel": rng.uniform(size=16) + 9,
    }
    keep = pruning.select_channels(graph, scores, ratio=0.5, scope="isomorphic")
    both = np.sort(np.concatenate([scores[f"blocks/{i}/conv1/kernel"] for i in (0, 1)]))
    for i in (0, 1):
        path = f"blocks/{i}/conv1/kernel"
        np.testing.assert_array_equal(
            kept(keep, graph, path), np.flatnonzero(scores[path] > both[11])
        )
    # other structures lose their own half, however high their scores
    assert len(kept(keep, graph, "last/kernel")) == 10
    assert len(kept(keep, graph, "fc1/kernel")) == 8


def test_normalisation_makes_groups_comparable(net):
    _, graph, _ = net
    rng = np.random.default_rng(4)
    a, b = rng.uniform(1, 2, 20), rng.uniform(1, 2, 16)
    for how in ("mean", "max", "sum", "l2", "standard"):
        plain = {"last/kernel": a, "fc1/kernel": b}
        scaled = {"last/kernel": 1000 * a, "fc1/kernel": b}
        first, second = (
            pruning.select_channels(graph, s, ratio=0.4, scope="global", normalize=how)
            for s in (plain, scaled)
        )
        np.testing.assert_array_equal(first.alive, second.alive)
        assert 0 < len(kept(second, graph, "last/kernel")) < 20


def test_rounding_minimum_width_and_exemptions(net):
    model, graph, _ = net
    scores = importance.l1(params_of(model))
    tied = graph.group_of("stem/kernel").name
    keep = pruning.select_channels(graph, scores, ratio=0.6, round_to=4)
    widths = {g.name: int(keep.alive[g.atoms].sum()) for g in graph.groups}
    assert widths == {
        tied: 4, "blocks/0/conv1": 4, "blocks/1/conv1": 4, "last": 8, "fc1": 8,
    }  # fmt: skip
    keep = pruning.select_channels(graph, scores, ratio=0.9, min_width=6)
    assert {int(m.sum()) for _, m in keep.groups} == {6}
    keep = pruning.select_channels(graph, scores, ratio=0.5, exclude=["blocks/*/conv1/**", "fc*"])
    assert {n: int(m.sum()) for n, m in keep.groups} == {
        tied: 4, "blocks/0/conv1": 12, "blocks/1/conv1": 12, "last": 10, "fc1": 16,
    }  # fmt: skip
    # a module that shares the group exempts all of it
    keep = pruning.select_channels(graph, scores, ratio=0.5, exclude="blocks/1/conv2")
    assert len(kept(keep, graph, "stem/kernel")) == 8
    keep = pruning.select_channels(graph, scores, ratio={"blocks/*/conv1": 0.25, "last": 0.5})
    assert {n: int(m.sum()) for n, m in keep.groups} == {
        tied: 8, "blocks/0/conv1": 9, "blocks/1/conv1": 9, "last": 10, "fc1": 16,
    }  # fmt: skip


def test_costs_equal_a_second_profile_of_the_shrunk_network(net):
    model, graph, _ = net
    costs = pruning.CostModel(graph)
    for seed in range(4):
        scores = importance.random(params_of(model), jax.random.key(seed))
        keep = pruning.select_channels(graph, scores, ratio=0.2 * (seed + 1), min_width=1)
        small = pruning.shrink(cnnjax.surgery.abstract(model), graph, keep)
        found = cnnjax.profile(small, X)
        assert costs.macs(keep.alive) == found.macs
        assert costs.params(keep.alive) == found.params
        assert costs.bytes(keep.alive) == found.param_bytes


@pytest.mark.parametrize("scope", ["layer", "global", "isomorphic"])
@pytest.mark.parametrize(("kind", "share"), [("macs", 0.5), ("params", 0.3), ("bytes", 0.7)])
def test_budgets_are_met_and_not_undercut(net, scope, kind, share):
    model, graph, _ = net
    scores = importance.l1(params_of(model))
    cost = getattr(pruning.CostModel(graph), kind)
    full = cost(graph.alive())
    options = {"scope": scope, "normalize": "mean"}
    for budget in (share, round(share * full)):
        keep = pruning.select_channels(graph, scores, **{kind: budget}, **options)
        assert cost(keep.alive) <= share * full
    # by an exhaustive scan over ratios: the widest decision of this kind that fits
    if scope == "layer":
        ratios = sorted({k / n for n in (8, 12, 16, 20) for k in range(n)})
        fits = [
            k for r in ratios
            if cost((k := pruning.select_channels(
                graph, scores, ratio=r, min_width=1, **options)).alive) <= share * full
        ]  # fmt: skip
        np.testing.assert_array_equal(fits[0].alive, keep.alive)
    else:
        assert cost(keep.alive) > 0.85 * share * full


def test_latency_budget_uses_the_given_cost(net):
    model, graph, _ = net
    scores = importance.l1(params_of(model))
    asked = []

    def seconds(alive):
        asked.append(alive.sum())
        return 1e-3 * float(alive.sum())

    keep = pruning.select_channels(graph, scores, latency=0.03, cost=seconds, scope="global")
    assert keep.alive.sum() == 30
    assert len(asked) < 12
    with pytest.raises(ValueError, match="latency= needs cost="):
        pruning.select_channels(graph, scores, latency=0.03)
    with pytest.raises(ValueError, match="belongs to latency="):
        pruning.select_channels(graph, scores, macs=0.5, cost=seconds)


def test_keep_is_data(net):
    model, graph, _ = net
    keep = pruning.select_channels(graph, importance.l1(params_of(model)), ratio=0.5)
    again = pruning.Keep.from_json(graph, json.dumps(keep.to_json()))
    np.testing.assert_array_equal(again.alive, keep.alive)
    assert "blocks/0/conv1      6 / 12" in str(keep)
    assert keep.removed == sum(not a for a in keep.alive)
    with pytest.raises(ValueError, match=r"no group 'lst'\. Did you mean 'last'"):
        pruning.Keep.from_json(graph, {"groups": {"lst": {"size": 8, "removed": []}}})
    with pytest.raises(ValueError, match="has 20 channels, the decision was made for 9"):
        pruning.Keep.from_json(graph, {"groups": {"last": {"size": 9, "removed": []}}})


def test_keep_by_positions_and_broken_ties(net):
    _, graph, _ = net
    keep = pruning.Keep.of_positions(graph, {"last/kernel": [0, 3, 7], "stem/kernel": range(6)})
    assert kept(keep, graph, "last/kernel").tolist() == [0, 3, 7]
    assert kept(keep, graph, "blocks/1/conv2/kernel").tolist() == list(range(6))
    with pytest.raises(ValueError, match=r"conv2/kernel\[7\] and stem/kernel\[7\] are tied"):
        pruning.Keep.of_positions(
            graph, {"stem/kernel": range(6), "blocks/0/conv2/kernel": [0, 1, 2, 3, 4, 5, 7]}
        )
    with pytest.raises(ValueError, match=r"fc2/kernel' axis -1 can't go: the model's output"):
        pruning.Keep.of_positions(graph, {"fc2/kernel": [0]})
    with pytest.raises(ValueError, match=r"positions 0\.\.7, got"):
        pruning.Keep.of_positions(graph, {"stem/kernel": [8]})
    with pytest.raises(ValueError, match="would be empty"):
        pruning.Keep.of_positions(graph, {"last/kernel": []})
    with pytest.raises(KeyError, match="Did you mean 'stem/kernel'"):
        pruning.Keep.of_positions(graph, {"stem/kernl": [0]})
    with pytest.raises(ValueError, match=r"alive has shape \(3,\)"):
        pruning.Keep.of(graph, np.ones(3))


def test_bad_options_are_named(net):
    model, graph, _ = net
    scores = importance.l1(params_of(model))

    def refused(message, error=ValueError, scores=scores, **options):
        with pytest.raises(error, match=message):
            pruning.select_channels(graph, scores, **options)

    refused("give exactly one of ratio.*got none")
    refused("got macs, ratio", ratio=0.5, macs=0.5)
    refused(r"ratio 0\.99 would empty '[^']+' \(8 channels\)", ratio=0.99)
    refused("between 0 and 1; got 1.5", ratio=1.5)
    refused("scope 'globl' is unknown. Did you mean 'global'", ratio=0.5, scope="globl")
    refused("normalize 'men' is unknown", ratio=0.5, normalize="men")
    refused("exclude 'stme/kernel' matches nothing. Did you mean 'stem/kernel'",
            ratio=0.5, exclude="stme/kernel")  # fmt: skip
    refused("ratio's glob 'block/.*' matches nothing", ratio={"block/**": 0.5})
    refused("needs scope='layer'", ratio={"last": 0.5}, scope="global")
    refused("out of reach: the narrowest network.* has", macs=1e-6)
    refused("must be positive", macs=-1.0)
    refused("round_to and min_width must be at least 1", ratio=0.5, round_to=0)
    refused("no group can be pruned", ratio=0.5, exclude="**")
    refused("Did you mean 'last/kernel'", KeyError, {"lst/kernel": np.ones(20)}, ratio=0.5)
    refused(r"shape \(19,\); expected", scores={"last/kernel": np.ones(19)}, ratio=0.5)
    refused("hold NaN", scores={"last/kernel": np.full(20, np.nan)}, ratio=0.5)
    refused("no score belongs to a group", scores={"fc2/kernel": np.ones(4)}, ratio=0.5)


def test_statistics_over_channels_are_left_alone_unless_asked_for():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.b = nnx.Linear(8, 6, rngs=rngs)
            self.c = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.c(nnx.relu(self.b(self.norm(self.a(x)))))

    model = nnx.eval_shape(lambda: Normed(nnx.Rngs(0)))
    graph = G.trace(model, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    scores = {"a/kernel": np.arange(8.0), "b/kernel": np.arange(6.0)}
    keep = pruning.select_channels(graph, scores, ratio=0.5)
    assert {n: int(m.sum()) for n, m in keep.groups} == {"a": 8, "b": 3}
    keep = pruning.select_channels(graph, scores, ratio=0.5, statistics=True)
    assert {n: int(m.sum()) for n, m in keep.groups} == {"a": 4, "b": 3}


L1_COSTS = [
    # model, ratios by layer index (1-based, first conv of a block = 2 + 2 * block), MACs, weights
    ("vgg16_cifar", dict.fromkeys((1, 8, 9, 10, 11, 12, 13), 0.5), 206_279_680, 5_390_176),
    ("resnet56_cifar", "A", 112_435_840, 769_456),
    ("resnet56_cifar", "B", 90_907_264, 732_016),
    ("resnet110_cifar", "110-A", 212_779_648, 1_680_688),
    ("resnet110_cifar", "110-B", 155_124_352, 1_161_712),
]


def resnet_ratios(plan):
    n, rates, skip = {
        "A": (9, (0.1, 0.1, 0.1), (16, 20, 38, 54)),
        "B": (9, (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54)),
        "110-A": (18, (0.5, 0.0, 0.0), (36,)),
        "110-B": (18, (0.5, 0.4, 0.3), (36, 38, 74)),
    }[plan]
    return {
        2 + 2 * (s * n + b): (s, b, rates[s])
        for s in range(3) for b in range(n)
        if 2 + 2 * (s * n + b) not in skip
    }  # fmt: skip


@pytest.mark.method("l1_filter_pruning")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=f"{c[0]}-{i}", marks=[pytest.mark.slow] if i > 1 else [])
        for i, c in enumerate(L1_COSTS)
    ],
)
def test_costs_printed_in_the_l1_filter_pruning_paper(case):
    name, plan, macs, weights = case
    model = cnnjax.models.abstract(name)
    graph = G.trace(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    kernels = [layer.kernel for layer in graph.layers if layer.macs]
    if name == "vgg16_cifar":
        ratio = {graph.layer(k.rpartition("/")[0]).path: plan[i + 1]
                 for i, k in enumerate(kernels) if i + 1 in plan}  # fmt: skip
    else:
        ratio = {f"layer{s + 1}/{b}/conv1": r for s, b, r in resnet_ratios(plan).values()}
    scores = {k: np.arange(float(graph.shapes[k][-1])) for k in kernels}
    keep = pruning.select_channels(graph, scores, ratio=ratio)
    costs = pruning.CostModel(graph, variables=kernels)
    assert (costs.macs(keep.alive), costs.params(keep.alive)) == (macs, weights)


def test_conv_groups_with_one_output_each_stay_or_go_together():
    """Removing one of these outputs alone would leave a conv-group without outputs."""

    class Grouped(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Conv(3, 8, (1, 1), rngs=rngs)
            self.b = nnx.Conv(8, 4, (1, 1), feature_group_count=4, rngs=rngs)
            self.c = nnx.Conv(4, 2, (1, 1), rngs=rngs)

        def __call__(self, x):
            return self.c(nnx.relu(self.b(self.a(x))))

    model = nnx.eval_shape(lambda: Grouped(nnx.Rngs(0)))
    scores = {"a/kernel": np.arange(8.0), "b/kernel": np.arange(4.0)}
    graph = G.trace(model, X)
    keep = pruning.select_channels(graph, scores, ratio=0.5)
    assert kept(keep, graph, "a/kernel").tolist() == [1, 3, 5, 7]  # the better of each pair
    assert len(kept(keep, graph, "b/kernel")) == 4
    small = pruning.shrink(model, graph, keep)
    assert small.b.kernel.shape == (1, 1, 1, 4)
    # in the mode of whole conv-groups the lowest groups go, inputs and outputs
    whole = G.trace(model, X, mode="whole")
    keep = pruning.select_channels(whole, scores, ratio=0.5)
    small = pruning.shrink(model, whole, keep)
    assert small.b.feature_group_count == 2
    assert small.b.kernel.shape == (1, 1, 2, 2)
    # and in the mode of tied positions every group loses the same ones
    tied = G.trace(model, X, mode="tied")
    keep = pruning.select_channels(tied, scores, ratio=0.5)
    assert kept(keep, tied, "a/kernel").tolist() == [1, 3, 5, 7]
