"""Proximal operators against brute-force minimization; proximal training against optimality."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from cnnjax import pruning
from cnnjax.pruning import prox
from cnnjax.pruning.proximal import Prox, adam_steps, forward_backward_splitting

RNG = np.random.default_rng(0)


def brute(v, g, starts=6):
    """Nelder-Mead in a few dimensions from several starts, the best of them."""
    v = np.asarray(v, np.float64)

    def value(u):
        return 0.5 * np.sum((u - v) ** 2) + g(u)

    runs = [np.zeros(v.size), v, 0.5 * v]
    runs += [v * RNG.uniform(0, 1, v.size) for _ in range(starts)]
    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000, "maxfev": 8000}
    found = [minimize(value, s, method="Nelder-Mead", options=options).x for s in runs]
    found.append(np.zeros(v.size))
    return min(found, key=value), value


@pytest.mark.method("prox_operators")
@pytest.mark.parametrize("name", ["l1", "squared_l2", "l0"])
def test_scalar_operators_minimize_on_a_grid(name):
    g = {
        "l1": lambda u, t: t * np.abs(u),
        "squared_l2": lambda u, t: 0.5 * t * u**2,
        "l0": lambda u, t: t * (u != 0),
    }[name]
    grid = np.linspace(-3, 3, 6001)
    v = np.linspace(-2.5, 2.5, 41) + 1e-3
    for t in (0.1, 0.7, 1.3):
        with jax.enable_x64(True):
            got = np.asarray(getattr(prox, name)(jnp.asarray(v), t))
        near = np.concatenate([np.broadcast_to(grid, (len(v), len(grid))), v[:, None]], axis=1)
        best = (0.5 * (near - v[:, None]) ** 2 + g(near, t)).min(axis=1)
        mine = 0.5 * (got - v) ** 2 + g(got, t)
        # never above the best of a fine grid, nor below it by more than its spacing allows
        assert (mine <= best + 1e-12).all()
        assert (best - mine <= 1e-6).all()


@pytest.mark.method("prox_operators")
def test_vector_operators_equal_brute_force():
    with jax.enable_x64(True):
        for trial in range(4):
            v = RNG.normal(size=3) * (0.5 if trial == 3 else 1.5)
            x = jnp.asarray(v)
            cases = [
                (prox.group_l2(x, 0.6), lambda u: 0.6 * np.linalg.norm(u)),
                (
                    prox.sparse_group(x, 0.3, 0.5),
                    lambda u: 0.3 * np.abs(u).sum() + 0.5 * np.linalg.norm(u),
                ),
                (
                    prox.nested_groups(x.reshape(1, 3), [0.2, 0.4], [(), None]).ravel(),
                    lambda u: 0.2 * np.abs(u).sum() + 0.4 * np.linalg.norm(u),
                ),
            ]
            for got, g in cases:
                want, value = brute(v, g)
                np.testing.assert_allclose(got, want, atol=2e-6)
                assert value(np.asarray(got)) <= value(want) + 1e-12


@pytest.mark.method("prox_operators")
def test_group_operator_in_an_adaptive_metric_equals_brute_force():
    with jax.enable_x64(True):
        for trial in range(5):
            v = RNG.normal(size=3)
            eta = RNG.uniform(0.1, 2.0, 3)
            if trial == 4:
                eta[1] = 0.0  # a coordinate that doesn't move keeps its value
            lam = 0.4
            got = np.asarray(prox.group_l2(jnp.asarray(v), jnp.asarray(eta * lam)))
            free = eta > 0

            def value(u, v=v, eta=eta, free=free, lam=lam):
                full = np.where(free, 0, v)
                full[free] = u
                gap = (full - v)[free]
                return 0.5 * np.sum(gap**2 / eta[free]) + lam * np.linalg.norm(full)

            options = {"xatol": 1e-11, "fatol": 1e-15, "maxiter": 4000}
            starts = [v[free], np.zeros(free.sum())]
            runs = [minimize(value, s, method="Nelder-Mead", options=options).x for s in starts]
            want = min(runs, key=value)
            np.testing.assert_allclose(got[free], want, atol=2e-6)
            np.testing.assert_array_equal(got[~free], v[~free])
        # equal steps: the ordinary operator
        v = jnp.asarray(RNG.normal(size=(3, 4)))
        same = prox.group_l2(v, jnp.full((3, 4), 0.7), axes=(0,))
        np.testing.assert_allclose(same, prox.group_l2(v, 0.7, axes=(0,)), rtol=1e-10)


@pytest.mark.method("prox_operators")
def test_ball_keeps_the_nearest_sparse_vector_and_breaks_ties_by_index():
    v = np.asarray([0.5, -2.0, 0.1, 1.5, -0.6], np.float32)
    for k in range(6):
        got = np.asarray(prox.l0_ball(jnp.asarray(v), k))
        best = min(
            (np.where(np.isin(range(5), s), v, 0) for s in itertools.combinations(range(5), k)),
            key=lambda u: np.sum((u - v) ** 2),
        )
        np.testing.assert_array_equal(got, best)
    np.testing.assert_array_equal(prox.l0_ball(jnp.asarray([1.0, -1, 1, 1]), 2), [1, -1, 0, 0])


@pytest.mark.method("prox_operators")
def test_nuclear_norm_against_perturbation_and_numpy():
    v = RNG.normal(size=(4, 3))
    with jax.enable_x64(True):
        got = np.asarray(prox.nuclear(jnp.asarray(v), 0.8))
    u, s, vt = np.linalg.svd(v, full_matrices=False)
    np.testing.assert_allclose(got, u @ np.diag(np.maximum(s - 0.8, 0)) @ vt, atol=1e-12)

    def value(x):
        return 0.5 * np.sum((x - v) ** 2) + 0.8 * np.linalg.svd(x, compute_uv=False).sum()

    base = value(got)
    for _ in range(200):
        assert value(got + 1e-3 * RNG.normal(size=v.shape)) >= base


@pytest.mark.method("prox_operators")
def test_convex_operators_are_non_expansive_and_keep_zero():
    a, b = (jnp.asarray(RNG.normal(size=(50, 4)), jnp.float32) for _ in range(2))
    ops = [
        lambda v: prox.l1(v, 0.4),
        lambda v: prox.squared_l2(v, 0.4),
        lambda v: prox.group_l2(v, 0.9, axes=(1,)),
        lambda v: prox.sparse_group(v, 0.2, 0.5, axes=(1,)),
        lambda v: prox.nuclear(v, 3.0),
    ]
    for op in ops:
        both = np.asarray(jax.jit(op)(a)), np.asarray(jax.jit(op)(b))
        assert np.linalg.norm(both[0] - both[1]) <= np.linalg.norm(a - b) + 1e-6
        np.testing.assert_array_equal(op(jnp.zeros((50, 4))), np.zeros((50, 4)))
    turn, _ = np.linalg.qr(RNG.normal(size=(4, 4)))
    turn = jnp.asarray(turn, jnp.float32)
    rotated = prox.group_l2(a @ turn, 0.9, axes=(1,))
    np.testing.assert_allclose(rotated, prox.group_l2(a, 0.9, axes=(1,)) @ turn, atol=1e-5)
    slope = jax.grad(lambda v: jnp.sum(prox.norms(v, (1,))))(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(slope, np.zeros((2, 3)))


@pytest.mark.method("prox_operators")
def test_trees_take_operators_by_glob_and_filters_take_their_bias_along():
    w = np.float32([[3, 0.1], [4, 0.1]])
    params = {"a": {"kernel": w, "bias": np.float32([0, 0.1])}, "b": {"kernel": w, "bias": w[0]}}
    params = jax.tree.map(jnp.asarray, params)
    out = pruning.prox_tree(
        params, 0.5, {"a/*": Prox("group_l2", 2.0), "b/kernel": Prox("l1", 2.0)}
    )
    np.testing.assert_allclose(out["a"]["kernel"], [[3 * 0.8, 0], [4 * 0.8, 0]], rtol=1e-6)
    np.testing.assert_array_equal(out["a"]["bias"], [0, 0])
    np.testing.assert_allclose(out["b"]["kernel"], [[2, 0], [3, 0]], rtol=1e-6)
    np.testing.assert_array_equal(out["b"]["bias"], w[0])
    value = float(pruning.penalty_tree(params, {"a/*": Prox("group_l2", 2.0)}))
    np.testing.assert_allclose(value, 2 * (5 + np.sqrt(0.03)), rtol=1e-6)
    kept = pruning.prox_tree(params, 1.0, {"a/kernel": Prox("l0_ball", keep=2)})
    np.testing.assert_array_equal(kept["a"]["kernel"] != 0, [[1, 0], [1, 0]])
    with pytest.raises(ValueError, match="c/\\*.*Did you mean|c/\\*.*Known"):
        pruning.prox_tree(params, 1.0, {"c/*": Prox("l1", 1.0)})
    with pytest.raises(ValueError, match="'l_1'.*Did you mean 'l1'"):
        Prox("l_1", 1.0)
    with pytest.raises(ValueError, match="negative"):
        Prox("l1", -1.0)
    with pytest.raises(ValueError, match="keep"):
        Prox("l0_ball")
    with pytest.raises(ValueError, match="nested"):
        prox.nested_groups(jnp.ones((2, 2)), [1, 1], [None, (0,)])


def least_squares(seed=0, n=40, d=20):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, d))
    y = a @ (rng.normal(size=d) * (rng.random(d) < 0.3)) + 0.1 * rng.normal(size=n)
    return a / np.sqrt(n), y / np.sqrt(n)


def descend(optimizer, w, gradient, steps):
    """Params and the objective's trace after ``steps`` updates, in one compiled loop."""

    @jax.jit
    def run(w):
        def one(carry, _):
            w, state = carry
            updates, state = optimizer.update(gradient(w), state, w)
            return (optax.apply_updates(w, updates), state), w

        (w, _), trace = jax.lax.scan(one, (w, optimizer.init(w)), None, steps)
        return w, trace

    return run(w)


@pytest.mark.method("forward_backward_splitting")
@pytest.mark.method("sparse_objective")
def test_splitting_reaches_the_lasso_optimum():
    a, y = least_squares()
    lip, lam = np.linalg.norm(a, 2) ** 2, 0.05
    with jax.enable_x64(True):
        aj, yj = jnp.asarray(a), jnp.asarray(y)

        def gradient(p):
            return {"w": aj.T @ (aj @ p["w"] - yj)}

        opt = forward_backward_splitting(optax.sgd(1 / lip), {"w": Prox("l1", lam)}, 1 / lip)
        end, trace = descend(opt, {"w": jnp.zeros(20)}, gradient, 4000)
        w = np.asarray(end["w"])
        # lambda at least the gradient's largest entry at 0: the solution is exactly 0
        big = float(np.abs(a.T @ y).max())
        opt = forward_backward_splitting(optax.sgd(1 / lip), {"w": Prox("l1", big)}, 1 / lip)
        start = {"w": jnp.asarray(RNG.normal(size=20))}
        none, _ = descend(opt, start, gradient, 4000)
    g = a.T @ (a @ w - y)
    on = w != 0
    assert 0 < on.sum() < 20
    np.testing.assert_allclose(g[on], -lam * np.sign(w[on]), atol=1e-8)
    assert (np.abs(g[~on]) <= lam + 1e-8).all()
    ws = np.asarray(trace["w"])
    values = 0.5 * np.sum((ws @ a.T - y) ** 2, axis=1) + lam * np.abs(ws).sum(axis=1)
    assert (np.diff(values) <= 1e-13).all()
    assert (np.asarray(none["w"]) == 0).all()


@pytest.mark.method("forward_backward_splitting")
def test_groups_are_zero_exactly_where_their_gradient_is_small():
    a, y = least_squares(1)
    lip, lam = np.linalg.norm(a, 2) ** 2, 0.12
    with jax.enable_x64(True):
        aj, yj = jnp.asarray(a), jnp.asarray(y)

        def gradient(p):
            return {"w": (aj.T @ (aj @ p["w"].T.ravel() - yj)).reshape(5, 4).T}

        spec = {"w": Prox("group_l2", lam, group="filter")}
        opt = forward_backward_splitting(optax.sgd(1 / lip), spec, 1 / lip)
        end, _ = descend(opt, {"w": jnp.zeros((4, 5))}, gradient, 4000)
        w, g = np.asarray(end["w"]), np.asarray(gradient(end)["w"])
    zero = (w == 0).all(axis=0)
    assert 0 < zero.sum() < 5
    np.testing.assert_array_equal(zero, np.linalg.norm(g, axis=0) < lam - 1e-9)
    unit = w[:, ~zero] / np.linalg.norm(w[:, ~zero], axis=0)
    np.testing.assert_allclose(g[:, ~zero], -lam * unit, atol=1e-8)


@pytest.mark.method("forward_backward_splitting")
def test_adams_own_steps_and_schedules_reach_the_operator():
    params = {"w": jnp.asarray([1.0, -0.5, 0.2]), "b": jnp.asarray([1.0])}
    grads = {"w": jnp.asarray([0.3, -2.0, 0.01]), "b": jnp.asarray([1.0])}
    adam = optax.adam(0.1)
    opt = forward_backward_splitting(adam, {"w": Prox("l1", 0.05)}, adam_steps(0.1))
    updates, _ = jax.jit(opt.update)(grads, opt.init(params), params)
    plain, _ = adam.update(grads, adam.init(params), params)
    eta = 0.1 / (np.abs(np.asarray(grads["w"])) + 1e-8)  # nu / (1 - b2) is g^2 after one step
    v = np.asarray(params["w"] + plain["w"])
    want = np.sign(v) * np.maximum(np.abs(v) - 0.05 * eta, 0)
    np.testing.assert_allclose(params["w"] + updates["w"], want, atol=1e-5)
    np.testing.assert_allclose(updates["b"], plain["b"], rtol=1e-6)
    # a schedule, and the backward step on every second update only
    opt = forward_backward_splitting(
        optax.sgd(0.0), {"w": Prox("l1", 1.0)}, lambda count: 0.1 / (1 + count), every=2
    )
    state, seen = opt.init(params), []
    for _ in range(2):
        updates, state = opt.update(grads, state, params)
        seen.append(np.asarray(params["w"] + updates["w"]))
    np.testing.assert_array_equal(seen[0], params["w"])
    np.testing.assert_allclose(seen[1], [0.9, -0.4, 0.1], rtol=1e-5)
    bad = forward_backward_splitting(optax.sgd(1.0), {"w": Prox("l1", 1.0)}, adam_steps(0.1))
    with pytest.raises(ValueError, match="second moments"):
        bad.update(grads, bad.init(params), params)
    with pytest.raises(ValueError, match="params"):
        opt.update(grads, state)
