"""Hard-concrete gates against the catalogue's numbers; dropout against exact expectations."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import integrate, special

from cnnjax.pipeline.stages import Train
from cnnjax.pruning import gates, noise

RNG = np.random.default_rng(3)
ALPHAS = np.asarray([-2.0, 0.0, 2.0], np.float32)


@pytest.mark.method("hard_concrete_l0")
def test_probabilities_and_means_are_those_of_the_distribution():
    got = np.asarray(gates.active_probability(jnp.asarray(ALPHAS)))
    np.testing.assert_allclose(got, [0.400975, 0.831822, 0.973367], atol=1e-6)
    one = special.expit(ALPHAS - gates.DEFAULT.shift)
    np.testing.assert_allclose(one, [0.026633, 0.168178, 0.599025], atol=1e-6)
    test = np.asarray(gates.test_gate(jnp.asarray(ALPHAS)))
    np.testing.assert_allclose(test, [0.043044, 0.5, 0.956956], atol=1e-6)
    n = 400_000
    z = np.asarray(
        jax.jit(lambda k: gates.sample(k, jnp.broadcast_to(jnp.asarray(ALPHAS), (n, 3))))(
            jax.random.key(0)
        )
    )
    for i, alpha in enumerate(ALPHAS):

        def value(u, alpha=alpha):
            s = special.expit((np.log(u) - np.log1p(-u) + alpha) / (2 / 3))
            return np.clip(1.2 * s - 0.1, 0, 1)

        mean, _ = integrate.quad(value, 0, 1, limit=200)
        np.testing.assert_allclose(mean, [0.142676, 0.5, 0.857324][i], atol=2e-6)
        for sampled, exact in ((z[:, i], mean), (z[:, i] != 0, got[i]), (z[:, i] == 1, one[i])):
            assert abs(sampled.mean() - exact) < 4 * max(sampled.std(), 1e-3) / np.sqrt(n)
    # the test gate's exact zeros and ones
    edge = jnp.asarray([-2.3980, -2.3978, 2.3978, 2.3980])
    np.testing.assert_array_equal(np.asarray(gates.test_gate(edge))[[0, 3]], [0, 1])
    assert 0 < gates.test_gate(edge)[1] < gates.test_gate(edge)[2] < 1
    with pytest.raises(ValueError, match="gamma < 0"):
        gates.HardConcrete(gamma=0.1)


def trained_net():
    shapes = {"fc1": (6, 5), "fc2": (5, 4)}
    params = {
        k: {
            "kernel": jnp.asarray(RNG.normal(size=s), jnp.float32),
            "bias": jnp.asarray(RNG.normal(size=s[1]), jnp.float32),
        }
        for k, s in shapes.items()
    }
    spec = {"fc1/kernel": "filter", "fc2/kernel": "channel"}
    return gates.gated(params, spec, key=jax.random.key(1), droprate={"fc2/kernel": 0.3}), spec


@pytest.mark.method("hard_concrete_l0")
def test_penalty_counts_weights_and_its_gradient_is_that_of_the_sum():
    trained, spec = trained_net()
    assert {p: a.shape for p, a in trained["gates"].items()} == {
        "fc1/kernel": (1, 5),
        "fc2/kernel": (5, 1),
    }
    np.testing.assert_allclose(trained["gates"]["fc2/kernel"], np.log(0.7 / 0.3), atol=0.05)
    fn = gates.penalty(spec, {"fc1/kernel": 0.2, "fc2/kernel": 0.1}, l2=0.5)
    value, slope = jax.jit(jax.value_and_grad(lambda t: fn(t, None)))(trained)

    def oracle(a1, a2):
        p1, p2 = special.expit(a1 + 1.5985965), special.expit(a2 + 1.5985965)
        w1, w2 = (np.asarray(trained["params"][k]["kernel"], np.float64) for k in ("fc1", "fc2"))
        total = 0.2 * 7 * p1.sum() + 0.1 * 4 * p2.sum()  # 6 weights and a bias; 4 weights
        return total + 0.25 * ((p1 * w1**2).sum() + (p2 * w2**2).sum())

    a1, a2 = (np.asarray(trained["gates"][p], np.float64) for p in spec)
    np.testing.assert_allclose(value, oracle(a1, a2), rtol=1e-5)
    step = np.zeros_like(a1)
    step[0, 2] = 1e-5
    numeric = (oracle(a1 + step, a2) - oracle(a1 - step, a2)) / 2e-5
    np.testing.assert_allclose(slope["gates"]["fc1/kernel"][0, 2], numeric, rtol=1e-4)
    macs = gates.penalty(spec, 1.0, costs={"fc1/kernel": 1000.0, "fc2/kernel": 0.0})
    np.testing.assert_allclose(
        macs(trained, None), 1000 * special.expit(a1 + 1.5985965).sum(), rtol=1e-5
    )


@pytest.mark.method("hard_concrete_l0")
def test_folded_network_equals_the_gated_one_and_small_equals_both():
    trained, spec = trained_net()
    trained["gates"]["fc1/kernel"] = jnp.asarray([[-3.0, 0.5, -2.5, 3.0, 0.0]])
    trained["gates"]["fc2/kernel"] = jnp.asarray([1.0, 0.5, 2.0, -4.0, 0.0])[:, None]
    x = jnp.asarray(RNG.normal(size=(7, 6)), jnp.float32)

    def net(p):
        h = jax.nn.relu(x @ p["fc1"]["kernel"] + p["fc1"]["bias"])
        return h @ p["fc2"]["kernel"] + p["fc2"]["bias"]

    apply = gates.reparam(spec)
    want = net(apply(trained, types.SimpleNamespace(train=False, key=None)))
    params, mask = gates.fold(trained, spec)
    np.testing.assert_allclose(net(params), want, atol=1e-6)
    alive = np.asarray(mask["fc1"]["kernel"]).any(0) & np.asarray(mask["fc2"]["kernel"]).any(1)
    np.testing.assert_array_equal(alive, [0, 1, 0, 0, 1])
    np.testing.assert_array_equal(mask["fc1"]["bias"], [0, 1, 0, 1, 1])
    small = {
        "fc1": {"kernel": params["fc1"]["kernel"][:, alive], "bias": params["fc1"]["bias"][alive]},
        "fc2": {"kernel": params["fc2"]["kernel"][alive], "bias": params["fc2"]["bias"]},
    }
    np.testing.assert_allclose(net(small), want, atol=1e-6)
    # in training: one draw a key
    draw = [
        apply(trained, types.SimpleNamespace(train=True, key=jax.random.key(s))) for s in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draw[0]["fc1"]["kernel"], draw[1]["fc1"]["kernel"])
    assert not np.array_equal(draw[0]["fc1"]["kernel"], draw[2]["fc1"]["kernel"])
    clamped = gates.project({**trained, "gates": {"a": jnp.asarray([-9.0, 9.0])}})
    np.testing.assert_allclose(clamped["gates"]["a"], [np.log(1e-2), np.log(1e2)], rtol=1e-6)
    with pytest.raises(KeyError, match="fc3/kernel.*Did you mean"):
        gates.gated(trained["params"], {"fc3/kernel": "filter"}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="gates act on kernels"):
        gates.gated(trained["params"], {"fc1/bias": "filter"}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="drop rate"):
        gates.gated(trained["params"], spec, key=jax.random.key(0), droprate=1.0)


@pytest.mark.method("hard_concrete_l0")
def test_gates_train_in_the_trainer_and_close_on_useless_inputs():
    from flax import nnx

    from cnnjax import training

    class Net(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.fc(x)

    model, spec = Net(), {"fc/kernel": "channel"}
    own = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    trained = gates.gated(own, spec, key=jax.random.key(0))
    optimizer = optax.adam(0.1)
    network, state = training.create_state(model, optimizer, params=trained)
    hooks = training.Hooks(
        reparam=gates.reparam(spec),
        penalty=gates.penalty(spec, 0.02),
        post_update=lambda s, c, m: s.replace(params=gates.project(s.params)),
    )
    step = training.make_train_step(network, optimizer, hooks=hooks)
    x = RNG.normal(size=(96, 6)).astype(np.float32)
    batch = {"image": jnp.asarray(x), "label": jnp.asarray(np.argmax(x[:, :3], axis=1))}
    for _ in range(120):
        state, metrics = step(state, batch)
    z = np.asarray(gates.test_gate(state.params["gates"]["fc/kernel"]))[:, 0]
    assert (z[3:] == 0).all()  # the last three inputs say nothing about the label
    assert (z[:3] > 0.5).all()
    assert float(metrics["penalty"]) < 0.02 * 3 * 4
    params, _ = gates.fold(state.params, spec)
    logits = x @ np.asarray(params["fc"]["kernel"]) + np.asarray(params["fc"]["bias"])
    assert (logits.argmax(1) == x[:, :3].argmax(1)).mean() > 0.9


@pytest.mark.method("dropout")
def test_dropout_is_unbiased_and_its_expected_loss_is_ridge():
    n, d, q, draws = 12, 4, 0.7, 20_000
    x, y, w = RNG.normal(size=(n, d)), RNG.normal(size=n), RNG.normal(size=d)
    wide = jnp.broadcast_to(jnp.asarray(x, jnp.float32), (draws, n, d))
    z = np.asarray(jax.jit(lambda k: noise.dropout(k, wide, q))(jax.random.key(0)), np.float64)
    assert np.abs(z.mean(0) - x).max() < 5 * np.abs(x).max() * np.sqrt((1 - q) / q / draws)
    losses = ((y - z @ w) ** 2).sum(1)
    exact = ((y - x @ w) ** 2).sum() + (1 - q) / q * ((x**2).sum(0) * w**2).sum()
    assert abs(losses.mean() - exact) < 4 * losses.std() / np.sqrt(draws)
    small = jnp.asarray(x, jnp.float32)
    key = jax.random.key(5)
    np.testing.assert_array_equal(noise.dropout(key, small, q), noise.dropout(key, small, q))
    np.testing.assert_array_equal(noise.dropout(key, small, q, train=False), small)
    with pytest.raises(ValueError, match="probability of keeping"):
        noise.dropout(key, small, 0.0)
    assert noise.retrain_rate(0.5, 400, 100) == 0.25
    with pytest.raises(ValueError, match="after <= before"):
        noise.retrain_rate(0.5, 100, 400)


@pytest.mark.method("dropout")
def test_max_norm_scales_only_long_filters():
    w = np.float32([[3, 0.3], [4, 0.4]])
    got = noise.max_norm({"k": jnp.asarray(w), "b": jnp.full(2, 9.0)}, 2.5)
    np.testing.assert_allclose(got["k"], [[1.5, 0.3], [2, 0.4]], rtol=1e-6)
    np.testing.assert_array_equal(got["b"], [9, 9])


@pytest.mark.method("evolutional_dropout")
def test_a_networks_dropout_layers_become_evolutional_ones():
    class Net(nnx.Module):
        def __init__(self, rate):
            self.fc = nnx.Linear(3, 8, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(rate, rngs=nnx.Rngs(dropout=1))

        def __call__(self, x):
            return self.drop(self.fc(x))

    plain = Net(0.25)
    model = noise.with_dropout(plain, "evolutional")
    assert type(plain.drop) is nnx.Dropout
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    key = nnx.clone(plain.drop).rngs()  # the first of the stream
    want = noise.evolutional_dropout(key, plain.fc(x), 6)
    np.testing.assert_array_equal(model(x), want)
    assert not np.array_equal(model(x), want)  # the next
    model.eval()
    np.testing.assert_array_equal(model(x), plain.fc(x))
    assert type(noise.with_dropout(model, "plain").drop) is nnx.Dropout
    with pytest.raises(ValueError, match="no dropout with a rate above 0"):
        noise.with_dropout(Net(0.0), "evolutional")
    with pytest.raises(ValueError, match="unknown dropout 'evolutionary'. Did you mean"):
        Train(dropout="evolutionary")


@pytest.mark.method("evolutional_dropout")
def test_multinomial_dropout_has_the_stated_moments_and_expected_loss():
    n, d, k, draws = 6, 4, 3, 40_000
    x, y, w = RNG.normal(size=(n, d)) * [2, 1, 0.5, 1], RNG.normal(size=n), RNG.normal(size=d)
    p = np.asarray([0.4, 0.3, 0.1, 0.2])
    ones = jnp.ones((draws, d))
    eps = np.asarray(
        jax.jit(lambda key: noise.multinomial_dropout(key, ones, jnp.asarray(p), k))(
            jax.random.key(0)
        ),
        np.float64,
    )
    error = 5 / np.sqrt(draws)
    assert np.abs(eps.mean(0) - 1).max() < error * eps.std(0).max()
    second = eps.T @ eps / draws
    want = np.full((d, d), (k - 1) / k) + np.diag(1 / (k * p))
    assert (
        np.abs(second - want) < error * np.sqrt(((eps[:, :, None] * eps[:, None]) ** 2).mean(0))
    ).all()
    # one draw for each of the n rows; rows are independent, so sum the rows' expectations
    losses = sum((y[i] - (eps * x[i]) @ w) ** 2 for i in range(n))
    extra = (((x**2).sum(0) * w**2 / p).sum() - ((x @ w) ** 2).sum()) / k
    exact = ((y - x @ w) ** 2).sum() + extra
    assert abs(losses.mean() - exact) < 4 * losses.std() / np.sqrt(draws)


@pytest.mark.method("evolutional_dropout")
def test_probabilities_minimize_the_bound_and_survive_zeros():
    h = RNG.normal(size=(32, 5)) * [3, 1, 0.2, 1, 2]
    p = np.asarray(noise.evolutional_probabilities(jnp.asarray(h, jnp.float32)), np.float64)
    moment = (h**2).mean(0)
    np.testing.assert_allclose(p, np.sqrt(moment) / np.sqrt(moment).sum(), rtol=1e-5)
    others = RNG.dirichlet(np.ones(5), 20_000)
    assert (moment / p).sum() <= (moment / others).sum(1).min()
    h[:, 2] = 0
    for data in (h, np.zeros_like(h), np.zeros((4, 2, 2, 5))):
        x = jnp.asarray(data, jnp.float32)
        out = noise.evolutional_dropout(jax.random.key(0), x)
        assert np.isfinite(out).all()
        np.testing.assert_allclose(noise.evolutional_probabilities(x).sum(), 1, rtol=1e-6)
    x = jnp.asarray(RNG.normal(size=(3, 2, 2, 6)), jnp.float32)
    out = np.asarray(noise.evolutional_dropout(jax.random.key(1), x))
    ratio = out / np.asarray(x)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-5)
    np.testing.assert_array_equal(noise.evolutional_dropout(jax.random.key(1), x, train=False), x)
    # p is a constant in back-propagation: the gradient is the scale itself
    slope = jax.grad(lambda h: noise.evolutional_dropout(jax.random.key(1), h).sum())(x)
    np.testing.assert_allclose(slope, ratio, rtol=1e-5)
