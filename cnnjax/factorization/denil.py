"""Predicting parameters: store some rows of a weight matrix, predict the others (Denil et al.)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cnnjax.factorization.matrix import matmul, working
from cnnjax.typing import AnyArray


def squared_exponential(
    a: Float[AnyArray, "n q"], b: Float[AnyArray, "m q"], scale: float | Array
) -> Float[Array, "n m"]:
    """``exp(-|p - q|^2 / (2 scale^2))`` between index coordinates (pixels, taps)."""
    squares = jnp.sum((working(a)[:, None] - working(b)[None]) ** 2, axis=-1)
    return jnp.exp(-squares / (2 * scale**2))


@functools.partial(jax.jit, static_argnames="damping")
def prediction_dictionary(
    kernel: Float[AnyArray, "n n"], rows: Int[AnyArray, "a"], damping: float = 1e-6
) -> Float[Array, "n a"]:
    """``U = k(all, rows) (k(rows, rows) + damping I)^-1``: kernel ridge prediction of all rows.

    Args:
      kernel: (n, n) similarity of the rows' indices: `squared_exponential` of coordinates, or the
        covariance of the inputs' activations for layers without a topology.
      rows: which rows are stored.
      damping: ridge; too small a value makes close rows ill-conditioned.

    Reference:
      Denil et al., "Predicting parameters in deep learning", NIPS 2013, arXiv 1306.0543.
    """
    kernel = working(kernel)
    inner = kernel[rows][:, rows] + damping * jnp.eye(rows.shape[0], dtype=kernel.dtype)
    factor = jax.scipy.linalg.cho_factor(inner)
    return jax.scipy.linalg.cho_solve(factor, kernel[:, rows].T).T


class PredictionGain(NamedTuple):
    """Whether prediction pays: ``relative_error`` of the predicted matrix (zero would give 1)."""

    relative_error: float
    smooth: bool


def smoothness_gate(
    weight: Float[AnyArray, "n o"],
    dictionary: Float[AnyArray, "n a"],
    rows: Int[AnyArray, "a"],
    *,
    limit: float = 0.9,
) -> PredictionGain:
    """Measures how well the dictionary predicts an existing matrix; white noise exceeds 1.

    Args:
      weight: (n, o).
      dictionary: (n, a).
      rows: (a,).
      limit: largest relative error that still counts as smooth.
    """
    w = working(weight)
    error = jnp.linalg.norm(w - matmul(dictionary, w[rows])) / jnp.linalg.norm(w)
    return PredictionGain(float(error), bool(error < limit))
