"""Penalties against numpy and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import tree
from cnnjax.pruning import penalties

RNG = np.random.default_rng(2)


@pytest.mark.method("sparse_objective")
def test_lp_penalty_counts_and_exempts():
    w = RNG.normal(size=(4, 3)).astype(np.float32)
    w[w < 0.2] = 0
    params = jax.tree.map(jnp.asarray, {"fc": {"kernel": w, "bias": np.ones(3, np.float32)}})
    np.testing.assert_allclose(penalties.sparsity(params, 0.5), 0.5 * np.abs(w).sum(), rtol=1e-6)
    for scale in (1.0, 1e-3, -7.0):
        scaled = jax.tree.map(lambda x, s=scale: x * s, params)
        assert float(penalties.sparsity(scaled, 1.0, 0)) == np.count_nonzero(w)
    assert float(penalties.sparsity(params, 1.0, min_ndim=1)) > np.abs(w).sum()
    with pytest.raises(ValueError, match="p must be 0, 1 or 2"):
        penalties.sparsity(params, 1.0, 3)


@pytest.mark.method("structured_sparsity_learning")
@pytest.mark.method("group_wise_brain_damage")
def test_group_lasso_and_its_gradient():
    w = RNG.normal(size=(3, 3, 2, 4))
    strengths = {"filter": 0.3, "channel": 0.2, "column": 0.1, "layer": 0.05, "kernel": 0.02}
    axes = {"filter": (0, 1, 2), "channel": (0, 1, 3), "column": (3,), "kernel": (0, 1)}

    def oracle(w):
        total = 0.05 * np.linalg.norm(w)
        return total + sum(strengths[n] * np.sqrt((w**2).sum(a)).sum() for n, a in axes.items())

    with jax.enable_x64(True):
        fn = jax.jit(jax.value_and_grad(lambda w: penalties.group_lasso({"k": w}, strengths)))
        value, slope = fn(jnp.asarray(w))
        permuted, _ = fn(jnp.asarray(w[..., ::-1]))
        truncated = penalties.group_lasso({"k": jnp.asarray(w)}, {"column": 1.0}, truncate=1.5)
        at_zero = fn(jnp.zeros_like(w))[1]
    np.testing.assert_allclose(value, oracle(w), rtol=1e-12)
    np.testing.assert_allclose(permuted, value, rtol=1e-12)  # order of the output maps
    np.testing.assert_allclose(truncated, np.minimum(np.sqrt((w**2).sum(3)), 1.5).sum(), rtol=1e-12)
    assert (np.asarray(at_zero) == 0).all()
    for index in [(0, 0, 0, 0), (1, 2, 1, 3), (2, 1, 0, 2)]:
        step = np.zeros_like(w)
        step[index] = 1e-6
        numeric = (oracle(w + step) - oracle(w - step)) / 2e-6
        np.testing.assert_allclose(slope[index], numeric, rtol=1e-6)
    with pytest.raises(ValueError, match="'filtre'.*Did you mean 'filter'"):
        penalties.group_lasso({"k": jnp.zeros((2, 2))}, {"filtre": 1.0})
    with pytest.raises(ValueError, match="negative"):
        penalties.group_lasso({"k": jnp.zeros((2, 2))}, {"filter": -1.0})


@pytest.mark.method("weight_decay_biases")
@pytest.mark.parametrize("kind", ["hyperbolic", "exponential", "decay"])
def test_unit_biases_gradients_and_bounds(kind):
    params = {
        "a": {"kernel": RNG.normal(size=(3, 4)), "bias": RNG.normal(size=4)},
        "b": {"kernel": RNG.normal(size=(4, 2)), "bias": RNG.normal(size=2)},
    }
    lam = 0.7

    def oracle(p, outgoing):
        total = np.abs(p["a"]["kernel"]).sum(0)
        if outgoing:
            total = total + np.abs(p["b"]["kernel"]).sum(1)
        if kind == "hyperbolic":
            return (total / (1 + lam * total)).sum()
        if kind == "exponential":
            return (1 - np.exp(-lam * total)).sum()
        return lam * (p["a"]["kernel"] ** 2).sum()

    consumers = {"a/kernel": "b/kernel"}
    with jax.enable_x64(True):
        tree_x = jax.tree.map(jnp.asarray, params)
        for reads in (None, consumers):

            def fn(p, reads=reads):
                return penalties.unit_bias(p, kind, lam, exclude="b/kernel", consumers=reads)

            value, slope = jax.value_and_grad(fn)(tree_x)
            np.testing.assert_allclose(value, oracle(params, bool(reads)), rtol=1e-12)
            for path in ("a", "b"):
                for index in [(0, 1), (2, 0)]:
                    up = jax.tree.map(np.array, params)
                    down = jax.tree.map(np.array, params)
                    up[path]["kernel"][index] += 1e-6
                    down[path]["kernel"][index] -= 1e-6
                    numeric = (oracle(up, bool(reads)) - oracle(down, bool(reads))) / 2e-6
                    np.testing.assert_allclose(slope[path]["kernel"][index], numeric, atol=1e-8)
            assert not np.asarray(slope["a"]["bias"]).any()
        huge = jax.tree.map(lambda x: x * 1e6, tree_x)
        if kind != "decay":
            bound = 4 / lam if kind == "hyperbolic" else 4
            assert float(penalties.unit_bias(huge, kind, lam, exclude="b/kernel")) <= bound
            # only a unit's total counts
            moved = np.abs(params["a"]["kernel"])[[1, 2, 0]]
            shuffled = {**tree_x, "a": {**tree_x["a"], "kernel": jnp.asarray(moved)}}
            np.testing.assert_allclose(
                penalties.unit_bias(shuffled, kind, lam, exclude="b/kernel"),
                penalties.unit_bias(tree_x, kind, lam, exclude="b/kernel"),
                rtol=1e-12,
            )
    with pytest.raises(ValueError, match="'hyperbola'.*Did you mean"):
        penalties.unit_bias(tree.nest({"k": jnp.ones((2, 2))}), "hyperbola", 1.0)
    with pytest.raises(KeyError, match="no kernel 'c/kernel'"):
        penalties.unit_totals(tree.nest({"k": jnp.ones((2, 2))}), consumers={"k": "c/kernel"})
