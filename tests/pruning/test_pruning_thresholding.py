"""Training on the l0 ball, and the thin convolution."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cnnjax import pruning
from cnnjax.pruning import brain_damage, thresholding

RNG = np.random.default_rng(1)


def run(optimizer, params, gradient, steps):
    """Parameters and masks after every update."""

    @jax.jit
    def scan(params):
        def one(carry, _):
            params, state = carry
            updates, state = optimizer.update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, pruning.get_mask(state))

        return jax.lax.scan(one, (params, optimizer.init(params)), None, steps)

    _, trace = scan(params)
    return jax.device_get(trace)


@pytest.mark.method("iterative_hard_thresholding")
def test_classical_form_recovers_a_sparse_vector_exactly():
    a = RNG.normal(size=(80, 100))
    w = np.zeros(100)
    support = RNG.choice(100, 8, replace=False)
    w[support] = RNG.normal(size=8) + np.sign(RNG.normal(size=8))
    y = a @ w
    rate = 1 / np.linalg.norm(a, 2) ** 2
    with jax.enable_x64(True):
        aj, yj = jnp.asarray(a), jnp.asarray(y)
        opt = thresholding.iterative_hard_thresholding(
            optax.sgd(rate), {"w": 8}, dense_steps=1, sparse_steps=0, cycles=2000
        )
        params, _ = run(
            opt,
            {"w": jnp.zeros((100, 1))},
            lambda p: {"w": aj.T @ (aj @ p["w"] - yj[:, None])},
            2000,
        )
    end = params["w"][-1][:, 0]
    assert set(np.flatnonzero(end)) == set(support)
    assert np.abs(end - w).max() < 1e-10


@pytest.mark.method("iterative_hard_thresholding")
def test_cycles_cut_freeze_release_and_end_sparse():
    start = {"a": {"kernel": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)}, "b": jnp.ones(3)}
    goal = RNG.normal(size=(4, 5)).astype(np.float32)

    def gradient(p):
        return {"a": {"kernel": p["a"]["kernel"] - goal}, "b": p["b"]}

    opt = thresholding.iterative_hard_thresholding(
        optax.sgd(0.1, momentum=0.9), 0.3, dense_steps=3, sparse_steps=4, cycles=2
    )
    params, masks = run(opt, start, gradient, 20)
    zeros = params["a"]["kernel"] == 0
    count = zeros.reshape(20, -1).sum(1)
    # sparse after updates 3-7 of each cycle of 7, dense after the others; sparse from then on
    want = np.asarray([0, 0, 14, 14, 14, 14, 14] * 2 + [14] * 6)
    np.testing.assert_array_equal(count, want)
    np.testing.assert_array_equal(masks["a"]["kernel"], ~zeros)
    for first, last in ((2, 6), (9, 19)):
        assert (zeros[first : last + 1] == zeros[first]).all()
        frozen = params["a"]["kernel"][first : last + 1][:, zeros[first]]
        assert (frozen.view(np.int32) == 0).all()  # +0.0, bit for bit
    # cut: the largest of what an uncut update would have given
    assert masks["b"].all()
    assert (params["b"][1:] != params["b"][:-1]).all()


@pytest.mark.method("iterative_hard_thresholding")
@pytest.mark.method("memory_bounded_l0")
def test_bad_numbers_are_refused():
    params = {"k": jnp.ones((4, 5)), "b": jnp.ones(5)}
    with pytest.raises(ValueError, match="keeping 0.01 of k .20 weights. leaves 0"):
        thresholding.keep_counts(params, 0.01)
    with pytest.raises(ValueError, match="count from 1 to 20"):
        thresholding.keep_counts(params, {"k": 21})
    with pytest.raises(ValueError, match="'q' matches nothing"):
        thresholding.keep_counts(params, {"q": 0.5})
    assert thresholding.keep_counts(params, {"k": 0.35}) == {"k": 7}
    with pytest.raises(ValueError, match="dense_steps >= 1"):
        thresholding.iterative_hard_thresholding(
            optax.sgd(1.0), 0.5, dense_steps=0, sparse_steps=1, cycles=1
        )
    with pytest.raises(ValueError, match="multiple of every, got 7 and 3"):
        thresholding.memory_bounded_l0(optax.sgd(1.0), 0.5, every=3, last=7)


@pytest.mark.method("memory_bounded_l0")
def test_projection_is_nearest_idempotent_and_lets_zeros_regrow_until_the_last():
    w = RNG.normal(size=(2, 4)).astype(np.float32)
    for k in (1, 3, 8, 9):
        got, mask = thresholding.project_l0({"w": jnp.asarray(w)}, {"w": min(k, 8)})
        got = np.asarray(got["w"])
        assert np.count_nonzero(got) == min(k, 8) == np.asarray(mask["w"]).sum()
        sets = itertools.combinations(range(8), min(k, 8))
        best = min(np.sum(np.delete(w.ravel(), s) ** 2) for s in sets)
        np.testing.assert_allclose(np.sum((got - w) ** 2), best, rtol=1e-5, atol=1e-7)
        again, _ = thresholding.project_l0({"w": jnp.asarray(got)}, {"w": min(k, 8)})
        np.testing.assert_array_equal(again["w"], got)
    opt = thresholding.memory_bounded_l0(optax.sgd(0.1, momentum=0.9), {"w": 3}, every=3, last=6)
    params, _ = run(opt, {"w": jnp.asarray(w)}, lambda p: {"w": p["w"] - 1}, 9)
    nonzero = np.count_nonzero(params["w"].reshape(9, -1), axis=1)
    np.testing.assert_array_equal(nonzero, [8, 8, 3, 8, 8, 3, 3, 3, 3])


@pytest.mark.method("memory_bounded_l0")
def test_greedy_meets_the_budget_and_equals_exhaustive_search():
    w = {p: RNG.normal(size=(2, 5)) * s for p, s in (("a", 1.0), ("b", 0.1), ("c", 0.02))}
    curve = {"a": 1.0, "b": 1.0, "c": 1.0}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), w)

    def fit(params, counts, target=w):
        new, _ = thresholding.project_l0(params, counts)
        return new, sum(curve[p] * jnp.sum((new[p] - target[p]) ** 2) for p in w)

    grid, full = (0.5, 0.2), 32 * 30
    budget = 600
    counts, pruned, moves = thresholding.greedy_densities(
        params, fit, budget=budget, densities=grid, tolerance=0.5, batch=3, data=params
    )
    used = [m["bits"] for m in moves]
    assert used[-1] <= budget
    assert all(b < a for a, b in zip([full, *used], used))
    loss = {(p, k): np.sort(w[p].ravel() ** 2)[: 10 - k].sum() for p in w for k in (10, 5, 2)}
    options = [
        (sum(loss[p, k] for p, k in zip(w, ks)), ks)
        for ks in itertools.product((10, 5, 2), repeat=3)
        if thresholding.memory(dict.fromkeys(w, 10), dict(zip(w, ks))) <= budget
    ]
    best = min(options)
    assert tuple(counts.get(p, 10) for p in w) == best[1]
    np.testing.assert_allclose(moves[-1]["loss"], best[0], rtol=1e-4)
    for p in w:
        assert np.count_nonzero(pruned[p]) == counts.get(p, 10)
    # a tolerance that nothing meets leaves the network alone
    none, same, moves = thresholding.greedy_densities(
        params, fit, budget=budget, densities=grid, tolerance=-1.0
    )
    assert none == {}
    assert moves == []
    np.testing.assert_array_equal(same["a"], params["a"])


@pytest.mark.method("group_wise_brain_damage")
@pytest.mark.method("structured_sparsity_learning")
@pytest.mark.parametrize(
    ("strides", "padding", "groups"),
    [((1, 1), "SAME", 1), ((2, 2), "VALID", 1), ((2, 1), ((2, 0), (1, 3)), 1), ((1, 2), "SAME", 2)],
)
def test_thin_convolution_equals_the_masked_one(strides, padding, groups):
    x = RNG.normal(size=(2, 7, 8, 4))
    w = RNG.normal(size=(3, 3, 4 // groups, 6))
    columns = RNG.random((3, 3, 4 // groups, groups)) < 0.3
    columns[..., 0, :] = False  # a channel that no filter of any group reads
    mask = np.repeat(columns, 6 // groups, axis=3)
    if groups == 1:
        mask = mask & (np.arange(6) != 2)  # and a filter
    with jax.enable_x64(True):
        matrices, support = brain_damage.thin(w, mask, groups=groups, drop_filters=groups == 1)
        got = brain_damage.thin_conv(
            jnp.asarray(x), matrices, support, strides=strides, padding=padding
        )
        want = jax.lax.conv_general_dilated(
            jnp.asarray(x),
            jnp.asarray(w * mask),
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
    np.testing.assert_allclose(got, want, atol=1e-10)
    kept = sum(m.size for m in matrices)
    assert kept == mask.sum()
    np.testing.assert_allclose(support.density, mask.mean(), rtol=1e-12)
    assert max(c[2] for cs in support.columns for c in cs) < 4 // groups


@pytest.mark.method("group_wise_brain_damage")
def test_thin_layer_replaces_a_pruned_convolution():
    conv = nnx.Conv(3, 5, (3, 3), strides=2, padding=1, rngs=nnx.Rngs(0))
    params = {"kernel": conv.kernel[...]}
    mask = pruning.mask_from_scores(
        jax.tree.map(jnp.abs, params), 0.6, granularity="column", op="l2"
    )["kernel"]
    assert int(np.asarray(mask).any(axis=3).sum()) == 10  # of 27 columns; patterns are shared
    assert set(np.asarray(mask).sum(axis=3).ravel()) == {0, 5}
    layer = brain_damage.ThinConv(conv, mask)
    assert sum(x.size for x in jax.tree.leaves(nnx.state(layer, nnx.Param))) == 10 * 5 + 5
    x = jnp.asarray(RNG.normal(size=(2, 9, 9, 3)), jnp.float32)
    conv.kernel[...] = conv.kernel[...] * mask
    np.testing.assert_allclose(layer(x), conv(x), atol=1e-5)
    with pytest.raises(ValueError, match="removes the whole kernel"):
        brain_damage.thin(np.zeros((3, 3, 2, 2)))
    with pytest.raises(ValueError, match="dilation"):
        brain_damage.ThinConv(nnx.Conv(3, 5, (3, 3), kernel_dilation=2, rngs=nnx.Rngs(0)))


@pytest.mark.method("structured_sparsity_learning")
def test_a_block_of_zeros_beside_a_shortcut_is_the_identity():
    from cnnjax.pruning.proximal import Prox

    kernel = jnp.asarray(RNG.normal(size=(3, 3, 4, 4)), jnp.float32)
    small = pruning.prox_tree(
        {"k": kernel}, 1.0, {"k": Prox("group_l2", 1e3, group="layer", bias=False)}
    )["k"]
    x = jnp.asarray(RNG.normal(size=(1, 5, 5, 4)), jnp.float32)
    dims = ("NHWC", "HWIO", "NHWC")
    y = x + jax.lax.conv_general_dilated(x, small, (1, 1), "SAME", dimension_numbers=dims)
    np.testing.assert_array_equal(y, x)
