"""What all methods have in common: gate, mask and shrink agree; determinism; a fair protocol."""

from __future__ import annotations

import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import graph as G
from cnnjax import pipeline, pruning, tree
from cnnjax.pipeline.context import Context
from cnnjax.pipeline.registry import Carry, Outcome
from cnnjax.pipeline.stages import Branches, Select
from cnnjax.pipeline.stages import branches as branches_module
from cnnjax.pipeline.stages.masking import params_of, with_params
from cnnjax.pruning import gates, importance, merging, noise, obs, prox, random_masks
from cnnjax.pruning import reconstruction as rec
from cnnjax.pruning.importance import curvature

RNG = np.random.default_rng(40)
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DATA = pipeline.DataConfig("digits")
POINTS = {"stem": 6, "first": 5, "point": 4, "last": 4, "fc1": 8}


class Motifs(nnx.Module):
    """BatchNorm, residual sum, depthwise, concatenation, flattening, dense: every boundary."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(1, 6, (3, 3), rngs=rngs)
        self.norm0 = nnx.BatchNorm(6, rngs=rngs)
        self.first = nnx.Conv(6, 5, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(5, rngs=rngs)
        self.second = nnx.Conv(5, 6, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(6, rngs=rngs)
        self.depth = nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs)
        self.point = nnx.Conv(6, 4, (1, 1), rngs=rngs)
        self.last = nnx.Conv(10, 4, (3, 3), strides=2, rngs=rngs)
        self.fc1 = nnx.Linear(36, 8, rngs=rngs)
        self.fc2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, gate=lambda name, x: x):
        relu = jax.nn.relu
        x = gate("stem", relu(self.norm0(self.stem(x))))
        h = gate("first", relu(self.norm1(self.first(x))))
        x = gate("stem", relu(x + self.norm2(self.second(h))))
        h = gate("stem", relu(self.depth(x)))
        h = gate("point", relu(self.point(h)))
        x = gate("last", relu(self.last(jnp.concatenate([x, h], axis=-1))))
        x = gate("fc1", relu(self.fc1(x.reshape(x.shape[0], -1))))
        return self.fc2(x)


@pytest.fixture(scope="module")
def motifs():
    """(model with nothing at zero, graph, images with labels, logits(params, factors))."""
    graphdef, state = nnx.split(nnx.eval_shape(Motifs))

    def fill(leaf):
        flat = len(leaf.shape) == 1  # biases, scales and statistics: positive
        values = RNG.uniform(0.3, 1, leaf.shape) if flat else RNG.normal(size=leaf.shape) / 3
        return jnp.asarray(values, jnp.float32)

    model = nnx.merge(graphdef, jax.tree.map(fill, state))
    model.eval()
    image = RNG.normal(size=(24, 6, 6, 1)).astype(np.float32)
    data = {"image": jnp.asarray(image), "label": jnp.asarray(RNG.integers(0, 3, 24))}
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def logits(pure, factors):
        state = jax.tree.map(lambda x: x, params)
        nnx.replace_by_pure_dict(state, pure)
        net = nnx.merge(graphdef, state, rest, copy=True)
        return net(data["image"], lambda name, x: x * factors[name])

    return model, G.trace(model, data["image"][:1]), data, logits


def open_gates():
    return {name: jnp.ones(n) for name, n in POINTS.items()}


def three_ways(motifs, keep):
    """Logits of the network gated behind its activations, with masked weights, and shrunk."""
    model, found, data, logits = motifs
    factors = open_gates()
    for name in factors:
        factors[name] = jnp.asarray(found.axis(f"{name}/kernel").alive(keep.alive), jnp.float32)
    params = params_of(model)
    masked = pruning.apply_mask(params, pruning.channel_mask(params, found, keep.alive))
    small = pruning.shrink(model, found, keep, check=False)
    assert sum(w.size for w in jax.tree.leaves(params_of(small))) < 0.8 * tree.count(params)
    run = nnx.jit(lambda m, x: m(x))
    return logits(params, factors), logits(masked, open_gates()), run(small, data["image"])


RATIO = {"stem": 0.3, "first": 0.4, "point": 0.5, "last": 0.5, "fc1": 0.25}
METHODS = ("l1", "l2", "random", "bn_scale", "fpgm", "lasso", "thinet", "fisher", "apoz", "hrank")
IDS = {
    "l1": "l1_filter_pruning", "lasso": "lasso_channel_pruning", "thinet": "thinet",
    "fisher": "fisher_pruning", "apoz": "average_percentage_of_zeros",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n,
            marks=[pytest.mark.method(IDS.get(n, "structured_surgery"))]
            + ([] if n == "l1" else [pytest.mark.slow]),
        )
        for n in METHODS
    ],
)
def test_gate_mask_and_shrink_agree_whoever_selects(motifs, name, tmp_path):
    model, found, data, _ = motifs
    ratio = {n: r for n, r in RATIO.items() if name != "bn_scale" or n in ("stem", "first")}
    context = Context(data_config=DATA, seed=3, name="s", folder=tmp_path, progress=False)
    keep = Select(name, ratio)._keep(model, found, [data], context)
    widths = {n: int(m.sum()) for n, m in keep.groups}
    assert all(widths[n] == POINTS[n] - int(np.ceil(r * POINTS[n])) for n, r in ratio.items())
    gated, masked, small = three_ways(motifs, keep)
    np.testing.assert_allclose(masked, gated, atol=1e-5)
    np.testing.assert_allclose(small, gated, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gates", marks=[pytest.mark.method("hard_concrete_l0"), pytest.mark.slow]),
        pytest.param("proximal", marks=pytest.mark.method("forward_backward_splitting")),
        pytest.param(
            "merging", marks=[pytest.mark.method("data_free_neuron_merging"), pytest.mark.slow]
        ),
    ],
)
def test_training_time_methods_end_in_a_network_that_shrinks_exactly(motifs, name):
    model, found, data, logits = motifs
    params = params_of(model)
    if name == "gates":
        spec = dict.fromkeys(("second/kernel", "fc2/kernel"), "channel")
        trained = gates.gated(params, spec, key=jax.random.key(0))
        for path in spec:
            trained["gates"][path] = trained["gates"][path].at[..., 1:4, :].set(-4.0)
        context = types.SimpleNamespace(train=False, key=None)
        want = logits(gates.reparam(spec)(trained, context), open_gates())
        params = gates.fold(trained, spec)[0]
        gone = {"first": 3, "fc1": 3}
    elif name == "proximal":
        spec, gone = {}, {"point": 2, "last": 2, "fc1": 3}
        for path, count in gone.items():
            w, b = (np.asarray(params[path][k]) for k in ("kernel", "bias"))
            size = np.sort(np.sqrt(np.sum(w**2, axis=tuple(range(w.ndim - 1))) + b**2))
            op = pruning.Prox("group_l2", float(size[count - 1]) * 1.001, group="filter")
            spec[f"{path}/kernel"] = op
        params = pruning.prox_tree(params, 1.0, spec)
        want = logits(params, open_gates())
    else:
        merged, kept = pruning.merge_neurons(params, "fc1", "fc2", 3)
        alive = np.isin(np.arange(8), kept)
        whole = {k: dict(v) for k, v in params.items()}
        whole["fc1"] = {k: jnp.where(alive, v, 0) for k, v in params["fc1"].items()}
        out = jnp.zeros_like(params["fc2"]["kernel"])
        whole["fc2"]["kernel"] = out.at[kept].set(merged["fc2"]["kernel"])
        params, gone = whole, {"fc1": 3}
        want = logits(params, {**open_gates(), "fc1": jnp.asarray(alive, jnp.float32)})
    alive = jax.tree.map(lambda w: np.asarray(w) != 0, params)
    keep = pruning.dead_channels(found, alive)
    widths = {n: int(m.sum()) for n, m in keep.groups}
    assert widths == {**POINTS, **{n: POINTS[n] - k for n, k in gone.items()}}
    np.testing.assert_allclose(logits(params, open_gates()), want, atol=1e-5)
    small = pruning.shrink(with_params(model, params), found, keep, check=False)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(small, data["image"]), want, atol=1e-5)


NET = {
    "a": {"kernel": jnp.asarray(RNG.normal(size=(3, 8)), jnp.float32), "bias": jnp.ones(8)},
    "b": {"kernel": jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)},
}
BATCH = jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32)


def size_of(params):
    h = jax.nn.relu(BATCH @ params["a"]["kernel"] + params["a"]["bias"])
    return jnp.mean(jnp.square(h @ params["b"]["kernel"]))


CHOICES = {
    "random_scores": lambda key: importance.random(NET, key),
    "best_of_n": lambda key: (
        pruning.best_of_n(key, NET, size_of, ratio=0.5, count=8, include="a/kernel").mask
    ),
    "particle_filter": lambda key: (
        pruning.particle_filter(
            key, lambda bits: jnp.sum(bits * jnp.arange(8.0)), 8, 4, particles=8, generations=1
        ).mask
    ),
    "random_mask": lambda key: pruning.random_mask(key, NET, {"a/kernel": 0.5}),
    "resample": lambda key: random_masks.systematic_resample(key, jnp.full(9, 1 / 9), 9),
    "hard_concrete": lambda key: gates.sample(key, jnp.zeros(20)),
    "dropout": lambda key: noise.dropout(key, BATCH, 0.5),
    "evolutional_dropout": lambda key: noise.evolutional_dropout(key, BATCH),
    "hutchinson": lambda key: curvature.hutchinson_diagonal(
        NET, lambda p, batch: size_of(p), [BATCH], key=key, samples=1
    ),
}
SAME_ANYWAY = ("particle_filter", "resample")  # other keys may well end at the same place
QUICK = ("random_scores", "hard_concrete", "dropout")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CHOICES]
)
def test_the_same_key_gives_the_same_choice(name):
    one, same, other = (jax.device_get(CHOICES[name](jax.random.key(k))) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    if name not in SAME_ANYWAY:
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        assert any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.method("magnitude_prune_retrain")
@pytest.mark.method("optimal_brain_surgeon")
@pytest.mark.method("thinet")
def test_of_equal_scores_the_lower_index_decides(motifs):
    equal = {"k": jnp.ones((2, 4))}
    half = [[1, 1, 1, 1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(pruning.mask_from_scores(equal, 0.5)["k"], half)
    np.testing.assert_array_equal(pruning.magnitude_mask(equal, 0.5)["k"], half)
    np.testing.assert_array_equal(pruning.project_l0(equal, {"k": 4})[1]["k"], half)
    np.testing.assert_array_equal(prox.l0_ball(jnp.ones(6), 2), [1, 1, 0, 0, 0, 0])
    groups = pruning.mask_from_scores(equal, 0.5, granularity="filter")
    np.testing.assert_array_equal(groups["k"], [[1, 1, 0, 0]] * 2)
    blocks = pruning.n_m_mask({"k": jnp.ones((4, 1))}, 2, 4)["k"]
    np.testing.assert_array_equal(blocks[:, 0], [1, 1, 0, 0])
    # where one is picked after another the lowest index goes first
    assert list(obs.obs(jnp.ones(5), jnp.eye(5), 3).order) == [0, 1, 2]
    assert list(rec.thinet_order(jnp.eye(4))[:3]) == [0, 1, 2]
    same = merging.merge(jnp.ones((2, 4)), jnp.ones(4), jnp.ones((4, 3)), 2)
    assert [sorted(map(int, p)) for p in same.pairs] == [[0, 1], [0, 2]]
    masks = {"k": jnp.asarray([[1, 0], [0, 1], [1, 0]], bool)}
    flat = pruning.best_of_masks({"k": jnp.ones(2)}, masks, lambda p: jnp.sum(p["k"]))
    np.testing.assert_array_equal(flat.mask["k"], [1, 0])
    found = motifs[1]
    keep = pruning.select_channels(found, {"first/kernel": np.ones(5)}, ratio=0.4)
    assert dict(keep.groups)["first"].tolist() == [False, False, True, True, True]
    _, order = pruning.fisher_select(found, np.zeros(found.num_atoms), count=2)
    assert order == [int(found.groups[0].atoms[0]), int(found.groups[0].atoms[1])]


@pytest.mark.method("lasso_channel_pruning")
@pytest.mark.method("optimal_brain_surgeon")
def test_gram_matrices_are_summed_as_in_float64():
    """float32 data in 300 batches, a mean a hundred times the spread: plain sums lose digits."""
    x = (100 + RNG.normal(size=(300, 8, 3))).astype(np.float32)
    wide = x.reshape(-1, 3).astype(np.float64)
    want = wide.T @ wide / len(wide)

    @jax.jit
    def total(x):
        start = rec.Moments.zeros(3, 1)
        return jax.lax.scan(lambda m, b: (m.add(b, b[:, :1]), None), start, x)[0]

    moments = total(jnp.asarray(x))
    gram = sum(np.asarray(part, np.float64) for part in moments.gram) / len(wide)
    np.testing.assert_allclose(gram, want, rtol=3e-7)
    plain = np.zeros((3, 3), np.float32)
    for batch in x:
        plain += batch.T @ batch
    assert np.abs(plain / len(wide) - want).max() > 3 * np.abs(gram - want).max()
    second = obs.second_moment(wide.astype(np.float32))
    assert second.dtype == np.float64
    np.testing.assert_allclose(second, want, rtol=1e-12)


def test_branches_are_compared_fairly(motifs, tmp_path, monkeypatch):
    """The same dense network into every branch, equal training, figures before and after."""
    model, _, data, _ = motifs
    seen = []

    class Step:
        def __init__(self, label):
            self.label = label

        def run(self, network, context):
            seen.append((self.label, network.model, context.seed, context.data))
            return Outcome(network, {})

    monkeypatch.setattr(branches_module, "Train", lambda recipe: Step(recipe))
    accuracies = iter(np.arange(8) / 8)
    monkeypatch.setattr(branches_module, "_top1", lambda *a: float(next(accuracies)))
    monkeypatch.setattr(branches_module, "example_image", lambda context: data["image"][:1])
    recipe = pipeline.Recipe(epochs=2.0)
    stage = Branches({n: Step(n) for n in ("dense", "l1", "random", "scratch")}, recipe)
    context = Context(data_config=DATA, seed=4, name="s", folder=tmp_path, progress=False)
    curve = stage.run(Carry(model, None), context).curve
    assert [s[0] for s in seen[::2]] == ["dense", "l1", "random", "scratch"]
    assert all(s[0] is recipe for s in seen[1::2])
    assert all(s[1] is model and s[2] == 4 and s[3] == context.data for s in seen)
    for i, point in enumerate(curve):
        assert (point["accuracy_first"], point["accuracy"]) == (i / 4, i / 4 + 0.125)


@pytest.mark.parametrize("name", ["cifar10_vgg16_pruning", "cifar10_resnet56_pruning"])
def test_recipes_and_their_figures_hold_the_baselines(name):
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    stages = config.to_dict()["stages"]["methods"]["branches"]
    assert {"dense", "random", "scratch"} <= set(stages)
    assert stages["scratch"]["fresh"]
    assert stages["scratch"]["ratio"] == stages["random"]["ratio"] == stages["l1"]["ratio"]
    assert not stages["dense"]["ratio"]
    record = json.loads((CONFIGS / "results" / f"{name}.json").read_text())
    points = {p["branch"]: p for p in record["branches"]}
    assert set(points) <= set(stages)
    for branch in ("dense", "random", "scratch", "l1"):
        assert {"error_first", "error", "macs_share", "params_share"} <= set(points[branch])
