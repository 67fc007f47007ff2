"""Scores from data and distances between filters, against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.pruning import importance
from cnnjax.pruning.importance import activations
from cnnjax.tree import flatten

RNG = np.random.default_rng(7)


def relu_net(params, x):
    h = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return h @ params["b"]["kernel"]


def loss(params, example):
    return -jax.nn.log_softmax(relu_net(params, example["x"]))[example["y"]]


def data(n=11, i=5, h=4, c=3):
    params = {
        "a": {"kernel": RNG.normal(size=(i, h)), "bias": RNG.normal(size=h)},
        "b": {"kernel": RNG.normal(size=(h, c))},
    }
    return params, {"x": RNG.normal(size=(n, i)), "y": RNG.integers(0, c, n)}


def numpy_gradients(params, batch):
    """Per-example gradients by hand, and those of each hidden map's gate."""
    w1, b1, w2 = params["a"]["kernel"], params["a"]["bias"], params["b"]["kernel"]
    pre = batch["x"] @ w1 + b1
    h = np.maximum(pre, 0)
    z = h @ w2
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    dz = p - np.eye(z.shape[1])[batch["y"]]
    dh = dz @ w2.T
    dpre = dh * (pre > 0)
    g1 = batch["x"][:, :, None] * dpre[:, None]
    g2 = h[:, :, None] * dz[:, None]
    return g1, dpre, g2, h * dh, z * dz  # the last two: a dL/da of the maps


@pytest.mark.method("fisher_pruning")
@pytest.mark.method("fisher_importance")
def test_gradient_statistics_equal_per_example_gradients_by_hand():
    params, batch = data()
    g1, gb, g2, gate_a, gate_b = numpy_gradients(params, batch)
    with jax.enable_x64(True):
        tree = jax.tree.map(jnp.asarray, params)
        batches = [
            {k: jnp.asarray(v[s]) for k, v in batch.items()} for s in (slice(0, 5), slice(5, 11))
        ]
        got = importance.gradient_statistics(tree, loss, batches, chunk=3)
        fisher = importance.fisher(tree, loss, batches)
        taylor = importance.taylor(tree, loss, batches, chunk=4)
        weight = importance.fisher_weight(tree, loss, batches)
        cheap = importance.fisher(tree, loss, batches, costs={"a/kernel": [1.0, 2.0, 4.0, 8.0]})
    w1 = params["a"]["kernel"]
    np.testing.assert_allclose(got["gradient"]["a/kernel"], g1.mean(0), rtol=1e-9)
    np.testing.assert_allclose(got["gradient"]["a/bias"], gb.mean(0), rtol=1e-9)
    np.testing.assert_allclose(got["square"]["b/kernel"], (g2**2).mean(0), rtol=1e-9)
    np.testing.assert_allclose(got["taylor"]["a/kernel"], np.abs(w1 * g1).mean(0), rtol=1e-9)
    # the gate's gradient is that of the feature map behind the ReLU: sum a dL/da
    np.testing.assert_allclose(fisher["a"]["kernel"], 0.5 * (gate_a**2).mean(0), rtol=1e-9)
    np.testing.assert_allclose(fisher["b"]["kernel"], 0.5 * (gate_b**2).mean(0), rtol=1e-9)
    np.testing.assert_allclose(taylor["a"]["kernel"], np.abs(gate_a).mean(0), rtol=1e-9)
    np.testing.assert_allclose(weight["a"]["kernel"], 0.5 * w1**2 * (g1**2).mean(0), rtol=1e-9)
    np.testing.assert_allclose(
        cheap["a"]["kernel"],
        np.asarray(fisher["a"]["kernel"]) / np.asarray([1, 2, 4, 8]),
        rtol=1e-6,
    )
    assert "b" not in cheap
    with pytest.raises(ValueError, match="'gate'.*Did you mean 'gate_"):
        importance.gradient_statistics(tree, loss, batches, ("gate",))
    with pytest.raises(ValueError, match="no example"):
        importance.gradient_statistics(tree, loss, [])
    with pytest.raises(ValueError, match="must be positive"):
        importance.per_cost({"a": jnp.ones(2)}, {"a": 0.0})
    with pytest.raises(KeyError, match="'c'"):
        importance.per_cost({"a": jnp.ones(2)}, {"c": 1.0})


def logistic(params, example):
    z = jnp.sum(example["x"] * params["w"][:, 0])
    return jnp.logaddexp(0.0, -example["y"] * z)


@pytest.mark.method("fisher_pruning")
@pytest.mark.method("fisher_importance")
def test_fisher_equals_half_the_hessian_of_the_gates_when_labels_are_the_models():
    n, d = 40_000, 3
    w = RNG.normal(size=d)
    x = RNG.normal(size=(n, d))
    p = 1 / (1 + np.exp(-x @ w))
    y = np.where(RNG.random(n) < p, 1.0, -1.0)
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    params = {"w": jnp.asarray(w[:, None], jnp.float32)}
    # one gate for each input: w_i^2 (dL/dw_i)^2
    got = np.asarray(importance.fisher_weight(params, logistic, [batch], chunk=1000)["w"])[:, 0]
    exact = 0.5 * np.mean((w * x) ** 2 * (p * (1 - p))[:, None], axis=0)
    samples = 0.5 * (w * x) ** 2 * ((p - (y > 0)) ** 2)[:, None]
    assert (np.abs(got - exact) < 4 * samples.std(0) / np.sqrt(n)).all()


@pytest.mark.method("average_percentage_of_zeros")
def test_apoz_counts_silence_and_warns_without_a_relu():
    x = np.maximum(RNG.normal(size=(10, 4, 4, 5)), 0).astype(np.float32)
    x[..., 0], x[..., 1] = 0, 1
    collect = lambda params, batch: {"conv/kernel": params["s"] * batch}  # noqa: E731
    batches = [jnp.asarray(x[:5]), jnp.asarray(x[5:])]
    for scale in (1.0, 7.0):  # positive rescaling of a map changes nothing
        got = importance.apoz({"s": jnp.float32(scale)}, collect, batches)["conv"]["kernel"]
        np.testing.assert_allclose(got, (x > 0).mean((0, 1, 2)), atol=1e-6)
        assert got[0] == 0
        assert got[1] == 1
    with pytest.warns(UserWarning, match="conv/kernel.*not behind a ReLU"):
        importance.apoz({"s": jnp.float32(-1.0)}, collect, batches)
    with pytest.warns(UserWarning, match="are never zero, so they are not behind a ReLU"):
        importance.apoz({}, lambda params, x: {"conv/kernel": jax.nn.sigmoid(x)}, batches)
    with pytest.raises(ValueError, match="no example"):
        importance.apoz({}, collect, [])


def test_hrank_is_the_mean_rank_and_all_scores_come_from_one_pass():
    x = RNG.normal(size=(4, 6, 5, 3)).astype(np.float32)
    x[..., 0] = RNG.normal(size=(4, 6, 1)) * RNG.normal(size=(4, 1, 5))  # rank 1
    x[..., 1] = 0
    want = np.mean([[np.linalg.matrix_rank(x[i, ..., c]) for c in range(3)] for i in range(4)], 0)
    calls = []

    def collect(params, batch):
        calls.append(1)
        return {"k": jnp.abs(batch)}

    got = importance.activation_scores({}, collect, [jnp.asarray(np.abs(x))])
    assert len(calls) == 1
    ranks = np.mean(
        [[np.linalg.matrix_rank(np.abs(x[i, ..., c])) for c in range(3)] for i in range(4)], 0
    )
    np.testing.assert_array_equal(got["hrank"]["k"], ranks)
    np.testing.assert_allclose(got["mean_activation"]["k"], np.abs(x).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(activations.map_ranks(jnp.asarray(x)).mean(0), want)
    with pytest.raises(ValueError, match="'hranks'.*Did you mean 'hrank'"):
        importance.activation_scores({}, collect, [], ("hranks",))


def test_any_set_of_scores_comes_from_one_pass():
    """Gradients, curvature and activations of the same batches, each read once."""
    params, data_ = data()
    params["n"] = {"scale": np.linspace(-1, 1, 4)}
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    batches = [
        {k: jnp.asarray(v[s], jnp.float32 if k == "x" else jnp.int32) for k, v in data_.items()}
        for s in (slice(0, 6), slice(6, 12))
    ]
    traced, key = [], jax.random.key(2)

    def outputs(p, example):
        traced.append(1)
        return relu_net(p, example["x"])

    def collect(p, batch):
        pre = batch["x"] @ p["a"]["kernel"] + p["a"]["bias"]
        return {"a/kernel": jax.nn.relu(pre)}

    needs = {"loss": loss, "outputs": outputs, "collect": collect, "key": key}
    got = importance.compute(params, importance.names(), iter(batches), **needs)
    assert set(got) == set(importance.names())
    first = len(traced)
    importance.compute(params, importance.names(), batches[:1], **needs)
    assert len(traced) == first  # compiled once
    for name in importance.names():
        one = importance.get(name)
        more = {"taylor": (loss, batches), "fisher": (loss, batches), "obd": (outputs, batches),
                "fisher_weight": (loss, batches), "apoz": (collect, batches),
                "hrank": (collect, batches), "random": (key,)}.get(name, ())  # fmt: skip
        want = flatten(one(params, *more))
        assert set(flatten(got[name])) == set(want)
        for path, values in flatten(got[name]).items():
            np.testing.assert_allclose(values, want[path], rtol=1e-5, atol=1e-7)
    assert set(importance.compute(params, ["l1"])) == {"l1"}
    for name, need in (("taylor", "loss"), ("obd", "outputs"), ("apoz", "collect"),
                       ("random", "key")):  # fmt: skip
        with pytest.raises(ValueError, match=f"'{name}' needs {need}="):
            importance.compute(params, [name], batches)
    with pytest.raises(ValueError, match="no example"):
        importance.compute(params, ["taylor"], loss=loss)
    with pytest.raises(ValueError, match="'tailor'.*Did you mean 'taylor'"):
        importance.compute(params, ["tailor"])


def test_fpgm_and_lamp_against_loops():
    w = RNG.normal(size=(3, 3, 2, 5))
    w[..., 4] = w[..., :4].mean(-1)  # the middle of the others goes first
    with jax.enable_x64(True):
        params = {"conv": {"kernel": jnp.asarray(w), "bias": jnp.zeros(5)}}
        fpgm = np.asarray(importance.get("fpgm")(params)["conv"]["kernel"])
        lamp = np.asarray(importance.get("lamp")(params)["conv"]["kernel"])
    rows = w.reshape(-1, 5).T
    want = [sum(np.linalg.norm(a - b) for b in rows) for a in rows]
    np.testing.assert_allclose(fpgm, want, rtol=1e-12)
    assert fpgm.argmin() == 4
    square = w**2
    want = [v / square[square >= v].sum() for v in square.ravel()]
    np.testing.assert_allclose(lamp.ravel(), want, rtol=1e-10)
    assert lamp.max() == 1


@pytest.mark.method("l1_filter_pruning")
def test_greedy_norms_ignore_channels_removed_upstream():
    w = {
        "c1": RNG.normal(size=(3, 3, 1, 4)),
        "c2": RNG.normal(size=(3, 3, 4, 6)),
        "fc": RNG.normal(size=(2 * 2 * 6, 5)),
    }
    order = ["c1/kernel", "c2/kernel", "fc/kernel"]
    params = {k: {"kernel": jnp.asarray(v, jnp.float32)} for k, v in w.items()}
    ratios = {"c1/kernel": 0.5, "c2/kernel": 0.34}
    got = {
        p: np.asarray(s) for p, s in flatten(importance.greedy_l1(params, order, ratios)).items()
    }
    s1 = np.abs(w["c1"]).sum((0, 1, 2))
    keep1 = np.sort(np.argsort(s1)[2:])
    s2 = np.abs(w["c2"][:, :, keep1]).sum((0, 1, 2))
    keep2 = np.sort(np.argsort(s2)[3:])  # ceil(0.34 * 6) = 3 go
    rows = (np.arange(4)[:, None] * 6 + keep2).ravel()  # (i * W + j) * C + c
    s3 = np.abs(w["fc"][rows]).sum(0)
    for path, want in zip(order, (s1, s2, s3)):
        np.testing.assert_allclose(got[path], want, rtol=1e-5)
    # one layer pruned alone: greedy is independent
    alone = flatten(importance.greedy_l1(params, order, {"c2/kernel": 0.5}))
    np.testing.assert_allclose(alone["c2/kernel"], np.abs(w["c2"]).sum((0, 1, 2)), rtol=1e-5)
    with pytest.raises(ValueError, match="removes 4 of the 4 filters"):
        importance.greedy_l1(params, order, 1.0)
    with pytest.raises(KeyError, match="'c3/kernel'.*Did you mean"):
        importance.greedy_l1(params, ["c3/kernel"], 0.5)
    with pytest.raises(ValueError, match="must come before it"):
        importance.greedy_l1(params, order[1:], 0.5, reads={"c2/kernel": "c1/kernel"})


def test_every_score_is_registered():
    want = {"apoz", "bn_scale", "fisher", "fisher_weight", "fpgm", "hrank", "l1", "l2", "lamp"}
    assert want | {"obd", "random", "taylor"} <= set(importance.names())
    with pytest.raises(ValueError, match="'fischer'.*Did you mean 'fisher'"):
        importance.get("fischer")
