"""Lasso, ThiNet and least squares against optimality conditions and exhaustive search."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import pruning
from cnnjax.graph import trace
from cnnjax.pruning import reconstruction as rec

RNG = np.random.default_rng(11)


def moments_of(x, y, pieces=3):
    m = rec.Moments.zeros(x.shape[1], y.shape[1], jnp.asarray(x).dtype)
    add = jax.jit(rec.Moments.add)
    for a, b in zip(np.split(x, pieces), np.split(y, pieces)):
        m = add(m, jnp.asarray(a), jnp.asarray(b))
    return m


@pytest.mark.method("lasso_channel_pruning")
@pytest.mark.method("thinet")
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (2, 1))])
def test_patches_are_the_lowered_convolution(padding):
    x, w = RNG.normal(size=(2, 9, 8, 3)), RNG.normal(size=(3, 2, 3, 4))
    strides, dilation = (2, 1), (1, 2)
    with jax.enable_x64(True):
        rows = rec.patches(
            jnp.asarray(x), (3, 2), strides=strides, padding=padding, dilation=dilation
        )
        want = jax.lax.conv_general_dilated(
            jnp.asarray(x),
            jnp.asarray(w),
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    np.testing.assert_allclose(np.asarray(rows) @ w.reshape(-1, 4), want.reshape(-1, 4), atol=1e-12)


@pytest.mark.method("lasso_channel_pruning")
def test_streamed_moments_keep_what_float32_would_lose():
    x = RNG.normal(size=(60, 4)).astype(np.float32)
    y = RNG.normal(size=(60, 2)).astype(np.float32)
    m = moments_of(x, y)
    gram, cross, target = m.means()
    np.testing.assert_allclose(gram, x.T @ x / 60, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cross, x.T @ y / 60, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(target, (y**2).sum() / 60, rtol=1e-5)
    assert int(m.count) == 60
    # a large total and many small parts: compensated sums lose nothing

    @jax.jit
    def many(m):
        one = jnp.full((1, 1), 0.01, jnp.float32)
        return jax.lax.scan(lambda m, _: (m.add(one, one), None), m, None, 20_000)[0]

    start = rec.Moments.zeros(1, 1).add(jnp.full((1, 1), 4096.0), jnp.zeros((1, 1)))
    total = many(start).gram
    exact = 4096.0**2 + 20_000 * float(np.float32(0.01)) ** 2
    plain = float(total[0][0, 0])
    got = plain + float(total[1][0, 0])
    assert abs(got - exact) < 1e-3
    assert abs(plain - exact) > 0.5 or plain == np.float32(exact)


def channels_setup(n=60, c=6, k=4, o=5, orthogonal=False, seed=0):
    """Patches, kernel, and the contribution of each channel to the output."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, k * c))
    if orthogonal:
        x, _ = np.linalg.qr(x)
        x = x * np.sqrt(n)
    w = rng.normal(size=(k * c, o)) * np.repeat([np.linspace(0.3, 2, c)], k, 0).ravel()[:, None]
    ids = np.tile(np.arange(c), k)
    z = np.stack([x[:, ids == i] @ w[ids == i] for i in range(c)])
    return x, w, ids, z


@pytest.mark.method("lasso_channel_pruning")
@pytest.mark.method("thinet")
def test_interactions_and_both_forms_of_the_objective():
    x, w, ids, z = channels_setup()
    y = z.sum(0)
    with jax.enable_x64(True):
        m = moments_of(x, y)
        q, v = rec.interaction(m, jnp.asarray(w), ids, 6)
        some, left = rec.interaction(m, jnp.asarray(w), np.where(ids == 5, -1, ids), 5)
    want = np.einsum("ino,jno->ij", z, z) / len(x)
    np.testing.assert_allclose(q, want, atol=1e-12)
    np.testing.assert_allclose(v, np.einsum("ino,no->i", z, y) / len(x), atol=1e-12)
    # rows that always stay are taken from the target
    np.testing.assert_allclose(some, want[:5, :5], atol=1e-12)
    np.testing.assert_allclose(left, np.einsum("ino,no->i", z[:5], y - z[5]) / len(x), atol=1e-12)
    kept, gone = [0, 2, 3], [1, 4, 5]
    first = ((y - z[kept].sum(0)) ** 2).sum() / len(x)
    second = (z[gone].sum(0) ** 2).sum() / len(x)
    np.testing.assert_allclose(first, second, rtol=1e-12)
    np.testing.assert_allclose(want[np.ix_(gone, gone)].sum(), second, rtol=1e-12)


@pytest.mark.method("lasso_channel_pruning")
def test_lasso_meets_its_optimality_conditions():
    x, w, ids, z = channels_setup(seed=1)
    q = np.einsum("ino,jno->ij", z, z) / len(x)
    v = q.sum(1)
    with jax.enable_x64(True):
        for strength in (0.1 * v.max(), 0.5 * v.max()):
            b = np.asarray(rec.lasso(jnp.asarray(q), jnp.asarray(v), strength, sweeps=2000))
            g = q @ b - v
            on = b != 0
            np.testing.assert_allclose(g[on], -strength * np.sign(b[on]), atol=1e-9 * v.max())
            assert (np.abs(g[~on]) <= strength * (1 + 1e-9)).all()
        exact = rec.lasso(jnp.asarray(q), jnp.asarray(v), 0.0, sweeps=20_000)
        none = rec.lasso(jnp.asarray(q), jnp.asarray(v), float(np.abs(v).max()))
        everything = rec.lasso_select(jnp.asarray(q), jnp.asarray(v), 6)
    np.testing.assert_allclose(exact, np.ones(6), atol=1e-6)  # reproduces Y
    np.testing.assert_array_equal(none, np.zeros(6))
    np.testing.assert_allclose(everything, np.ones(6), atol=1e-5)
    with pytest.raises(ValueError, match=r"keep must lie in \[1, 6\], got 7"):
        rec.lasso_select(jnp.asarray(q), jnp.asarray(v), 7)


@pytest.mark.method("lasso_channel_pruning")
@pytest.mark.method("thinet")
@pytest.mark.parametrize("keep", [2, 4])
def test_orthogonal_channels_are_chosen_as_by_exhaustive_search(keep):
    x, w, ids, z = channels_setup(c=6, orthogonal=True, seed=2)
    y = z.sum(0)
    best = min(
        itertools.combinations(range(6), keep), key=lambda s: ((y - z[list(s)].sum(0)) ** 2).sum()
    )
    q = np.einsum("ino,jno->ij", z, z) / len(x)
    with jax.enable_x64(True):
        order = np.asarray(rec.thinet_order(jnp.asarray(q)))
        # unscaled channels compete by size: ||Z_i||^2 against the threshold
        beta = np.asarray(rec.lasso_select(jnp.asarray(q), jnp.asarray(q.sum(1)), keep))
    assert set(order[6 - keep :]) == set(best)
    assert set(np.flatnonzero(beta)) == set(best)


@pytest.mark.method("lasso_channel_pruning")
def test_duplicated_channel_is_dropped_and_its_twin_takes_over():
    x, w, ids, z = channels_setup(c=4, seed=3)
    x[:, ids == 3] = x[:, ids == 1]
    y = x @ w
    with jax.enable_x64(True):
        m = moments_of(x, y)
        # three channels and the twin's pair: 12 independent columns reproduce Y
        q, v = rec.interaction(m, jnp.asarray(w), ids, 4)
        beta = np.asarray(rec.lasso_select(q, v, 3))
        keep = (ids != 3) if beta[3] == 0 else (ids != 1)
        new = rec.least_squares(m, keep, ridge=1e-9)
        left = float(rec.error(m, new))
        both = rec.least_squares(m, ridge=1e-6)  # a singular system: twins share
    assert (beta != 0).sum() <= 3
    assert left < 1e-9 * (y**2).sum() / len(x)
    np.testing.assert_allclose(x @ np.asarray(both), y, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(new)[~keep], 0)


@pytest.mark.method("lasso_channel_pruning")
@pytest.mark.method("thinet")
def test_least_squares_equals_numpy_never_hurts_and_asks_for_enough_samples():
    x, w, ids, z = channels_setup(n=90, seed=4)
    y = x @ w
    keep = np.isin(ids, [1, 4, 5])
    m = moments_of(x.astype(np.float32), y.astype(np.float32))
    new = np.asarray(rec.least_squares(m, keep))
    want = np.linalg.lstsq(x[:, keep], y, rcond=None)[0]
    np.testing.assert_allclose(new[keep], want, atol=2e-4)
    before = ((y - x[:, keep] @ w[keep]) ** 2).sum() / len(x)
    after = ((y - x @ new) ** 2).sum() / len(x)
    assert after <= before
    np.testing.assert_allclose(rec.error(m, jnp.asarray(new)), after, rtol=1e-3)
    # ThiNet's factors: least squares with one unknown per channel
    q = np.einsum("ino,jno->ij", z, z) / len(x)
    kept = np.asarray([0, 1, 0, 0, 1, 1], bool)
    with jax.enable_x64(True):
        scale = np.asarray(rec.channel_scale(jnp.asarray(q), kept, ridge=1e-12))
    columns = z[kept].reshape(3, -1).T
    factors = np.linalg.lstsq(columns, z.sum(0).ravel(), rcond=None)[0]
    np.testing.assert_allclose(scale[kept], factors, rtol=1e-8)
    np.testing.assert_array_equal(scale[~kept], 0)
    error = lambda s: ((z.sum(0) - np.tensordot(s, z, 1)) ** 2).sum()  # noqa: E731
    assert error(scale) <= error(kept.astype(float))
    few = moments_of(x[:9].astype(np.float32), y[:9].astype(np.float32))
    with pytest.raises(ValueError, match="12 unknowns.*got 9; add 3 or more"):
        rec.least_squares(few, keep)


class Net(nnx.Module):
    """A residual block and a concatenation, so that channels are shared and shifted."""

    def __init__(self, rngs: nnx.Rngs):
        self.a = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.b = nnx.Conv(8, 6, (3, 3), rngs=rngs)
        self.c = nnx.Conv(6, 8, (1, 1), use_bias=False, rngs=rngs)
        self.d = nnx.Conv(14, 4, (3, 3), strides=2, rngs=rngs)
        self.fc = nnx.Linear(4 * 9, 3, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.a(x))
        h = jax.nn.relu(self.b(x))
        x = x + self.c(h)
        x = jax.nn.relu(self.d(jnp.concatenate([x, h], axis=-1)))
        return self.fc(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def whole():
    model = Net(nnx.Rngs(0))
    model.eval()
    batches = [jnp.asarray(RNG.normal(size=(24, 6, 6, 2)), jnp.float32) for _ in range(2)]
    return model, trace(model, batches[0][:1]), batches


@pytest.mark.method("lasso_channel_pruning")
@pytest.mark.method("thinet")
@pytest.mark.parametrize("method", ["lasso", "thinet"])
def test_whole_model_is_pruned_and_least_squares_brings_it_back(whole, method):
    model, graph, batches = whole
    scores = pruning.next_layer_scores(model, graph, batches, method=method, include=["c", "d"])
    assert set(scores) == {"a/kernel", "b/kernel", "c/kernel"}  # c is tied to a by the sum
    keep = pruning.select_channels(graph, {"b/kernel": scores["b/kernel"]}, ratio=0.5)
    small = pruning.shrink(model, graph, keep)
    assert small.b.kernel.shape[-1] == 3
    better = pruning.reconstruct(model, small, graph, keep, batches)
    x = jnp.concatenate(batches)
    want = np.asarray(model(x))
    before = ((np.asarray(small(x)) - want) ** 2).mean()
    after = ((np.asarray(better(x)) - want) ** 2).mean()
    assert after < 0.6 * before
    np.testing.assert_array_equal(better.b.kernel[...], small.b.kernel[...])  # lost no inputs
    assert not np.array_equal(better.d.kernel[...], small.d.kernel[...])
    # c first: its kernel is numpy's least squares on what it reads
    h = jax.nn.relu(small.b(jax.nn.relu(small.a(x))))
    target = model.c(jax.nn.relu(model.b(jax.nn.relu(model.a(x)))))
    fit = np.linalg.lstsq(
        np.asarray(h).reshape(-1, 3), np.asarray(target).reshape(-1, 8), rcond=None
    )[0]
    np.testing.assert_allclose(better.c.kernel[...][0, 0], fit, atol=1e-3)


@pytest.mark.method("lasso_channel_pruning")
def test_bad_input_of_the_whole_model_functions(whole):
    model, graph, batches = whole
    with pytest.raises(ValueError, match="'laso'.*Did you mean 'lasso'"):
        pruning.next_layer_scores(model, graph, batches, method="laso")
    with pytest.raises(ValueError, match="fraction of channels to remove"):
        pruning.next_layer_scores(model, graph, batches, ratio=1.0)
    with pytest.raises(ValueError, match="'q' matches nothing"):
        pruning.next_layer_scores(model, graph, batches, include="q")
    with pytest.raises(ValueError, match="nothing to refit"):
        pruning.reconstruct(model, model, graph, graph.alive(), batches)
    one = {"include": graph.layers[-1].path}
    with pytest.raises(ValueError, match=r"a batch of shapes \[\(0, .* holds nothing"):
        pruning.next_layer_scores(model, graph, [batches[0][:0]], **one)
    with pytest.raises(ValueError, match="reads or computes is not finite"):
        pruning.next_layer_scores(model, graph, [batches[0] * jnp.nan], **one)
