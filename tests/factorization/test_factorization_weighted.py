"""Low rank under measured metrics: closed forms, moments by convolution, gradients by loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from cnnjax import factorization as f

pytestmark = pytest.mark.method("weighted_low_rank")

EXAMPLE = jax.ShapeDtypeStruct((1, 7, 6, 4), jnp.float32)


class Net(nnx.Module):
    """A strided, grouped convolution with an uneven padding, a ReLU, a dense layer."""

    def __init__(self):
        self.conv = nnx.Conv(
            4, 8, (3, 2), (2, 1), padding=((1, 2), (0, 1)),
            feature_group_count=2, rngs=nnx.Rngs(0),
        )  # fmt: skip
        self.head = nnx.Linear(8, 5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


@pytest.fixture(scope="module")
def net():
    return Net()


def batch(seed, n=24):
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, 7, 6, 4)) * 0.6 ** np.arange(4)
    return {"image": x.astype(np.float32), "label": g.integers(0, 5, n)}


def test_weights_of_rank_one_have_a_closed_form():
    g = np.random.default_rng(0)
    matrix = g.normal(size=(9, 7))
    column, row = g.uniform(0.5, 2, 9), g.uniform(0.5, 2, 7)
    with jax.enable_x64(True):
        left, right = f.entrywise_low_rank(matrix, np.outer(column, row), 3)
    u, s, vt = scipy.linalg.svd(column[:, None] * matrix * row, full_matrices=False)
    best = ((u[:, :3] * s[:3]) @ vt[:3]) / np.outer(column, row)
    np.testing.assert_allclose(np.asarray(left) @ np.asarray(right), best, atol=1e-9)


def test_general_weights_only_improve_and_missing_entries_are_found():
    g = np.random.default_rng(1)
    matrix, weights = g.normal(size=(12, 10)), g.uniform(0, 1, (12, 10)) ** 2

    def error(rounds):
        left, right = f.entrywise_low_rank(matrix, weights, 3, rounds)
        return np.linalg.norm(weights * (matrix - np.asarray(left) @ np.asarray(right)))

    with jax.enable_x64(True):
        errors = [error(r) for r in (1, 5, 25, 125)]
        u, s, vt = scipy.linalg.svd(matrix, full_matrices=False)
        plain = np.linalg.norm(weights * (matrix - (u[:, :3] * s[:3]) @ vt[:3]))
        assert errors[-1] < 0.9 * plain
        assert all(b <= a + 1e-12 for a, b in zip(errors, errors[1:]))
        low = g.normal(size=(12, 2)) @ g.normal(size=(2, 10))
        known = (g.uniform(size=low.shape) < 0.8).astype(float)
        left, right = f.entrywise_low_rank(np.where(known, low, 9.0), known, 2, 3000)
        np.testing.assert_allclose(np.asarray(left) @ np.asarray(right), low, atol=1e-4)


def test_moments_say_how_large_the_answers_are(net):
    batches = [batch(0), batch(1)]
    moments = f.input_moments(net, ["conv", "head"], batches)
    assert moments["conv"].shape == (2, 12, 12)
    x = np.concatenate([b["image"] for b in batches])
    no_bias = nnx.clone(net.conv)
    no_bias.bias[...] = jnp.zeros(8)
    answers = np.asarray(no_bias(jnp.asarray(x))).reshape(-1, 2, 4)
    for g in range(2):
        w = np.asarray(net.conv.kernel[...])[..., 4 * g : 4 * g + 4].reshape(12, 4)
        found = np.diag(w.T @ np.asarray(moments["conv"][g], np.float64) @ w)
        np.testing.assert_allclose(found, (answers[:, g] ** 2).mean(0), rtol=1e-4)
    hidden = np.asarray(nnx.relu(net.conv(jnp.asarray(x))).mean((1, 2)))
    np.testing.assert_allclose(moments["head"][0], hidden.T @ hidden / len(x), atol=1e-5)


def test_as_a_rule_the_answers_are_the_best_of_their_rank(net):
    batches = [batch(0), batch(1)]
    x = jnp.concatenate([jnp.asarray(b["image"]) for b in batches])

    def answers(model):
        return np.asarray(model.conv(x), np.float64).reshape(-1, 2, 4)

    want = answers(net)
    for rank in (2, 4):
        rules = {"conv": f.Weighted(rank, always=True), "head": f.Weighted(rank + 1, always=True)}
        decided = f.with_metrics(net, f.plan(net, rules, EXAMPLE), batches)
        small = f.factorize(net, decided)
        lost = ((answers(small) - want) ** 2).sum((0, 2))
        plain = f.factorize(net, {"conv": f.Basis(rank, always=True)}, EXAMPLE)
        assert (lost <= ((answers(plain) - want) ** 2).sum((0, 2)) * (1 + 1e-4) + 1e-4).all()
        for g in range(2):
            part = want[:, g] - np.asarray(net.conv.bias[...], np.float64).reshape(2, 4)[g]
            tail = np.linalg.svd(part, compute_uv=False)[rank:]
            np.testing.assert_allclose(lost[g], (tail**2).sum(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(small(x), net(x), atol=1e-5)


def test_weights_of_the_loss_are_its_gradients(net):
    b = batch(2, 6)
    found = f.loss_weights(net, ["conv", "head"], [b])
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)

    @jax.jit
    def slope(params, x, c):
        def loss(p):
            return -jax.nn.log_softmax(nnx.merge(graphdef, p, rest, copy=True)(x[None])[0])[c]

        return jax.grad(loss)(params)

    total = {"conv": 0.0, "head": 0.0}
    for x, y in zip(b["image"], b["label"]):
        for c in set(range(5)) - {int(y)}:
            gradient = slope(params, x, c)
            for path in total:
                total[path] = total[path] + np.asarray(gradient[path]["kernel"][...]) ** 2
    for path, squares in total.items():
        np.testing.assert_allclose(found[path], np.sqrt(squares), rtol=1e-4, atol=1e-6)
    rule = f.make_rule("mahalanobis", 2, always=True)
    decided = f.with_metrics(net, f.plan(net, {"conv": rule}, EXAMPLE), [b])
    small = f.factorize(net, decided)
    kernel, alpha = np.asarray(net.conv.kernel[...]), np.asarray(found["conv"])

    def weighted(model):
        first, last = (np.asarray(m.kernel[...]) for m in model.conv.layers)
        pairs = zip(np.split(first, 2, -1), np.split(last, 2, -1))
        again = np.concatenate([a @ z[0, 0] for a, z in pairs], -1)
        return np.linalg.norm(alpha * (kernel - again))

    plain = f.factorize(net, {"conv": f.Basis(2, always=True)}, EXAMPLE)
    assert weighted(small) < weighted(plain)


def test_bad_input(net):
    with pytest.raises(ValueError, match="metric is 'input'; expected 'inputs' or 'loss'"):
        f.Weighted(metric="input")
    decided = f.plan(net, {"conv": f.Weighted(2, always=True)}, EXAMPLE)
    with pytest.raises(ValueError, match="needs its metric measured: with_metrics"):
        f.factorize(net, decided)
    with pytest.raises(ValueError, match="no batches"):
        f.with_metrics(net, decided, [])
    with pytest.raises(ValueError, match="batches with 'image' and 'label'"):
        f.loss_weights(net, ["conv"], [{"image": batch(0)["image"]}])
    with pytest.raises(ValueError, match="rank is 8; expected 1 to 7"):
        f.entrywise_low_rank(np.ones((9, 7)), np.ones((9, 7)), 8)
