"""Masked and gradual optimizers: zeros stay exact under every optimizer, momentum included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import pruning, tree

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {
        "kernel": RNG.normal(size=(3, 3, 2, 4)).astype(np.float32),
        "bias": np.ones(4, np.float32),
    },
    "b": {"kernel": RNG.normal(size=(8, 6)).astype(np.float32), "bias": np.ones(6, np.float32)},
}
TOTAL = 72 + 48


def decay_kernels(params):
    return jax.tree.map(lambda w: w.ndim > 1, params)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "nesterov+decay": optax.chain(
        optax.add_decayed_weights(1e-2, decay_kernels), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
    "adamw": optax.adamw(1e-2, weight_decay=0.1, nesterov=True),
    "rmsprop": optax.rmsprop(1e-2, momentum=0.9),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "partitioned": optax.partition(
        {"k": optax.adam(1e-2), "b": optax.sgd(0.1, momentum=0.9)},
        lambda p: jax.tree.map(lambda w: "k" if w.ndim > 1 else "b", p),
    ),
    "injected": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
}


def gradients(step):
    # far from zero, also for the removed weights
    return jax.tree.map(lambda w: jnp.sin(w * 7 + step) + 0.3, PARAMS)


def trajectory(optimizer, steps, *, params=PARAMS):
    """Parameters and optimizer state after every update."""

    @jax.jit
    def one(params, state, step):
        updates, state = optimizer.update(gradients(step), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state = jax.jit(optimizer.init)(params)
    out = [(params, state)]
    for step in range(steps):
        out.append(one(*out[-1], step))
    return out


def run(optimizer, steps, *, params=PARAMS):
    return trajectory(optimizer, steps, params=params)[-1]


def assert_zero_bits(params, mask):
    for w, m in zip(jax.tree.leaves(params), jax.tree.leaves(mask)):
        removed = np.asarray(w)[~np.asarray(m)]
        assert removed.tobytes() == bytes(removed.nbytes)


def moments(state):
    """Leaves of the inner state that have a kernel's shape."""
    leaves = jax.tree.leaves(pruning.transforms._find(state).inner)
    return {
        name: [np.asarray(x) for x in leaves if np.shape(x) == PARAMS[name]["kernel"].shape]
        for name in PARAMS
    }


@pytest.mark.method("magnitude_prune_retrain")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_training_keeps_zeros_and_equals_training_the_rest(name):
    mask = pruning.magnitude_mask(PARAMS, 0.7)
    start = pruning.apply_mask(PARAMS, mask)
    params, state = run(pruning.masked(OPTIMIZERS[name], mask), 5, params=start)
    assert_zero_bits(params, mask)
    for layer, values in moments(state).items():
        for value in values:
            assert not value[~np.asarray(mask[layer]["kernel"])].any()
    # the survivors move as they would under the bare optimizer (all of these are elementwise)
    free, _ = run(OPTIMIZERS[name], 5, params=start)
    for w, f, m in zip(jax.tree.leaves(params), jax.tree.leaves(free), jax.tree.leaves(mask)):
        np.testing.assert_allclose(np.asarray(w)[m], np.asarray(f)[m], rtol=1e-6, atol=1e-7)
        assert (np.asarray(f)[m] != np.asarray(0)).all()


def test_unmasked_start_is_zeroed_by_the_first_update():
    mask = pruning.magnitude_mask(PARAMS, 0.5)
    params, _ = run(pruning.masked(optax.adam(1e-2), mask), 1)
    assert_zero_bits(params, mask)


def test_mask_defaults_to_the_non_zeros():
    mask = pruning.magnitude_mask(PARAMS, 0.5)
    state = pruning.masked(optax.sgd(0.1)).init(pruning.apply_mask(PARAMS, mask))
    jax.tree.map(np.testing.assert_array_equal, state.mask, mask)


@pytest.mark.method("magnitude_prune_retrain")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradual_reaches_exact_counts_with_zero_moments(name):
    optimizer = pruning.gradual(OPTIMIZERS[name], final=0.9, begin=2, end=8, every=2)
    after = trajectory(optimizer, 11)
    for steps, cuts in ((2, 0), (3, 0), (5, 1), (9, 3), (11, 3)):
        params, state = after[steps]
        mask = pruning.get_mask(state)
        target = 0.9 - 0.9 * (1 - cuts / 3) ** 3 if cuts < 3 else 0.9
        gone = TOTAL - sum(int(np.sum(mask[k]["kernel"])) for k in mask)
        assert gone == pruning.prune_count(target, TOTAL)
        assert_zero_bits(params, mask)
        assert np.asarray(mask["a"]["bias"]).all()
        for layer, values in moments(state).items():
            for value in values:
                assert not value[~np.asarray(mask[layer]["kernel"])].any()


@pytest.mark.method("magnitude_prune_retrain")
def test_gradual_equals_a_numpy_transcription():
    rate, decay = 0.05, 0.9
    optimizer = pruning.gradual(
        optax.sgd(rate, momentum=decay), final=0.8, begin=0, end=4, every=1, scope="layer"
    )
    params, state = run(optimizer, 8)
    w = {k: PARAMS[k]["kernel"].astype(np.float64) for k in PARAMS}
    keep = {k: np.ones_like(v, bool) for k, v in w.items()}
    trace = {k: np.zeros_like(v) for k, v in w.items()}
    for t in range(8):
        for k in w:
            g = np.sin(PARAMS[k]["kernel"].astype(np.float64) * 7 + t) + 0.3
            trace[k] = np.where(keep[k], decay * trace[k] + g, 0)
            w[k] = np.where(keep[k], w[k] - rate * trace[k], 0)
            if t <= 4:
                s = 0.8 if t == 4 else 0.8 - 0.8 * (1 - t / 4) ** 3
                count = int(np.ceil(round(s * w[k].size, 9)))
                scores = np.where(keep[k], np.abs(w[k]), -1).ravel()
                keep[k] = keep[k].copy()
                keep[k].ravel()[np.argsort(scores, kind="stable")[:count]] = False
                trace[k], w[k] = trace[k] * keep[k], w[k] * keep[k]
    for k in w:
        np.testing.assert_array_equal(np.asarray(pruning.get_mask(state)[k]["kernel"]), keep[k])
        np.testing.assert_allclose(np.asarray(params[k]["kernel"]), w[k], atol=1e-5)


def test_gradual_structured():
    optimizer = pruning.gradual(
        optax.adam(1e-2),
        final=0.5,
        begin=0,
        end=3,
        every=3,
        granularity="filter",
        scope="layer",
        exclude="b/**",
    )
    params, state = run(optimizer, 5)
    kept = np.asarray(pruning.get_mask(state)["a"]["kernel"]).any((0, 1, 2))
    assert kept.sum() == 2
    assert (np.asarray(params["a"]["kernel"]) != 0).all((0, 1, 2)).sum() == 2
    assert (np.asarray(params["b"]["kernel"]) != 0).all()


def test_mask_travels_in_the_state_and_can_be_replaced():
    first = pruning.magnitude_mask(PARAMS, 0.3)
    optimizer = optax.chain(optax.clip(1.0), pruning.masked(optax.adam(1e-2), first))
    params, state = run(optimizer, 3, params=pruning.apply_mask(PARAMS, first))
    jax.tree.map(np.testing.assert_array_equal, pruning.get_mask(state), first)
    second = pruning.magnitude_mask(params, 0.6, mask=first)
    state = pruning.set_mask(state, second)
    jax.tree.map(np.testing.assert_array_equal, pruning.get_mask(state), second)
    for layer, values in moments(state).items():
        assert len(values) == 2
        for value in values:
            keep = np.asarray(second[layer]["kernel"])
            assert not value[~keep].any()
            assert value[keep].any()
    # a flattened and rebuilt state (what a checkpoint does) still holds it
    leaves, treedef = jax.tree.flatten(state)
    again = jax.tree.unflatten(treedef, [np.asarray(x) for x in leaves])
    jax.tree.map(np.testing.assert_array_equal, pruning.get_mask(again), second)


def test_runs_on_a_sharded_mesh_with_the_same_mask():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    scores = np.random.default_rng(4).integers(0, 9, (64, 5)).astype(np.float32)
    select = jax.jit(lambda s: pruning.prune_smallest([s], jnp.array([200]), (0,))[0])
    alone = np.asarray(select(scores))
    assert (~alone).sum() == 200
    np.testing.assert_array_equal(np.asarray(select(jax.device_put(scores, spread))), alone)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="every dividing end - begin"):
        pruning.gradual(optax.sgd(0.1), final=0.5, begin=0, end=10, every=3)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1.2"):
        pruning.gradual(optax.sgd(0.1), final=1.2, begin=0, end=10, every=5)
    with pytest.raises(ValueError, match=r"exclude pattern 'c/kernel' matches nothing"):
        pruning.gradual(
            optax.sgd(0.1), final=0.5, begin=0, end=10, every=5, exclude="c/kernel"
        ).init(PARAMS)
    mask = pruning.full_mask(PARAMS)
    with pytest.raises(ValueError, match="mask does not match the parameters"):
        pruning.masked(optax.sgd(0.1), {"a": mask["a"]}).init(PARAMS)
    none = pruning.full_mask(PARAMS)
    first = next(p for p, m in tree.flatten(none).items() if m.ndim >= 2)
    none = tree.map_with_path(lambda p, m: m & (p != first), none)
    with pytest.raises(ValueError, match=f"empties {first}: nothing would pass"):
        pruning.masked(optax.sgd(0.1), none)
    pruning.masked(optax.sgd(0.1), none, allow_empty=True).init(PARAMS)
    # a traced mask has no values to look at
    jax.eval_shape(lambda m: pruning.masked(optax.sgd(0.1), m).init(PARAMS), none)
    optimizer = pruning.masked(optax.sgd(0.1), mask)
    with pytest.raises(ValueError, match=r"needs update\(grads, state, params\)"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))
    with pytest.raises(ValueError, match="found 0; wrap the optimizer"):
        pruning.get_mask(optax.sgd(0.1).init(PARAMS))
    assert tree.count(mask) == tree.count(PARAMS)
