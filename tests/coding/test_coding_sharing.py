"""Weight sharing (oracles: dynamic programming, scikit-learn, finite differences)."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import coding
from cnnjax.coding import kmeans

pytestmark = pytest.mark.method("kmeans_weight_sharing")


def optimal_inertia(values, k):
    """The exact 1-D optimum by dynamic programming over sorted prefixes, O(k n^2)."""
    x = np.sort(np.asarray(values, np.float64))
    n = len(x)
    s, q = np.r_[0, np.cumsum(x)], np.r_[0, np.cumsum(x**2)]
    i, j = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
    size = np.maximum(j - i, 1)
    cost = np.where(j > i, q[j] - q[i] - (s[j] - s[i]) ** 2 / size, 0.0)
    best = cost[0]
    for _ in range(k - 1):
        best = np.min(np.where(j >= i, best[:, None] + cost, np.inf), axis=0)
    return best[n]


def weights(n=2000, seed=0):
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


@pytest.mark.parametrize("init", ["linear", "density", "random"])
def test_the_objective_never_increases(init):
    x = weights()
    points = np.sort(x)
    ones = np.ones(len(x), np.int32)
    start = kmeans.initial(points, ones, 16, init, jax.random.key(0))
    trace = [kmeans.inertia(x, start)]
    centroids = jnp.asarray(start)
    for _ in range(15):
        centroids, _ = kmeans.lloyd(jnp.asarray(points), jnp.asarray(ones), centroids, iterations=1)
        trace.append(kmeans.inertia(x, centroids))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(trace))
    assert trace[-1] < trace[0]


def test_lloyd_equals_the_textbook_loop():
    x = weights(500, 3)
    centroids = np.linspace(x.min(), x.max(), 8)
    for _ in range(7):
        nearest = np.argmin(np.abs(x[:, None] - centroids[None]), axis=1)
        centroids = np.array(
            [x[nearest == i].mean() if (nearest == i).any() else c for i, c in enumerate(centroids)]
        )
    found = kmeans.fit(x, 8, iterations=7, tolerance=0.0, empty="keep")
    np.testing.assert_allclose(found, centroids, atol=1e-5)


@pytest.mark.parametrize("k", [2, 5, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_close_to_the_exact_optimum(k, seed):
    x = weights(200, seed)
    best = optimal_inertia(x, k)
    found = {init: kmeans.inertia(x, kmeans.fit(x, k, init=init)) for init in ("linear", "density")}
    assert min(found.values()) >= best * (1 - 1e-6)
    assert min(found.values()) <= best * 1.25
    assert max(found.values()) <= best * 1.6


def test_equals_scikit_learn_from_the_same_start():
    cluster = pytest.importorskip("sklearn.cluster")
    x = weights(3000, 5)
    start = np.linspace(x.min(), x.max(), 12)[:, None]
    peer = cluster.KMeans(12, init=start, n_init=1, max_iter=500, tol=0).fit(x[:, None])
    ours = kmeans.inertia(x, kmeans.fit(x, 12, tolerance=0.0))
    assert ours == pytest.approx(peer.inertia_, rel=1e-2)


def test_binned_equals_exact_within_a_thousandth():
    x = np.r_[weights(50_000), [9.0, -8.0]].astype(np.float32)
    # without splitting: a split may take another of several equal choices
    exact = kmeans.inertia(x, kmeans.fit(x, 32, empty="keep"))
    binned = kmeans.inertia(x, kmeans.fit(x, 32, bins=1 << 15, empty="keep"))
    assert binned == pytest.approx(exact, rel=1e-3)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_few_distinct_values_are_lossless(distinct, repeats, seed):
    rng = np.random.default_rng(seed)
    values = np.tile(rng.normal(size=distinct).astype(np.float32), repeats)
    bits = max(1, (distinct - 1).bit_length())
    shared = coding.share_tensor(values, bits)
    assert np.asarray(shared.expand()).tobytes() == values.tobytes()


def test_zeros_stay_zero_and_out_of_the_codebook():
    w = weights(4000).reshape(40, 100) * (np.random.default_rng(1).random((40, 100)) < 0.2)
    shared = coding.share_tensor(w, 4)
    out = np.asarray(shared.expand())
    np.testing.assert_array_equal(out == 0, w == 0)
    assert len(shared.codebook) == 16
    assert not (np.asarray(shared.codebook) == 0).any()
    assert shared.codes.dtype == np.uint8
    # each survivor has the nearest centroid
    nearest = np.abs(w[w != 0][:, None] - np.asarray(shared.codebook)[None]).min(axis=1)
    np.testing.assert_allclose(np.abs(w - out)[w != 0], nearest, atol=1e-6)


def test_outliers_keep_their_precision_beside_a_large_bulk():
    x = np.r_[np.full(300_000, 1e-3), np.full(300_000, -1e-3), [0.5, 0.52, 0.9, -0.7]]
    x = (x + np.r_[np.random.default_rng(0).normal(size=600_000) * 1e-4, np.zeros(4)]).astype("f4")
    centroids = kmeans.fit(x, 8, empty="keep")
    # the centroid at 0.67 stays where it started: its cluster is empty
    np.testing.assert_allclose(sorted(centroids)[-3:], [0.51, 0.6714286, 0.9], atol=1e-6)
    assert centroids[0] == pytest.approx(-0.7, abs=1e-6)


def test_empty_clusters_split_the_widest():
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(size=990) * 0.01, rng.normal(size=10) * 5].astype("f4")
    kept = kmeans.fit(x, 16, empty="keep")
    split = kmeans.fit(x, 16)
    assert len(np.unique(kmeans.assign(x, kept))) < 16
    assert len(np.unique(kmeans.assign(x, split))) == 16
    assert kmeans.inertia(x, split) < 0.5 * kmeans.inertia(x, kept)
    with pytest.raises(ValueError, match="empty"):
        kmeans.fit(x, 4, empty="drop")


def tree():
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": rng.normal(size=(3, 3, 2, 4)).astype("f4"), "bias": np.ones(4, "f4")},
        "blocks": {0: {"kernel": rng.normal(size=(6, 5)).astype("f4")}},
    }


def test_share_chooses_leaves_and_bits_by_glob():
    params = tree()
    coded = coding.share(params, {"conv/*": 3, "**": 2})
    assert len(coded["conv"]["kernel"].codebook) == 8
    assert len(coded["blocks"][0]["kernel"].codebook) == 4
    assert coded["conv"]["bias"] is params["conv"]["bias"]
    assert jax.tree.structure(coding.expand(coded)) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="no entry of bits"):
        coding.share(params, {"conv/*": 3})
    with pytest.raises(ValueError, match="matches nothing"):
        coding.share(params, 3, include="dense/**")
    masked = coding.share(params, 3, mask=jax.tree.map(np.zeros_like, params))
    assert not np.asarray(coding.expand(masked)["conv"]["kernel"]).any()


def test_nnx_state_keeps_its_structure():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    coded = coding.share(state, 4, include="kernel")
    assert jax.tree.structure(coding.expand(coded)) == jax.tree.structure(state)
    nnx.update(model, coding.expand(coded))
    assert len(np.unique(np.asarray(model.kernel[...]))) <= 16


def test_centroid_gradients_are_sums_and_match_finite_differences():
    params = tree()
    coded = coding.share(params, 2)
    x = np.random.default_rng(1).normal(size=(7, 6)).astype("f4")

    def loss(p):
        return jnp.sum(jnp.tanh(x @ p["blocks"][0]["kernel"]) ** 2) + jnp.sum(
            p["conv"]["bias"] ** 3
        )

    books = coding.codebooks(coded)

    def of_books(books):
        return loss(coding.expand(coding.with_codebooks(coded, books)))

    through = jax.grad(of_books)(books)
    summed = coding.centroid_grad(jax.grad(loss)(coding.expand(coded)), coded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), through, summed
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), books)
        book = wide["blocks"][0]["kernel"]
        codes = np.asarray(coded["blocks"][0]["kernel"].codes)
        for i in range(len(book)):
            values = []
            for step in (1e-5, -1e-5):
                moved = book.copy()
                moved[i] += step
                table = np.r_[0.0, moved]
                values.append(np.sum(np.tanh(x.astype(np.float64) @ table[codes]) ** 2))
            slope = (values[0] - values[1]) / 2e-5
            assert through["blocks"][0]["kernel"][i] == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(value):
    params = {"a": {"kernel": np.array([[1.0, value]], np.float32)}}
    with pytest.raises(ValueError, match="a/kernel.*NaN or infinity"):
        coding.share(params, 4)
    with pytest.raises(ValueError, match="a/kernel.*NaN or infinity"):
        coding.quantize_tree(params)


def test_the_papers_rate_and_the_file_that_reaches_it():
    assert coding.sharing_rate(16, 4) == pytest.approx(3.2)
    # a large dense tensor in fixed-width codes: the rate within the header's bytes
    w = np.random.default_rng(0).normal(size=(200, 100)).astype("f4")
    k = 16
    blob = coding.pack({"w": coding.share_tensor(w, 4)}, method="fixed")
    assert len(blob) - w.nbytes / coding.sharing_rate(w.size, k) < w.size * (5 - 4) / 8 + 120


def test_bad_arguments():
    with pytest.raises(ValueError, match="bits"):
        coding.share_tensor(np.ones(3, "f4"), 0)
    with pytest.raises(TypeError, match="floating"):
        coding.share_tensor(np.ones(3, int), 4)
    with pytest.raises(ValueError, match="key"):
        kmeans.fit(weights(), 4, init="random")
    with pytest.raises(ValueError, match="init"):
        kmeans.fit(weights(), 4, init="quantile")
    with pytest.raises(ValueError, match="no values"):
        kmeans.fit(np.zeros(0), 4)
    empty = coding.share_tensor(np.zeros((3, 2), np.float32), 4)
    assert empty.codebook.shape == (0,)
    np.testing.assert_array_equal(empty.expand(), np.zeros((3, 2)))


# ---------------------------------------------------------------- uniform quantization


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, -1, 0])
@pytest.mark.parametrize("bits", [2, 8, 12])
def test_uniform_equals_a_numpy_transcription(symmetric, axis, bits):
    w = np.random.default_rng(0).normal(size=(5, 7)).astype("f4") + 0.3
    q = coding.quantize(w, bits, symmetric=symmetric, axis=axis)
    out = np.asarray(q.expand())
    columns = {None: [slice(None)], -1: [(slice(None), i) for i in range(7)]}
    for cell in columns.get(axis, [(i, slice(None)) for i in range(5)]):
        part = w[cell].astype(np.float64)
        if symmetric:
            top = 2 ** (bits - 1) - 1
            scale = np.abs(part).max() / top
            expected = np.clip(np.round(part / scale), -top, top) * scale
        else:
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = (high - low) / (2**bits - 1)
            zero = np.round(-low / scale)
            expected = (np.clip(np.round(part / scale) + zero, 0, 2**bits - 1) - zero) * scale
        np.testing.assert_allclose(out[cell], expected, atol=scale * 1e-3)
        assert np.abs(out[cell] - part).max() <= scale * (0.51 if symmetric else 1.01)


@pytest.mark.parametrize("symmetric", [True, False])
def test_uniform_keeps_zeros_and_all_zero_channels(symmetric):
    w = np.zeros((6, 3), np.float32)
    w[1, 0], w[3, 0], w[2, 1] = 0.7, -0.2, 5.0
    out = np.asarray(coding.quantize(w, 8, symmetric=symmetric, axis=-1).expand())
    np.testing.assert_array_equal(out == 0, w == 0)


def test_straight_through_training():
    w = np.random.default_rng(0).normal(size=(4, 3)).astype("f4")
    fake = coding.fake_quantize(jnp.asarray(w), 4, axis=-1)
    np.testing.assert_array_equal(fake, coding.quantize(w, 4, axis=-1).expand())
    target = np.random.default_rng(1).normal(size=(4, 3)).astype("f4")
    grad = jax.grad(lambda w: jnp.sum(coding.fake_quantize(w, 4, axis=-1) * target))(w)
    np.testing.assert_array_equal(grad, target)
    params = tree()
    coarse = coding.fake_quantize_tree(params, {"conv/**": 3, "**": 8})
    assert len(np.unique(np.asarray(coarse["conv"]["kernel"])[..., 0])) <= 7
    np.testing.assert_array_equal(coarse["conv"]["bias"], params["conv"]["bias"])
    # plain gradient descent through the quantizer reaches a quantized fit
    x = np.random.default_rng(2).normal(size=(64, 4)).astype("f4")
    y = x @ target

    @jax.jit
    def step(w):
        return w - 0.05 * jax.grad(
            lambda w: jnp.mean((x @ coding.fake_quantize(w, 6, axis=-1) - y) ** 2)
        )(w)

    for _ in range(200):
        w = step(w)
    assert float(jnp.mean((x @ coding.quantize(w, 6, axis=-1).expand() - y) ** 2)) < 0.02


def test_uniform_refuses_nonsense():
    with pytest.raises(ValueError, match="bits"):
        coding.quantize(np.ones(3, "f4"), 1)
    with pytest.raises(ValueError, match="axis"):
        coding.quantize(np.ones(3, "f4"), 8, axis=1)
    with pytest.raises(TypeError, match="floating"):
        coding.quantize(np.ones(3, np.int32))
    with pytest.raises(ValueError, match="not finite"):
        coding.round_leaves({"a": np.array([1e6], "f4")}, include="a")
    rounded = coding.round_leaves(
        {"a": np.array([0.1], "f4"), "b": np.array([0.1], "f4")}, include="a"
    )
    assert rounded["a"][0] == np.float32(np.float16(0.1))
    assert rounded["b"][0] == np.float32(0.1)
