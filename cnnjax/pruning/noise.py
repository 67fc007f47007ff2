"""Dropout: by coin flips, and with counts drawn where the activations are large.

Hinton et al., arXiv 1207.0580; Srivastava et al., "Dropout", JMLR 15, 2014; Li, Gong, Yang,
"Improved dropout for shallow and deep learning", NIPS 2016, arXiv 1602.02220.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cnnjax import tree
from cnnjax.errors import did_you_mean
from cnnjax.pruning import granularity as grain

PyTree = Any


def dropout(
    key: jax.Array, x: Float[Array, ...], keep: float | int, *, train: bool = True
) -> Float[Array, ...]:
    """Inverted dropout: ``x m / q`` with ``m ~ Bernoulli(q)``; the identity in evaluation.

    Args:
      key: PRNG key, another for each layer.
      x: activations.
      keep: q, the probability of *keeping*, in (0, 1].
      train: mode.

    Raises:
      ValueError: q outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the probability of keeping a unit, in (0, 1], got {keep}")
    if not train or keep == 1:
        return x
    alive = jax.random.bernoulli(key, keep, x.shape)
    return jnp.where(alive, x / keep, jnp.zeros_like(x))


def retrain_rate(rate: float, connections_before: int, connections_after: int) -> float:
    """Dropout rate after pruning, ``D_o sqrt(C_ir / C_io)`` (Han et al. 2015).

    Raises:
      ValueError: counts that are not ``0 < after <= before``.
    """
    if not 0 < connections_after <= connections_before:
        raise ValueError(
            f"need 0 < after <= before, got {connections_after} and {connections_before}"
        )
    return rate * math.sqrt(connections_after / connections_before)


def max_norm(params: PyTree, limit: float | int, include: tree.Patterns = "**") -> PyTree:
    """Scales each filter's incoming weights to a norm of at most ``limit`` (dropout's companion).

    Args:
      params: any Flax tree.
      limit: c, about 3 to 4.
      include: globs of kernels.

    Raises:
      ValueError: a limit that is not positive, or a glob without a match.
    """
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    tree.check_patterns(include, tree.flatten(params))

    def one(path: str, w: Any) -> Any:
        if w.ndim < 2 or not tree.match_any(include, path):
            return w
        norm = grain.reduce(w, "filter", "l2")
        return w * jnp.minimum(1, limit / jnp.maximum(norm, jnp.finfo(w.dtype).tiny))

    return tree.map_with_path(one, params)


def evolutional_probabilities(h: Float[Array, "n ... d"]) -> Float[Array, " d"]:
    """``p_i = sqrt(E[h_i^2]) / sum_j sqrt(E[h_j^2])`` over the batch (and positions).

    The p that minimizes the risk bound's ``sum_i E[h_i^2] / p_i``. Units that are zero in the whole
    batch get a small share, so that nothing is divided by zero.
    """
    root = jnp.sqrt(jnp.mean(jnp.square(h), axis=tuple(range(h.ndim - 1))))
    total = jnp.sum(root)
    # a thousandth of the mean share; uniform where everything is zero
    floor = jnp.where(total > 0, 1e-3 * total / root.size, 1.0)
    root = jnp.maximum(root, floor)
    return root / jnp.sum(root)


def multinomial_dropout(
    key: jax.Array, h: Float[Array, "n ... d"], p: Float[Array, " d"], k: int
) -> Float[Array, "n ... d"]:
    """``h_i m_i / (k p_i)`` with ``m ~ Multinomial(k, p)``, drawn anew for each example.

    Unbiased, with ``E[e_i^2] = 1/(k p_i) + (k-1)/k`` and ``E[e_i e_j] = (k-1)/k``. A channel of a
    feature map is one unit: its positions share the draw.

    Args:
      key: PRNG key.
      h: activations, units on the last axis.
      p: probabilities, positive, of sum 1; no gradient goes through them.
      k: number of draws, at least 1; ``d / 2`` matches dropout of one half.

    Raises:
      ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k, the number of draws, must be at least 1, got {k}")
    n, d = h.shape[0], h.shape[-1]
    p = jax.lax.stop_gradient(p)
    # k sorted uniforms fall into the bins of the cumulated p
    u = jax.random.uniform(key, (n, k), p.dtype)
    bins = jnp.searchsorted(jnp.cumsum(p), u.ravel() * jnp.sum(p), side="right").reshape(n, k)
    counts = jax.vmap(lambda b: jnp.zeros(d, h.dtype).at[jnp.minimum(b, d - 1)].add(1))(bins)
    scale = counts / (k * p)
    return h * scale.reshape(n, *(1,) * (h.ndim - 2), d)


def evolutional_dropout(
    key: jax.Array, h: Float[Array, "n ... d"], k: int | None = None, *, train: bool = True
) -> Float[Array, "n ... d"]:
    """Multinomial dropout with the probabilities of this very batch; the identity in evaluation.

    Args:
      key: PRNG key, another for each layer and step.
      h: the layer's outputs, units on the last axis.
      k: number of draws; None: half the units.
      train: mode.
    """
    if not train:
        return h
    k = max(1, h.shape[-1] // 2) if k is None else k
    return multinomial_dropout(key, h, evolutional_probabilities(jax.lax.stop_gradient(h)), k)


class EvolutionalDropout(nnx.Dropout):
    """`nnx.Dropout` that draws by `evolutional_dropout`, ``(1 - rate) d`` times from d units."""

    def __call__(
        self, inputs: Any, *, deterministic: bool | None = None, rngs: Any = None
    ) -> Any:  # fmt: skip
        """(N, ..., d) -> the same shape; the identity where deterministic."""
        off = self.deterministic if deterministic is None else deterministic
        if off or self.rate == 0:
            return inputs
        source = self.rngs if rngs is None else rngs
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        key: Any = source() if callable(source) else source
        k = max(1, round((1 - self.rate) * inputs.shape[-1]))
        return evolutional_dropout(key, inputs, k)


def with_dropout(model: nnx.Module, kind: str) -> Any:
    """The same network with every `nnx.Dropout` of one kind; paths and arrays stay.

    Args:
      model: NNX module; untouched.
      kind: ``"evolutional"`` or ``"plain"``.

    Raises:
      ValueError: another kind; a network without dropout.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown dropout {kind!r}.{did_you_mean(kind, KINDS)}")
    model = nnx.clone(model)
    found = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Dropout)]
    if not any(m.rate > 0 for m in found):
        raise ValueError("the network has no dropout with a rate above 0: set its field, if any")
    for module in found:
        module.__class__ = KINDS[kind]  # the same attributes, so nothing else changes
    return model


KINDS: dict[str, Any] = {"plain": nnx.Dropout, "evolutional": EvolutionalDropout}
