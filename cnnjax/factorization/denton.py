"""Clustered low rank: monochromatic first layers and bi-clustered kernels (Denton et al.)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.optimize
from jaxtyping import Float, Int

from cnnjax.typing import AnyArray


def balanced_kmeans(
    points: Float[AnyArray, "n d"], clusters: int, *, seed: int = 0, rounds: int = 30
) -> Int[np.ndarray, "n"]:
    """k-means with equal cluster sizes: each round is an optimal assignment.

    Runs on the host: the assignment problem is combinatorial and small (n channels).

    Args:
      points: (n, d); ``clusters`` must divide n.
      clusters: how many.
      seed: of the k-means++ start; the best of 5 starts is returned.
      rounds: at most.

    Returns:
      (n,) labels.
    """
    x = np.asarray(points, np.float64)
    n = len(x)
    if clusters < 1 or n % clusters:
        raise ValueError(f"{n} channels do not divide into {clusters} equal clusters")
    size = n // clusters
    rng = np.random.default_rng(seed)
    best_cost, best = np.inf, np.zeros(n, int)
    for _ in range(5):
        centres = x[_spread_start(x, clusters, rng)]
        labels = None
        for _ in range(rounds):
            distance = ((x[:, None] - centres[None]) ** 2).sum(-1)
            slots = np.repeat(distance, size, axis=1)
            rows, columns = scipy.optimize.linear_sum_assignment(slots)
            new = np.empty(n, int)
            new[rows] = columns // size
            if labels is not None and (new == labels).all():
                break
            labels = new
            centres = np.stack([x[labels == c].mean(0) for c in range(clusters)])
        assert labels is not None
        cost = float(((x - centres[labels]) ** 2).sum())
        if cost < best_cost:
            best_cost, best = cost, labels
    return best


def _spread_start(x: np.ndarray, clusters: int, rng: np.random.Generator) -> list[int]:
    chosen = [int(rng.integers(len(x)))]
    while len(chosen) < clusters:
        nearest = ((x[:, None] - x[chosen][None]) ** 2).sum(-1).min(1)
        total = nearest.sum()
        share = nearest / total if total > 0 else np.full(len(x), 1 / len(x))
        chosen.append(int(rng.choice(len(x), p=share)))
    return chosen


class Monochromatic(NamedTuple):
    """A first layer as a colour transform and a grouped spatial convolution."""

    colour: np.ndarray  # (1, 1, i, c)
    spatial: np.ndarray  # (kh, kw, 1, o), group-major: feature_group_count = c
    order: np.ndarray  # (o,): the grouped output j is the original output order[j]


def monochromatic_conv(
    kernel: Float[AnyArray, "kh kw i o"], colours: int, *, seed: int = 0
) -> Monochromatic:
    """Approximates each output's kernel by one spatial filter of one colour, colours shared.

    Per output the leading singular pair of its (kh*kw, i) matrix; the colour vectors (largest
    entry positive) are clustered into equal clusters and replaced by their centroids; the spatial
    part is refitted by least squares.

    Args:
      kernel: (kh, kw, i, o).
      colours: clusters; must divide o.
      seed: of the clustering.

    Reference:
      Denton et al., "Exploiting linear structure within convolutional networks for efficient
      evaluation", NIPS 2014, arXiv 1404.0736, section 3.1.
    """
    k = np.asarray(kernel, np.float64)
    kh, kw, i, o = k.shape
    matrices = k.reshape(kh * kw, i, o).transpose(2, 0, 1)
    _, _, vt = np.linalg.svd(matrices, full_matrices=False)
    colour = vt[:, 0]
    largest = np.take_along_axis(colour, np.abs(colour).argmax(1)[:, None], 1)
    colour = colour * np.sign(largest)
    labels = balanced_kmeans(colour, colours, seed=seed)
    centroids = np.stack([colour[labels == c].mean(0) for c in range(colours)])
    order = np.argsort(labels, kind="stable")
    chosen = centroids[labels]
    fitted = np.einsum("osi,oi->os", matrices, chosen) / (chosen**2).sum(1, keepdims=True)
    spatial = fitted[order].T.reshape(kh, kw, 1, o)
    return Monochromatic(centroids.T[None, None], spatial, order)


class Biclustered(NamedTuple):
    """Permutations and labels under which the kernel falls into blocks."""

    order_in: np.ndarray  # (i,)
    order_out: np.ndarray  # (o,)
    blocks: np.ndarray  # (g, h, kh, kw, i/g, o/h)


def bicluster(
    kernel: Float[AnyArray, "kh kw i o"],
    in_clusters: int,
    out_clusters: int,
    *,
    seed: int = 0,
    labels: tuple[Int[AnyArray, "i"], Int[AnyArray, "o"]] | None = None,
) -> Biclustered:
    """Splits a kernel into G x H blocks of similar input and output channels.

    Each block is then factorized on its own (two SVDs = Tucker-2, or a sum of rank-one terms):
    vmap `tucker2` over ``blocks``. ``labels`` replaces the clustering.

    Reference:
      Denton et al., NIPS 2014, arXiv 1404.0736, section 3.2.
    """
    k = np.asarray(kernel, np.float64)
    kh, kw, i, o = k.shape
    if labels is None:
        inputs = np.moveaxis(k, 2, 0).reshape(i, -1)
        outputs = np.moveaxis(k, 3, 0).reshape(o, -1)
        a = balanced_kmeans(inputs, in_clusters, seed=seed)
        b = balanced_kmeans(outputs, out_clusters, seed=seed)
    else:
        a, b = (np.asarray(x) for x in labels)
        for name, found, clusters in (("input", a, in_clusters), ("output", b, out_clusters)):
            if len(set(np.bincount(found, minlength=clusters))) != 1:
                raise ValueError(f"the {name} labels do not form {clusters} equal clusters")
    order_in, order_out = np.argsort(a, kind="stable"), np.argsort(b, kind="stable")
    sorted_kernel = k[:, :, order_in][:, :, :, order_out]
    blocks = sorted_kernel.reshape(
        kh, kw, in_clusters, i // in_clusters, out_clusters, o // out_clusters
    )
    return Biclustered(order_in, order_out, blocks.transpose(2, 4, 0, 1, 3, 5))


def unbicluster(parts: Biclustered) -> Float[np.ndarray, "kh kw i o"]:
    """The kernel in its original channel order; the inverse of `bicluster`."""
    g, h, kh, kw, ig, oh = parts.blocks.shape
    kernel = parts.blocks.transpose(2, 3, 0, 4, 1, 5).reshape(kh, kw, g * ig, h * oh)
    return kernel[:, :, np.argsort(parts.order_in)][:, :, :, np.argsort(parts.order_out)]
