"""Fisher pruning with a price, against explicit masks on the maps, recounts and brute force."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.stats import spearmanr

from cnnjax import data, graph, pipeline, pruning, training
from cnnjax.distillation import DistillConfig
from cnnjax.pipeline.stages import FisherDistill, KeepTeacher, Train

RNG = np.random.default_rng(5)
IMAGE = jax.ShapeDtypeStruct((1, 6, 6, 2), jnp.float32)


class Tiny(nnx.Module):
    """Stem, one residual block of batch normalised convolutions, a strided one, dense."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn0 = nnx.BatchNorm(4, rngs=rngs)
        self.conv1 = nnx.Conv(4, 3, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(3, rngs=rngs)
        self.conv2 = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(4, rngs=rngs)
        self.conv3 = nnx.Conv(4, 5, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, masks=None):
        m = masks or {"stream": 1.0, "inner": 1.0, "last": 1.0}
        x = nnx.relu(self.bn0(self.stem(x))) * m["stream"]
        y = nnx.relu(self.bn1(self.conv1(x))) * m["inner"]
        x = nnx.relu(x + self.bn2(self.conv2(y)) * m["stream"])
        x = nnx.relu(self.conv3(x)) * m["last"]
        return self.head(x.mean((1, 2)))


def perturbed():
    model = Tiny(nnx.Rngs(0))
    state = nnx.state(model)
    for path, leaf in nnx.to_flat_state(state):
        value = np.asarray(leaf.get_value(), np.float32)
        noise = 0.3 * RNG.standard_normal(value.shape)
        noise = np.abs(noise) if path[-1] == "var" else noise
        leaf.set_value(jnp.asarray(value + noise, jnp.float32))
    nnx.update(model, state)
    model.eval()
    return model


def setting():
    model = perturbed()
    found = graph.trace(model, IMAGE)
    network, params, stats = training.split_network(model)
    batch = {
        "x": jnp.asarray(RNG.standard_normal((10, 6, 6, 2)), jnp.float32),
        "y": jnp.asarray(RNG.integers(0, 3, 10)),
    }

    def loss(params, example):
        logits = network.model(params, stats)(example["x"][None])[0]
        return -jax.nn.log_softmax(logits)[example["y"]]

    return model, found, params, batch, loss


@pytest.mark.method("fisher_importance")
@pytest.mark.method("fisher_prune_flops")
def test_map_fisher_is_the_squared_gradient_of_explicit_masks():
    model, found, params, batch, loss = setting()
    got = pruning.map_fisher(params, found, loss, [batch], chunk=3)
    graphdef, state = nnx.split(model)

    def by_hand(masks, i):
        net = nnx.merge(graphdef, state, copy=True)
        return -jax.nn.log_softmax(net(batch["x"][i][None], masks)[0])[batch["y"][i]]

    ones = {"stream": jnp.ones(4), "inner": jnp.ones(3), "last": jnp.ones(5)}
    one = jax.jit(jax.grad(by_hand))
    each = [one(ones, i) for i in range(10)]
    paths = {"stream": "bn0/scale", "inner": "bn1/scale", "last": "conv3/kernel"}
    for name, path in paths.items():
        want = 0.5 * np.mean([np.asarray(g[name], np.float64) ** 2 for g in each], axis=0)
        atoms = found.axis(path).labels
        np.testing.assert_allclose(got[atoms], want, rtol=2e-3, atol=1e-8)
    # a central difference of one mask, and a channel that nobody reads
    bumped = [{**ones, "inner": ones["inner"].at[1].add(s)} for s in (0.01, -0.01)]
    up, down = (np.array([float(by_hand(m, i)) for i in range(3)]) for m in bumped)
    slope = (up - down) / 0.02
    np.testing.assert_allclose([g["inner"][1] for g in each[:3]], slope, atol=2e-3)
    silent = {**params, "head": {**params["head"]}}
    silent["head"]["kernel"] = params["head"]["kernel"].at[2].set(0.0)
    assert (
        pruning.map_fisher(silent, found, loss, [batch])[found.axis("conv3/kernel").labels[2]] == 0
    )
    with pytest.raises(ValueError, match="no example"):
        pruning.map_fisher(params, found, loss, [])


@pytest.mark.method("fisher_importance")
def test_the_gradient_of_a_mask_is_the_sum_of_map_times_gradient():
    model, found, params, batch, loss = setting()
    network, _, stats = training.split_network(model)
    with jax.enable_x64(True):
        params, batch = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            (params, batch),
        )
        capture = jax.jit(
            lambda p, x: graph.capture(
                network.model(p, stats), {"head": "input", "conv3": "output"}
            )(x)[1]
        )
        seen = capture(params, batch["x"])
        assert seen["conv3"].dtype == jnp.float64
        got = pruning.map_fisher(params, found, loss, [batch])
    w, b = (np.asarray(params["head"][k]) for k in ("kernel", "bias"))
    maps = np.maximum(np.asarray(seen["conv3"], np.float64), 0)
    logits = maps.mean((1, 2)) @ w + b
    q = np.exp(logits - logits.max(-1, keepdims=True))
    slope = q / q.sum(-1, keepdims=True) - np.eye(3)[np.asarray(batch["y"])]
    by_map = (slope @ w.T)[:, None, None] / (maps.shape[1] * maps.shape[2])  # dL/da
    want = 0.5 * np.mean((maps * by_map).sum((1, 2)) ** 2, axis=0)
    np.testing.assert_allclose(got[found.axis("conv3/kernel").labels], want, rtol=1e-10)


@pytest.mark.method("fisher_importance")
def test_half_the_hessian_where_masks_enter_the_logits_linearly():
    class Linear(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 6, use_bias=False, rngs=rngs)
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(self.hidden(x))

    model = Linear(nnx.Rngs(1))
    found = graph.trace(model, jax.ShapeDtypeStruct((1, 4), jnp.float32))
    network, params, stats = training.split_network(model)
    x = jnp.asarray(RNG.standard_normal((20, 4)), jnp.float32)
    q = jax.nn.softmax(network.model(params, stats)(x))
    # the expectation over the model's own labels: each class as an example of weight q
    batch = {
        "x": jnp.repeat(x, 3, axis=0),
        "y": jnp.tile(jnp.arange(3), 20),
        "w": q.reshape(-1),
    }

    def loss(params, e):
        logits = network.model(params, stats)(e["x"][None])[0]
        return -jnp.sqrt(e["w"]) * jax.nn.log_softmax(logits)[e["y"]]

    got = 3 * pruning.map_fisher(params, found, loss, [batch])  # a mean over 3 N
    h = np.asarray(x, np.float64) @ np.asarray(params["hidden"]["kernel"], np.float64)
    w = np.asarray(params["head"]["kernel"], np.float64)
    p = np.asarray(q, np.float64)
    # Hessian of the cross-entropy in mask k: a_k^2 w_k' (diag p - p p') w_k
    variance = (p @ (w.T**2)) - (p @ w.T) ** 2
    want = 0.5 * np.mean(h**2 * variance, axis=0)
    np.testing.assert_allclose(got[found.axis("hidden/kernel").labels], want, rtol=1e-4)


@pytest.mark.method("fisher_prune_flops")
def test_selection_orders_by_damage_by_cost_and_by_both():
    _, found, params, _, _ = setting()
    cost = pruning.CostModel(found)
    scores = RNG.random(found.num_atoms) + 0.1
    free, order = pruning.fisher_select(found, scores, beta=0.0, count=3)
    assert order == list(np.argsort(scores)[:3])
    assert (~free).sum() == 3
    # price alone: each removal is the one that saves most, recounted every time
    _, dear = pruning.fisher_select(found, scores, beta=1e9, count=4)
    alive = found.alive()
    for atom in dear:
        saved = {}
        for g in found.groups:
            for a in g.atoms[alive[g.atoms]]:
                if alive[g.atoms].sum() > 1:
                    trial = alive.copy()
                    trial[a] = False
                    saved[int(a)] = cost.macs(alive) - cost.macs(trial)
        assert saved[atom] == max(saved.values())
        alive[atom] = False
    # without a price: the smallest damage per multiply-accumulate saved
    _, ratio = pruning.fisher_select(found, scores, beta="auto", count=1)
    full = cost.macs(found.alive())
    value = []
    for a in range(found.num_atoms):
        trial = found.alive()
        trial[a] = False
        value.append(scores[a] / (full - cost.macs(trial)))
    assert ratio == [int(np.argmin(value))]
    # to the bottom: a channel of every group stays
    last, _ = pruning.fisher_select(found, scores, beta=0.0, count=10_000)
    assert all(last[g.atoms].sum() == 1 for g in found.groups)
    with pytest.raises(ValueError, match="out of reach"):
        pruning.fisher_select(found, scores, macs=1e-6)
    with pytest.raises(ValueError, match="when to stop"):
        pruning.fisher_select(found, scores)
    with pytest.raises(ValueError, match="price of computation"):
        pruning.fisher_select(found, scores, beta=-1.0, count=1)
    with pytest.raises(ValueError, match="'cheap'"):
        pruning.fisher_select(found, scores, beta="cheap", count=1)


@pytest.mark.method("fisher_prune_flops")
def test_masked_and_compacted_networks_agree_and_costs_are_recounted():
    model, found, params, batch, loss = setting()
    scores = pruning.map_fisher(params, found, loss, [batch])
    alive, _ = pruning.fisher_select(found, scores, beta="auto", macs=0.5)
    mask = pruning.channel_mask(params, found, alive)
    masked = jax.tree.map(lambda w, m: w * m, params, mask)
    network, _, stats = training.split_network(model)
    full = network.model(masked, stats)(batch["x"])
    small = pruning.shrink(network.model(masked, stats), found, pruning.Keep.of(found, alive))
    np.testing.assert_allclose(small(batch["x"]), full, atol=1e-5)
    macs = graph.profile(small, IMAGE).macs
    assert macs == pruning.CostModel(found).macs(alive)
    assert macs <= 0.5 * graph.profile(model, IMAGE).macs


def recipe(epochs):
    schedule = training.ScheduleConfig("cosine", base=5e-3)
    return pipeline.Recipe(epochs=epochs, schedule=schedule, checkpoint_every=0.0)


@pytest.mark.slow
@pytest.mark.method("fisher_prune_flops")
def test_the_stage_prunes_while_it_distils(tmp_path):
    data.info("digits", tmp_path / "tfds")
    kd = DistillConfig(hard=0.2, soft_weight=0.8)
    config = pipeline.config_dict(
        "demo",
        model=pipeline.ModelSpec("plain_cnn", {"widths": (6, 8), "hidden": (12,)}),
        data=pipeline.DataConfig(
            "digits",
            data_dir=str(tmp_path / "tfds"),
            batch_size=64,
            eval_batch_size=355,
            workers=0,
        ),
        stages={
            "teacher": Train(recipe(3.0)),
            "keep": KeepTeacher(),
            "pruned": FisherDistill(recipe(1.0), recipe(1.0), kd, macs=0.4, rounds=4, examples=64),
        },
    )
    config.data_parallel = False
    record = pipeline.run(config, tmp_path / "run", progress=False)["runs"][0]["stages"]
    teacher, last = record[0], record[-1]
    assert last["metrics"]["accuracy_masked"] == last["metrics"]["accuracy_compacted"]
    assert 0.2 < last["metrics"]["macs_share"] <= 0.4
    assert last["macs"] == pytest.approx(teacher["macs"] * last["metrics"]["macs_share"])
    shares = [point["macs_share"] for point in last["curve"]]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 4
    assert last["accuracy"] > 0.5
    with pytest.raises(ValueError, match="macs is 1.5"):
        FisherDistill(macs=1.5)
    with pytest.raises(ValueError, match="whose widths change"):
        FisherDistill(loss=DistillConfig(hint_weight=1.0, hints=(("a", "b"),)))


@pytest.mark.slow
@pytest.mark.method("fisher_importance")
def test_scores_rank_the_maps_of_a_trained_network_as_their_removal_does(tmp_path):
    """8 + 16 maps on digits: Spearman with the true loss of removing each; converges with N."""
    images, labels = data.arrays("digits", "train", tmp_path)
    x = jnp.asarray(np.asarray(images, np.float32) / 255)
    y = jnp.asarray(labels, jnp.int32)

    class Maps(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
            self.conv2 = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
            self.head = nnx.Linear(256, 10, rngs=rngs)

        def __call__(self, x, first=1.0, second=1.0):
            x = nnx.relu(self.conv1(x)) * first
            x = nnx.relu(self.conv2(x)) * second
            return self.head(x.reshape(len(x), -1))

    model = Maps(nnx.Rngs(0))
    found = graph.trace(model, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    tx = optax.adam(3e-3)
    network, state = training.create_state(model, tx)
    step = training.make_train_step(network, tx)
    rng = np.random.default_rng(0)
    for _ in range(1000):  # to the end: theory is of a minimum
        rows = rng.integers(0, len(x), 64)
        state, _ = step(state, {"image": x[rows], "label": y[rows]})

    def cross(logits, y):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1).mean()

    @jax.jit
    def masked(first, second):
        return cross(network.model(state.params, state.stats)(x, first, second), y)

    def each(params, example):
        logits = network.model(params, state.stats)(example["x"][None])
        return cross(logits, example["y"][None])

    def scores(n):
        batches = [{"x": x[i : i + 64], "y": y[i : i + 64]} for i in range(0, n, 64)]
        return pruning.map_fisher(state.params, found, each, batches)

    ones = np.ones(8, np.float32), np.ones(16, np.float32)
    whole, true, atoms = float(masked(*ones)), [], []
    for layer, width in ((0, 8), (1, 16)):
        for k in range(width):
            cut = [m.copy() for m in ones]
            cut[layer][k] = 0
            true.append(float(masked(*cut)) - whole)
            atoms.append(found.axis(f"conv{layer + 1}/kernel").labels[k])
    full = scores(1280)[atoms]
    assert spearmanr(full, true).statistic > 0.7
    errors = [np.linalg.norm(scores(n)[atoms] - full) / np.linalg.norm(full) for n in (64, 640)]
    assert errors[1] < 0.6 * errors[0]
