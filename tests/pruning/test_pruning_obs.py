"""OBS against constrained least squares; OBD's diagonals against brute-force derivatives."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.pruning import obs
from cnnjax.pruning.importance import curvature

RNG = np.random.default_rng(5)


def constrained(x, y, removed):
    """Least squares with some weights held at zero, and its loss 1/(2P) ||y - x w||^2."""
    w = np.zeros(x.shape[1])
    w[~removed] = np.linalg.lstsq(x[:, ~removed], y, rcond=None)[0]
    return w, 0.5 * np.mean((y - x @ w) ** 2)


@pytest.mark.method("optimal_brain_surgeon")
def test_linear_model_equals_the_constrained_optimum():
    x, y = RNG.normal(size=(40, 7)), RNG.normal(size=40)
    full, base = constrained(x, y, np.zeros(7, bool))
    h = x.T @ x / 40
    with jax.enable_x64(True):
        a = jnp.asarray(np.linalg.inv(h))
        w = jnp.asarray(full)
        out = jax.device_get(obs.obs(w, a, 4))
        removed = np.zeros(7, bool)
        removed[[1, 4, 5]] = True
        joint, joint_cost = jax.device_get(obs.obs_set(w, a, removed))
        # with a diagonal Hessian: OBD, and only the deleted weight moves
        diagonal = RNG.uniform(0.5, 2, 7)
        plain = jax.device_get(obs.obs(w, jnp.asarray(np.diag(1 / diagonal)), 1))
    gone = np.zeros(7, bool)
    loss = base
    for q, cost in zip(out.order, out.costs):
        # the cheapest of all single deletions
        options = {j: constrained(x, y, gone | (np.arange(7) == j))[1] for j in range(7)}
        assert q == min((j for j in options if not gone[j]), key=options.__getitem__)
        gone[q] = True
        want, after = constrained(x, y, gone)
        np.testing.assert_allclose(cost, after - loss, atol=1e-13)
        loss = after
    np.testing.assert_allclose(out.w, want, atol=1e-12)
    np.testing.assert_array_equal(out.alive, ~gone)
    np.testing.assert_allclose(
        out.inverse[np.ix_(~gone, ~gone)], np.linalg.inv(h[np.ix_(~gone, ~gone)]), atol=1e-12
    )
    want, after = constrained(x, y, removed)
    np.testing.assert_allclose(joint, want, atol=1e-12)
    np.testing.assert_allclose(joint_cost, after - base, atol=1e-13)
    saliency = 0.5 * diagonal * full**2
    assert plain.order[0] == saliency.argmin()
    np.testing.assert_allclose(plain.costs[0], saliency.min(), rtol=1e-12)
    np.testing.assert_array_equal(plain.w, np.where(np.arange(7) == saliency.argmin(), 0, full))


@pytest.mark.method("optimal_brain_surgeon")
def test_recursion_equals_the_direct_inverse():
    x, s = RNG.normal(size=(5, 8)), RNG.uniform(0.2, 2, 5)  # fewer patterns than weights
    with jax.enable_x64(True):
        got = obs.inverse_hessian(jnp.asarray(x), 1e-2)
        weighted = obs.inverse_hessian(jnp.asarray(x), 1e-2, jnp.asarray(s))
    np.testing.assert_allclose(got, np.linalg.inv(1e-2 * np.eye(8) + x.T @ x / 5), rtol=1e-8)
    want = np.linalg.inv(1e-2 * np.eye(8) + (x.T * s) @ x / 5)
    np.testing.assert_allclose(weighted, want, rtol=1e-8)
    with pytest.raises(ValueError, match="alpha must be positive"):
        obs.inverse_hessian(jnp.asarray(x), 0.0)
    with pytest.raises(ValueError, match=r"shape \(0, 8\); expected \(patterns, weights\)"):
        obs.inverse_hessian(jnp.zeros((0, 8)), 1e-2)
    with pytest.raises(ValueError, match=r"shape \(0, 8\); expected \(samples, inputs\)"):
        obs.second_moment(np.zeros((0, 8)))


@pytest.mark.method("optimal_brain_surgeon")
@pytest.mark.parametrize("block", [1, 4])
def test_layer_by_layer_equals_greedy_paths_in_numpy(block):
    n, o, sparsity = 9, 4, 0.6
    x = RNG.normal(size=(50, n)) @ RNG.normal(size=(n, n))
    w = RNG.normal(size=(n, o))
    h = x.T @ x / 50
    with jax.enable_x64(True):
        got = jax.device_get(
            obs.layer_obs(jnp.asarray(w), jnp.asarray(h), sparsity, damping=1e-6, block=block)
        )
    hd = h + 1e-6 * np.mean(np.diag(h)) * np.eye(n)

    def cost_of(u, keep):
        v = np.zeros(n)
        if keep.any():
            v[keep] = np.linalg.solve(hd[np.ix_(keep, keep)], (hd @ w[:, u])[keep])
        d = v - w[:, u]
        return 0.5 * d @ hd @ d, v

    entries = []
    for u in range(o):
        keep, last, top = np.ones(n, bool), 0.0, 0.0
        for step in range(n):
            options = []
            for j in np.flatnonzero(keep):
                trial = keep.copy()
                trial[j] = False
                options.append((cost_of(u, trial)[0], j))
            total, j = min(options)
            keep[j] = False
            top = max(top, total - last)
            last = total
            entries.append((top, u, step, j))
    gone = int(np.ceil(sparsity * n * o))
    mask = np.ones((n, o), bool)
    for _, u, _, j in sorted(entries)[:gone]:
        mask[j, u] = False
    np.testing.assert_array_equal(got.mask, mask)
    want = np.stack([cost_of(u, mask[:, u])[1] for u in range(o)], axis=1)
    np.testing.assert_allclose(got.w, want, atol=1e-9)
    total = sum(cost_of(u, mask[:, u])[0] for u in range(o))
    np.testing.assert_allclose(got.cost, total, rtol=1e-8)
    # far better than deleting the same number of small weights
    small = np.abs(w) > np.sort(np.abs(w).ravel())[gone - 1]
    d = w * small - w
    assert got.cost < 0.5 * np.sum(d * (hd @ d))


@pytest.mark.method("optimal_brain_surgeon")
@pytest.mark.usefixtures("as_user")
def test_bad_hessians_and_counts():
    w = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"\(2, 2\) for a kernel of 3 inputs; expected \(3, 3\)"):
        obs.layer_obs(w, jnp.eye(2), 0.5)
    with pytest.raises(ValueError, match=r"\(2, 3\) for 3 weights"):
        obs.obs(w[:, 0], jnp.ones((2, 3)), 1)
    with pytest.raises(ValueError, match=r"\[0, 3\), got 3"):
        obs.obs(w[:, 0], jnp.eye(3), 3)
    with pytest.raises(ValueError, match="fraction of weights"):
        obs.layer_obs(w, jnp.eye(3), 1.5)
    with pytest.raises(ValueError, match=r"\(2,\) for 3 weights; expected \(3,\)"):
        obs.obs_set(w[:, 0], jnp.eye(3), np.asarray([True, False]))
    for broken in (jnp.full((3, 3), jnp.nan), jnp.diag(jnp.asarray([1.0, -2, 1]))):
        with pytest.raises(ValueError, match="not positive definite"):
            obs.layer_obs(w, broken, 0.5)


@pytest.mark.method("optimal_brain_damage")
@pytest.mark.parametrize("output", ["linear", "tanh"])
def test_backward_sweep_equals_the_finite_difference_diagonal(output):
    n, i, hidden, o = 6, 3, 4, 2
    shapes = [(i, hidden), (hidden,), (hidden, o), (o,)]
    flat = [RNG.normal(size=s) for s in shapes]
    x, d = RNG.normal(size=(n, i)), RNG.normal(size=(n, o))
    last = np.tanh if output == "tanh" else (lambda a: a)

    def loss(ps):
        w1, b1, w2, b2 = ps
        return np.sum((d - last(np.tanh(x @ w1 + b1) @ w2 + b2)) ** 2) / n

    with jax.enable_x64(True):
        layers = [tuple(map(jnp.asarray, flat[:2])), tuple(map(jnp.asarray, flat[2:]))]
        got = curvature.mlp_diagonal(layers, jnp.asarray(x), jnp.asarray(d), output=output)
        lm = curvature.mlp_diagonal(
            layers, jnp.asarray(x), jnp.asarray(d), output=output, levenberg_marquardt=True
        )
    got, lm = [a for pair in got for a in pair], [a for pair in lm for a in pair]
    step = 1e-4
    for k, p in enumerate(flat):
        for index in itertools.islice(np.ndindex(p.shape), 5):
            values = []
            for move in (-step, 0, step):
                moved = [q.copy() for q in flat]
                moved[k][index] += move
                values.append(loss(moved))
            numeric = (values[0] - 2 * values[1] + values[2]) / step**2
            np.testing.assert_allclose(got[k][index], numeric, rtol=1e-5, atol=1e-6)
    assert all((np.asarray(a) >= 0).all() for a in lm)
    with pytest.raises(ValueError, match="'tan'.*Did you mean 'tanh'"):
        curvature.mlp_diagonal(layers, jnp.ones((1, i)), jnp.ones((1, o)), activation="tan")
    with pytest.raises(ValueError, match="kernel 0 has shape"):
        curvature.mlp_diagonal(layers, jnp.ones((1, 5)), jnp.ones((1, o)))


def linear_outputs(params, x):
    return x @ params["k"] + params["b"]


@pytest.mark.method("optimal_brain_damage")
def test_gauss_newton_equals_brute_force_and_the_models_own_fisher():
    n, i, c = 7, 3, 4
    params = {"k": RNG.normal(size=(i, c)), "b": RNG.normal(size=c)}
    x = RNG.normal(size=(n, i))
    z = x @ params["k"] + params["b"]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    # J is x (outer) identity: diag(J^T H J)_(a, b) = x_a^2 H_bb with H_bb = p_b (1 - p_b)
    want_k = np.mean(x[:, :, None] ** 2 * (p * (1 - p))[:, None], axis=0)
    # Fisher with labels from the model: E_y of the squared gradient, exactly
    eye = np.eye(c)
    fisher_k = np.mean(
        sum(p[:, [y]][:, :, None] * (x[:, :, None] * (p - eye[y])[:, None]) ** 2 for y in range(c)),
        axis=0,
    )
    with jax.enable_x64(True):
        tree = jax.tree.map(jnp.asarray, params)
        batches = [jnp.asarray(x[:4]), jnp.asarray(x[4:])]
        got = curvature.gauss_newton_diagonal(tree, linear_outputs, batches, chunk=2)
        squared = curvature.gauss_newton_diagonal(tree, linear_outputs, batches, loss="squared")
        scores = curvature.obd(tree, linear_outputs, batches)
    np.testing.assert_allclose(got["k"], want_k, rtol=1e-10)
    np.testing.assert_allclose(got["k"], fisher_k, rtol=1e-10)
    np.testing.assert_allclose(got["b"], np.mean(p * (1 - p), axis=0), rtol=1e-10)
    np.testing.assert_allclose(squared["b"], np.full(c, 2.0), rtol=1e-12)
    np.testing.assert_allclose(scores["k"], 0.5 * want_k * params["k"] ** 2, rtol=1e-10)
    assert set(scores) == {"k"}
    with pytest.raises(ValueError, match="'gn'"):
        curvature.obd(tree, linear_outputs, batches, kind="gn")
    with pytest.raises(ValueError, match="does not match"):
        curvature.obd_scores(tree, {"k": tree["b"], "b": tree["b"]})
    with pytest.raises(ValueError, match="no example"):
        curvature.gauss_newton_diagonal(tree, linear_outputs, [])


def quadratic(params, batch):
    return jnp.mean(0.5 * jnp.einsum("i,nij,j->n", params["w"][:, 0], batch, params["w"][:, 0]))


@pytest.mark.method("optimal_brain_damage")
def test_hutchinson_is_unbiased_and_saliency_is_the_true_increase_of_a_quadratic():
    m = RNG.normal(size=(6, 4, 4))
    m = m @ m.transpose(0, 2, 1)
    h = m.mean(0)
    w = {"w": jnp.asarray(RNG.normal(size=(4, 1)), jnp.float32)}
    batches = [jnp.asarray(m[:4], jnp.float32), jnp.asarray(m[4:], jnp.float32)]
    draws = np.stack(
        [
            curvature.hutchinson_diagonal(w, quadratic, batches, key=jax.random.key(s), samples=8)[
                "w"
            ][:, 0]
            for s in range(12)
        ]
    )
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - np.diag(h)) < 3 * error + 1e-6).all()
    diagonal = jnp.broadcast_to(jnp.diag(jnp.asarray([1.0, 0.5, 2.0, -1.0])), (6, 4, 4))
    exact = curvature.hutchinson_diagonal(
        w, quadratic, [diagonal[:4]], key=jax.random.key(0), samples=8
    )
    np.testing.assert_allclose(exact["w"][:, 0], [1, 0.5, 2, -1], rtol=1e-5)
    saliency = np.asarray(curvature.obd_scores(w, exact)["w"])[:, 0]
    value = np.asarray(w["w"])[:, 0].astype(np.float64)
    increase = 0.5 * np.asarray([1, 0.5, 2]) * value[:3] ** 2
    np.testing.assert_allclose(saliency[:3], increase, rtol=1e-5)
    assert saliency[3] == 0  # negative curvature is clamped
