"""Data-free merging of similar neurons.

Srinivas & Babu, "Data-free parameter pruning for deep neural networks", BMVC 2015, arXiv
1507.06149. Two neurons with equal incoming weights and biases give equal outputs: one goes, and its
outgoing weights are added to the other's.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cnnjax import tree
from cnnjax.errors import did_you_mean

PyTree = Any


class Merged(NamedTuple):
    """A sequence of merges.

    Attributes:
      outgoing: outgoing weights after all of them, zero rows for removed neurons.
      alive: False for removed neurons.
      pairs: (kept i, removed j) of each merge.
      saliencies: of each merge.
    """

    outgoing: Float[Array, "h o"]
    alive: Bool[Array, " h"]
    pairs: Int[Array, "k 2"]
    saliencies: Float[Array, " k"]


def saliencies(
    incoming: Float[Array, "i h"], bias: Float[Array, " h"], outgoing: Float[Array, "h o"]
) -> Float[Array, "h1 h2"]:
    """``s_ij = mean(a_j^2) ||W_i - W_j||^2``: what merging j into i costs; not symmetric.

    The bias counts as one more incoming weight. The diagonal is infinite.
    """
    return distances(incoming, bias) * jnp.mean(jnp.square(outgoing), axis=1)[None]


def distances(incoming: Float[Array, "i h"], bias: Float[Array, " h"]) -> Float[Array, "h1 h2"]:
    """``||W_i - W_j||^2`` with the bias; infinite on the diagonal."""
    rows = jnp.concatenate([incoming, bias[None]]).T

    # differences, not the Gram matrix: duplicates must come out as exactly 0
    def one(row: Array) -> Array:
        return jnp.sum(jnp.square(rows - row), axis=1)

    d = jax.lax.map(one, rows)
    return jnp.where(jnp.eye(d.shape[0], dtype=bool), jnp.inf, d)


@functools.partial(jax.jit, static_argnums=3)
def merge(
    incoming: Float[Array, "i h"],
    bias: Float[Array, " h"],
    outgoing: Float[Array, "h o"],
    count: int,
) -> Merged:
    """Merges ``count`` times the pair of least saliency.

    After each merge only column i of the saliencies changes (i's outgoing weights did).

    Args:
      incoming: kernel of the layer.
      bias: of the layer.
      outgoing: kernel of the next layer.
      count: neurons to remove, less than h.

    Raises:
      ValueError: a count that leaves no neuron.
    """
    h = bias.shape[0]
    if not 0 <= count < h:
        raise ValueError(f"count must lie in [0, {h}), got {count}: no neuron would be left")
    apart = distances(incoming, bias)

    def step(state: Any, _: Any) -> Any:
        a, alive, s = state
        flat = jnp.argmin(jnp.where(alive[:, None] & alive[None], s, jnp.inf))
        i, j = flat // h, flat % h
        value = s[i, j]
        a = a.at[i].add(a[j]).at[j].set(0)
        alive = alive.at[j].set(False)
        s = s.at[:, i].set(apart[:, i] * jnp.mean(jnp.square(a[i])))
        return (a, alive, s), (jnp.stack([i, j]).astype(jnp.int32), value)

    start = (outgoing, jnp.ones(h, bool), apart * jnp.mean(jnp.square(outgoing), axis=1)[None])
    (a, alive, _), (pairs, values) = jax.lax.scan(step, start, None, count)
    return Merged(a, alive, pairs, values)


def cutoff_count(
    incoming: Float[Array, "i h"],
    bias: Float[Array, " h"],
    outgoing: Float[Array, "h o"],
    *,
    bins: int = 50,
) -> int:
    """How many merges stay below the mode of the initial saliencies (the paper's stopping rule).

    The histogram is of each neuron's own least saliency.
    """
    first = np.asarray(jnp.min(saliencies(incoming, bias, outgoing), axis=0))
    counts, edges = np.histogram(first, bins)
    limit = edges[int(np.argmax(counts)) + 1]
    values = np.asarray(merge(incoming, bias, outgoing, bias.shape[0] - 1).saliencies)
    above = np.flatnonzero(values > limit)
    return int(above[0]) if len(above) else len(values)


def merge_neurons(
    params: PyTree, layer: str, reader: str, count: int | None = None
) -> tuple[PyTree, np.ndarray]:
    """Merges neurons of a dense layer; the result has smaller arrays.

    Right for two dense layers with the same activation in between (ReLU is 1-Lipschitz), without
    normalization or dropout.

    Args:
      params: any Flax tree of dicts.
      layer: path of the dense layer, e.g. ``"fc1"``, with ``kernel`` and ``bias``.
      reader: path of the dense layer that reads it.
      count: neurons to remove; None: by `cutoff_count`.

    Returns:
      ``(params, kept)``: a new nested dict, and the indices of the kept neurons, for
      ``Keep.of_positions``.

    Raises:
      KeyError: a path that is missing.
      ValueError: kernels that are not dense, or don't fit one another.
    """
    flat = dict(tree.flatten(params))
    names = [f"{layer}/kernel", f"{layer}/bias", f"{reader}/kernel"]
    for name in names:
        if name not in flat:
            raise KeyError(f"no leaf {name!r}.{did_you_mean(name, flat)}")
    w, b, a = (flat[n] for n in names)
    if w.ndim != 2 or a.ndim != 2 or a.shape[0] != w.shape[1]:
        raise ValueError(
            f"{names[0]} {tuple(w.shape)} and {names[2]} {tuple(a.shape)} must be dense kernels, "
            "the second reading the first one's outputs"
        )
    count = cutoff_count(w, b, a) if count is None else count
    done = merge(w, b, a, count)
    kept = np.flatnonzero(np.asarray(done.alive))
    flat[names[0]], flat[names[1]] = w[:, kept], b[kept]
    flat[names[2]] = done.outgoing[kept]
    return tree.nest(flat), kept
