"""More scores from the parameters alone: distances between filters, LAMP, greedy filter norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cnnjax.errors import did_you_mean
from cnnjax.pruning.importance.parameters import _kernels
from cnnjax.pruning.importance.registry import register
from cnnjax.tree import nest

PyTree = Any


@register("fpgm")
def fpgm(params: PyTree) -> PyTree:
    """Sum of distances from each filter to all others of its layer: near the median goes first.

    He, Liu, Wang, Hu, Yang, "Filter pruning via geometric median for deep convolutional neural
    networks acceleration", CVPR 2019, arXiv 1811.00250.

    Returns:
      ``{kernel path: (o,)}`` nested.

    Raises:
      ValueError: if there is no kernel.
    """

    def one(w: Any) -> Array:
        rows = w.reshape(-1, w.shape[-1]).T

        # one filter against all: no (o, o, n) array, and no cancellation as by the Gram matrix
        def distances(row: Array) -> Array:
            return jnp.sum(jnp.sqrt(jnp.sum(jnp.square(rows - row), axis=1)))

        return jax.lax.map(distances, rows)

    return nest({p: one(w) for p, w in _kernels(params).items()})


@register("lamp")
def lamp(params: PyTree) -> PyTree:
    """``w^2 / sum of v^2 over the weights of the layer that are at least as large``.

    Lee, Park, Mo, Ahn, Shin, "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021,
    arXiv 2010.07611. Compared over all layers it chooses their densities by itself; the largest
    weight of a layer has score 1, so that no layer is emptied.

    Returns:
      ``{kernel path: array of the kernel's shape}`` nested.

    Raises:
      ValueError: if there is no kernel.
    """

    def one(w: Any) -> Array:
        square = jnp.square(w.ravel())
        order = jnp.argsort(square, stable=True)
        # summed from the largest down to each; the sorted sum loses nothing to cancellation
        rest = jnp.flip(jnp.cumsum(jnp.flip(square[order])))
        ratio = square[order] / jnp.where(rest > 0, rest, 1)
        return jnp.zeros_like(square).at[order].set(ratio).reshape(w.shape)

    return nest({p: one(w) for p, w in _kernels(params).items()})


def greedy_l1(
    params: PyTree,
    order: Sequence[str],
    ratios: float | Mapping[str, float],
    reads: Mapping[str, str] | None = None,
) -> PyTree:
    """Filter norms that leave out kernels on channels removed upstream (Li et al. 2017, greedy).

    The *independent* form is the score ``l1``.

    Args:
      params: any Flax tree.
      order: kernel paths from input to output.
      ratios: fraction of filters to remove, ``ceil(ratio * n)``: one for all or one per path (0 for
        paths that are left out).
      reads: ``{path: path of the kernel whose outputs it reads}``; by default the one before in
        ``order``. A dense layer behind a flattened (h, w, c) map is understood.

    Returns:
      ``{kernel path: (o,)}`` nested; removed filters have the lowest scores of their layers.

    Raises:
      KeyError: a path that is no kernel.
      ValueError: input channels that do not fit the layer read, or a ratio that empties a layer.
    """
    kernels = _kernels(params)
    for path in (*order, *(reads or {}), *(reads or {}).values()):
        if path not in kernels:
            raise KeyError(f"no kernel {path!r}.{did_you_mean(path, kernels)}")
    if reads is None:
        reads = dict(zip(order[1:], order))
    keep: dict[str, Array] = {}
    scores = {}
    for path in order:
        w = jnp.abs(kernels[path])
        o = w.shape[-1]
        source = reads.get(path)
        if source is not None:
            if source not in keep:
                raise ValueError(f"{path} reads {source}, which must come before it in the order")
            alive = keep[source]
            if w.shape[-2] % alive.shape[0]:
                raise ValueError(
                    f"{path} reads {w.shape[-2]} channels, {source} makes {alive.shape[0]}"
                )
            alive = jnp.tile(alive, w.shape[-2] // alive.shape[0])
            w = w * alive[:, None]
        score = jnp.sum(w, axis=tuple(range(w.ndim - 1)))
        ratio = ratios.get(path, 0.0) if isinstance(ratios, Mapping) else ratios
        gone = math.ceil(Fraction(repr(float(ratio))) * o)
        if not 0 <= gone < o:
            raise ValueError(f"a ratio of {ratio} removes {gone} of the {o} filters of {path}")
        rank = jnp.argsort(jnp.argsort(-score, stable=True), stable=True)
        keep[path] = rank < o - gone
        scores[path] = score
    return nest(scores)
