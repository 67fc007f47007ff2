"""Dynamic network surgery, RigL and SET."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cnnjax import pruning
from cnnjax.pruning import dynamic

RNG = np.random.default_rng(31)


@pytest.mark.method("dynamic_network_surgery")
def test_mask_follows_the_truth_table():
    w = jnp.asarray([0.05, 0.05, -0.15, -0.15, 0.3, -0.3, 0.1, 0.2])
    t = jnp.asarray([True, False, True, False, True, False, True, False])
    got = dynamic.surgery_mask(w, t, 0.1, 0.2)
    np.testing.assert_array_equal(got, [0, 0, 1, 0, 1, 1, 1, 1])
    # a = b: plain re-thresholding, whatever the mask was
    for mask in (t, ~t):
        np.testing.assert_array_equal(dynamic.surgery_mask(w, mask, 0.12, 0.12), np.abs(w) >= 0.12)
    with pytest.raises(ValueError, match="above the splicing threshold"):
        dynamic.surgery_mask(w, t, 0.3, 0.2)
    with pytest.raises(ValueError, match="0 <= a <= b"):
        pruning.dynamic_network_surgery(optax.sgd(1.0), 1.0, width=(1.1, 0.9))


@pytest.mark.method("dynamic_network_surgery")
def test_all_entries_get_the_gradient_of_the_effective_weight():
    w = {"k": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)}
    m = {"k": jnp.asarray(RNG.random((5, 4)) < 0.5)}
    x = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)

    def loss(p):
        return jnp.sum(jnp.tanh(x @ p["k"]) ** 2)

    effective = jnp.where(m["k"], w["k"], 0)
    np.testing.assert_array_equal(dynamic.spliced(w, m)["k"], effective)
    got = jax.grad(lambda p: loss(dynamic.spliced(p, m)))(w)["k"]
    want = jax.grad(loss)({"k": effective})["k"]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.asarray(got)[~np.asarray(m["k"])].any()


@pytest.mark.method("dynamic_network_surgery")
def test_thresholds_frequency_and_stop_are_as_in_the_released_code():
    w = RNG.normal(size=(8, 6)).astype(np.float32)
    w[0] = 0
    params = {"k": {"kernel": jnp.asarray(w), "bias": jnp.full(6, 0.1)}, "s": jnp.ones(3)}
    opt = pruning.dynamic_network_surgery(
        optax.sgd(0.0), {"k/kernel": 0.5}, gamma=0.05, power=1.0, stop=400
    )
    state = opt.init(params)
    sizes = np.abs(np.concatenate([w.ravel(), np.full(6, 0.1, np.float32)]))
    sizes = sizes[sizes > 0]
    base = sizes.mean() + 0.5 * sizes.std()
    np.testing.assert_allclose(state.lower["k/kernel"], 0.9 * base, rtol=1e-5)
    np.testing.assert_allclose(state.upper["k/bias"], 1.1 * base, rtol=1e-5)
    steps, chains = 500, 60

    def chain(key):
        def one(state, k):
            # a full mask before every update: a change shows that the coin came up
            full = jax.tree.map(lambda m: jnp.ones_like(m), state.masked.mask)
            state = state._replace(masked=state.masked._replace(mask=full))
            grads = jax.tree.map(jnp.zeros_like, params)
            _, state = opt.update(grads, state, params, key=k)
            return state, ~pruning.get_mask(state)["k"]["kernel"].all()

        return jax.lax.scan(one, state, jax.random.split(key, steps))[1]

    changed = np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), chains)))
    assert not changed[:, 400:].any()
    expected = (1 + 0.05 * np.arange(400)) ** -1.0
    error = np.sqrt((expected * (1 - expected)).sum() * chains)
    assert abs(changed[:, :400].sum() - chains * expected.sum()) < 4 * error
    assert changed[:, 0].all()  # probability 1 at the first update
    _, state = opt.update(
        jax.tree.map(jnp.zeros_like, params), state, params, key=jax.random.key(0)
    )
    mask = pruning.get_mask(state)
    np.testing.assert_array_equal(mask["k"]["kernel"], np.abs(w) >= 0.9 * base)
    assert not np.asarray(mask["k"]["bias"]).any()
    assert np.asarray(mask["s"]).all()
    with pytest.raises(ValueError, match="key=key"):
        opt.update(params, state, params)
    with pytest.raises(ValueError, match="'q' matches nothing"):
        pruning.dynamic_network_surgery(optax.sgd(0.0), {"q": 1.0}).init(params)


@pytest.mark.method("dynamic_network_surgery")
def test_a_removed_weight_keeps_moving_and_is_spliced_in_the_trainer():
    from cnnjax import training

    class Net(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(6, 2, use_bias=False, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.fc(x)

    model = Net()
    weak = np.full((6, 2), 0.5, np.float32)
    weak[0] = 0.01  # the input that tells the classes apart starts below the threshold
    model.fc.kernel[...] = jnp.asarray(weak)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    opt = pruning.dynamic_network_surgery(optax.sgd(0.05), 0.0, gamma=0.0)
    network, state = training.create_state(model, opt, extra={"mask": pruning.full_mask(params)})
    step = training.make_train_step(network, opt, hooks=pruning.surgery_hooks())
    x = RNG.normal(size=(64, 6)).astype(np.float32)
    batch = {"image": jnp.asarray(x), "label": jnp.asarray((x[:, 0] > 0).astype(np.int32))}
    trace = []
    for _ in range(40):
        state, _ = step(state, batch)
        trace.append(np.asarray(state.extra["mask"]["fc"]["kernel"])[0])
    trace = np.asarray(trace)
    assert not trace[0].any()  # pruned by the first update
    assert trace[-1].all()  # and back
    assert np.abs(np.asarray(state.params["fc"]["kernel"])[0]).min() > 0.3


def test_random_sparse_masks_and_their_densities():
    params = {"a": {"kernel": jnp.zeros((3, 3, 4, 8))}, "b": {"kernel": jnp.zeros((50, 40))}}
    found = pruning.erdos_renyi(params, 0.2)
    total = found["a/kernel"] * 288 + found["b/kernel"] * 2000
    np.testing.assert_allclose(total, 0.2 * 2288, rtol=1e-12)
    ratio = found["a/kernel"] / found["b/kernel"]
    np.testing.assert_allclose(ratio, (18 / 288) / (90 / 2000), rtol=1e-12)
    assert pruning.erdos_renyi(params, 0.9)["a/kernel"] == 1.0  # capped, the rest shared
    mask = pruning.random_mask(jax.random.key(0), params, found)
    for path in ("a", "b"):
        w = np.asarray(mask[path]["kernel"])
        assert w.sum() == round(found[f"{path}/kernel"] * w.size)
    with pytest.raises(ValueError, match="density must lie"):
        pruning.erdos_renyi(params, 0.0)
    with pytest.raises(ValueError, match="density of 'b/kernel' must lie in .0, 1., got 0.0"):
        pruning.random_mask(jax.random.key(0), params, {"a/kernel": 0.5, "b/kernel": 0.0})


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_regrowth_keeps_the_number_and_grows_where_it_should(method):
    params = {"k": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32), "b": jnp.ones(5)}
    mask = pruning.random_mask(jax.random.key(0), params, {"k": 0.4})
    params = pruning.apply_mask(params, mask)
    grads = {"k": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32), "b": jnp.ones(5)}
    opt = pruning.regrowth(
        optax.sgd(0.01, momentum=0.9), mask, every=3, stop=9, fraction=0.5, method=method
    )
    state, before = opt.init(params), np.asarray(mask["k"])
    update = jax.jit(opt.update)
    changes = []
    for t in range(12):
        updates, state = update(grads, state, params, key=jax.random.key(t))
        old, params = params, optax.apply_updates(params, updates)
        now = np.asarray(pruning.get_mask(state)["k"])
        assert now.sum() == 12
        assert (np.asarray(params["k"])[~now] == 0).all()
        if t == 3:
            # by hand: plain momentum steps on the survivors, then drop and grow
            drop = int(np.floor(0.5 * 0.5 * (1 + np.cos(np.pi * 3 / 9)) * 12))
            moved = np.asarray(old["k"]) * before
            trace = np.asarray(grads["k"]) * sum(0.9**i for i in range(4))
            moved = np.where(before, moved - 0.01 * trace, 0)
            size = np.where(before, np.abs(moved), np.inf).ravel()
            gone = np.argsort(size)[:drop]
            stay = before.copy().ravel()
            stay[gone] = False
            if method == "rigl":
                wish = np.where(stay, -np.inf, np.abs(np.asarray(grads["k"])).ravel())
                want = stay.copy()
                want[np.argsort(-wish)[:drop]] = True
                np.testing.assert_array_equal(now.ravel(), want)
            assert now.ravel()[stay].all()
            np.testing.assert_allclose(
                np.asarray(params["k"]).ravel()[stay], moved.ravel()[stay], rtol=1e-4
            )
            grown = now.ravel() & ~stay
            assert grown.sum() == drop
            assert (np.asarray(params["k"]).ravel()[grown] == 0).all()
        changes.append(not np.array_equal(now, before))
        before = now
    # with these constant gradients RigL may take back just what it dropped
    assert 3 in (found := {i for i, c in enumerate(changes) if c})
    assert found <= {3, 6}
    with pytest.raises(ValueError, match="'rig'.*Did you mean 'rigl'"):
        pruning.regrowth(optax.sgd(1.0), mask, every=1, stop=2, method="rig")
    with pytest.raises(ValueError, match="stop >= every"):
        pruning.regrowth(optax.sgd(1.0), mask, every=3, stop=2)
