"""Clustered low rank on planted clusters."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from cnnjax import factorization as f


def same_partition(a, b):
    """Whether two labelings are equal up to renaming."""
    pairs = {(x, y) for x, y in zip(np.asarray(a), np.asarray(b))}
    return len(pairs) == len(set(np.asarray(a))) == len(set(np.asarray(b)))


@pytest.mark.method("monochromatic_conv")
def test_planted_monochromatic_kernels():
    g = np.random.default_rng(0)
    colours = np.abs(g.normal(size=(4, 3)))
    colours /= np.linalg.norm(colours, axis=1, keepdims=True)
    labels = g.permutation(np.repeat(np.arange(4), 3))
    spatial = g.normal(size=(5, 5, 12))
    kernel = np.einsum("abo,oi->abio", spatial, colours[labels])
    for o in range(12):
        assert np.linalg.svd(kernel[..., o].reshape(25, 3), compute_uv=False)[1] < 1e-12
    found = f.monochromatic_conv(kernel, 4)
    assert same_partition(np.repeat(np.arange(4), 3), labels[found.order])
    with jax.enable_x64(True):
        x = g.normal(size=(2, 9, 9, 3))
        spec = f.ConvSpec((2, 2), "SAME", groups=4)
        chain = f.Chain((found.colour, found.spatial), (f.ConvSpec(padding="VALID"), spec))
        grouped = np.asarray(f.chain_apply(chain, x))
        expected = np.asarray(f.convolve(x, kernel, f.ConvSpec((2, 2), "SAME")))
    np.testing.assert_allclose(grouped, expected[..., found.order], atol=1e-10)


@pytest.mark.method("monochromatic_conv")
def test_one_colour_per_output_is_the_rank_one_error():
    kernel = np.random.default_rng(1).normal(size=(3, 3, 3, 6))
    found = f.monochromatic_conv(kernel, 6)
    composed = np.einsum("abo,io->abio", found.spatial[:, :, 0], found.colour[0, 0])
    error = np.sum((kernel[..., found.order] - composed) ** 2)
    tails = [
        np.sum(np.linalg.svd(kernel[..., o].reshape(9, 3), compute_uv=False)[1:] ** 2)
        for o in range(6)
    ]
    np.testing.assert_allclose(error, np.sum(tails), rtol=1e-9)
    with pytest.raises(ValueError, match="6 channels do not divide into 4"):
        f.monochromatic_conv(kernel, 4)


@pytest.mark.method("biclustered_low_rank")
def test_planted_blocks_are_low_rank_only_under_their_labels():
    g = np.random.default_rng(2)
    a, b = g.permutation(np.repeat([0, 1], 12)), g.permutation(np.repeat([0, 1, 2], 8))
    kernel = np.zeros((3, 3, 24, 24))
    for p, q in itertools.product(range(2), range(3)):
        core = g.normal(size=(3, 3, 2, 2))
        block = np.einsum("abpq,ip,oq->abio", core, g.normal(size=(12, 2)), g.normal(size=(8, 2)))
        kernel[np.ix_(range(3), range(3), a == p, b == q)] = block

    def error(parts):
        blocks = parts.blocks.reshape(-1, *parts.blocks.shape[2:])
        low = jax.vmap(lambda k: f.compose_tucker2(f.tucker2(k, 2, 2)))(blocks)
        low = parts._replace(blocks=np.asarray(low).reshape(parts.blocks.shape))
        difference = f.unbicluster(low) - kernel
        return np.linalg.norm(difference) / np.linalg.norm(kernel)

    with jax.enable_x64(True):
        assert error(f.bicluster(kernel, 2, 3, labels=(a, b))) < 1e-12
        shuffled = (g.permutation(a), g.permutation(b))
        assert error(f.bicluster(kernel, 2, 3, labels=shuffled)) > 0.5
    np.testing.assert_array_equal(f.unbicluster(f.bicluster(kernel, 3, 4)), kernel)


@pytest.mark.method("biclustered_low_rank")
def test_clusters_that_share_a_mean_filter_are_recovered():
    g = np.random.default_rng(3)
    labels = g.permutation(np.repeat(np.arange(3), 4))
    means = g.normal(size=(3, 45))
    points = means[labels] + 0.1 * g.normal(size=(12, 45))
    assert same_partition(f.balanced_kmeans(points, 3), labels)


@pytest.mark.method("biclustered_low_rank")
def test_one_cluster_is_plain_low_rank_and_bad_labels_are_refused():
    kernel = np.random.default_rng(4).normal(size=(3, 3, 4, 6))
    parts = f.bicluster(kernel, 1, 1)
    np.testing.assert_array_equal(parts.blocks[0, 0], kernel)
    with pytest.raises(ValueError, match="input labels do not form 2 equal"):
        f.bicluster(kernel, 2, 1, labels=(np.array([0, 0, 0, 1]), np.zeros(6, int)))
