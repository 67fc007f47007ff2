"""Ranking of methods on 8x8 digits without retraining (slow): real images, trained networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cnnjax import graph, models, pruning
from cnnjax.pruning import importance, obs

pytestmark = pytest.mark.slow
SEEDS = 3


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.RandomState(0).permutation(len(raw.target))
    x = (raw.images[order] / 16).astype(np.float32)
    y = raw.target[order].astype(np.int32)
    return x[:1347], y[:1347], x[1347:], y[1347:]


def logits(params, x):
    h = x.reshape(*x.shape[: x.ndim - 2], 64)
    for i in (1, 2):
        h = jax.nn.relu(h @ params[f"fc{i}"]["kernel"] + params[f"fc{i}"]["bias"])
    return h @ params["fc3"]["kernel"] + params["fc3"]["bias"]


@pytest.fixture(scope="module")
def trained(digits):
    """Three MLPs 64-100-50-10, side by side: He, Adam 1e-3, batch 64, 60 epochs."""
    x, y, *_ = digits
    x, y = jnp.asarray(x), jnp.asarray(y)
    adam = optax.adam(1e-3)

    def init(key):
        keys = jax.random.split(key, 3)
        sizes = [(64, 100), (100, 50), (50, 10)]
        return {
            f"fc{i + 1}": {
                "kernel": jax.random.normal(k, s) * np.sqrt(2 / s[0]),
                "bias": jnp.zeros(s[1]),
            }
            for i, (k, s) in enumerate(zip(keys, sizes))
        }

    def loss(params, xb, yb):
        z = logits(params, xb)
        return optax.softmax_cross_entropy_with_integer_labels(z, yb).mean()

    def run(key):
        params = init(key)

        def step(carry, k):
            params, state = carry
            rows = jax.random.randint(k, (64,), 0, x.shape[0])
            updates, state = adam.update(jax.grad(loss)(params, x[rows], y[rows]), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.fold_in(key, 1), 60 * 21)
        return jax.lax.scan(step, (params, adam.init(params)), keys)[0][0]

    stacked = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), SEEDS))
    return [jax.tree.map(lambda a, i=i: np.asarray(a[i]), stacked) for i in range(SEEDS)]


def accuracy(params, x, y):
    return float((np.asarray(logits(params, x)).argmax(-1) == y).mean())


@pytest.mark.method("optimal_brain_surgeon")
@pytest.mark.method("optimal_brain_damage")
def test_surgeon_beats_damage_beats_magnitude_beats_random(digits, trained):
    x, y, xt, yt = digits
    found = {"dense": [], "surgeon": [], "damage": [], "magnitude": [], "random": []}
    for i, params in enumerate(trained):
        params = jax.tree.map(jnp.asarray, params)
        found["dense"].append(accuracy(params, xt, yt))
        # on all images: well-fitted ones say nothing, a few hard ones say it all
        damage = importance.obd(params, logits, [jnp.asarray(x)], chunk=64)
        weights = jax.tree.map(jnp.abs, params)
        noise = jax.tree.map(lambda w, i=i: jax.random.uniform(jax.random.key(i), w.shape), params)
        full = {k: {**damage[k], "bias": jnp.ones_like(params[k]["bias"])} for k in damage}
        for name, scores in (("damage", full), ("magnitude", weights), ("random", noise)):
            mask = pruning.mask_from_scores(scores, 0.8, scope="layer")
            found[name].append(accuracy(pruning.apply_mask(params, mask), xt, yt))
        h, pruned = x.reshape(-1, 64), {}
        for layer in ("fc1", "fc2", "fc3"):
            w, b = params[layer]["kernel"], params[layer]["bias"]
            moment = jnp.asarray(obs.second_moment(h), jnp.float32)
            new = obs.layer_obs(w, moment, 0.8, damping=1e-4)
            assert int((~np.asarray(new.mask)).sum()) == int(np.ceil(0.8 * w.size))
            pruned[layer] = {"kernel": new.w, "bias": b}
            h = np.maximum(h @ np.asarray(w) + np.asarray(b), 0)
        found["surgeon"].append(accuracy(pruned, xt, yt))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    print(means)
    assert means["dense"] > 0.97
    assert means["surgeon"] > means["damage"] > means["magnitude"] > means["random"]
    assert means["surgeon"] > 0.93


@pytest.mark.method("data_free_neuron_merging")
def test_merging_beats_removing_at_random(digits, trained):
    *_, xt, yt = digits
    merged, removed = [], []
    for i, params in enumerate(trained):
        params = jax.tree.map(jnp.asarray, params)
        small, _ = pruning.merge_neurons(params, "fc1", "fc2", 50)
        merged.append(accuracy(small, xt, yt))
        keep = np.sort(np.random.default_rng(i).permutation(100)[:50])
        cut = {
            **params,
            "fc1": {
                "kernel": params["fc1"]["kernel"][:, keep],
                "bias": params["fc1"]["bias"][keep],
            },
            "fc2": {**params["fc2"], "kernel": params["fc2"]["kernel"][keep]},
        }
        removed.append(accuracy(cut, xt, yt))
    print(merged, removed)
    assert np.mean(merged) > np.mean(removed) + 0.03


@pytest.mark.method("lasso_channel_pruning")
@pytest.mark.method("thinet")
def test_least_squares_rescues_any_selection(digits):
    """A quarter of conv1 kept, no fine-tuning: whatever the selector, reconstruction restores."""
    x, y, xt, yt = digits
    x, xt = x[..., None], xt[..., None]
    model = models.create("plain_cnn", rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    adam = optax.adam(2e-3)

    @jax.jit
    def step(params, state, xb, yb):
        def loss(p):
            z = nnx.merge(graphdef, p, rest, copy=True)(xb)
            return optax.softmax_cross_entropy_with_integer_labels(z, yb).mean()

        updates, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state, rng = adam.init(params), np.random.default_rng(0)
    for _ in range(21 * 15):
        rows = rng.integers(0, len(x), 64)
        params, state = step(params, state, x[rows], y[rows])
    model = nnx.merge(graphdef, params, rest)
    model.eval()

    def top1(m):
        return float((np.asarray(nnx.jit(lambda m, x: m(x))(m, xt)).argmax(-1) == yt).mean())

    found = graph.trace(model, jnp.asarray(x[:1]))
    batches = [jnp.asarray(b) for b in np.split(x[:1300], 5)]
    own = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    first = "convs/0/kernel"
    selectors = {
        name: pruning.next_layer_scores(
            model, found, batches, method=name, ratio=0.75, include="convs/1"
        )[first]
        for name in ("lasso", "thinet")
    }
    selectors["random"] = importance.random(own, jax.random.key(1))["convs"]["0"]["kernel"]
    result = {"dense": top1(model)}
    for name, scores in selectors.items():
        keep = pruning.select_channels(found, {first: scores}, ratio=0.75)
        small = pruning.shrink(model, found, keep, check=False)
        better = pruning.reconstruct(model, small, found, keep, batches)
        result[name] = (top1(small), top1(better))
    print(result)
    assert result["dense"] > 0.97
    for name in selectors:
        assert result[name][1] > 0.94
        assert result[name][1] > result[name][0]
