"""Honest counts of multiplications in convolutions: dense, skipping zero weights, or both zeros.

A multiplication counts when both factors are non-zero. Transforms of tiles and outputs are counted
apart (`transform_additions` says what they cost): their constants are shifts and additions.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.coding import winograd
from cnnjax.coding.winograd import Padding


def _tile_count(shape: tuple[int, ...], m: int, padding: Padding) -> int:
    n = shape[0]
    return n * math.prod(-(-winograd.output_size(s, padding) // m) for s in shape[1:3])


def direct(shape: tuple[int, ...], features: int, *, padding: Padding = "SAME") -> int:
    """Multiplications of the direct 3x3 convolution: ``n * ho * wo * 9 * c * o``.

    Args:
      shape: (n, h, w, c) of the input.
      features: output channels.
      padding: products with padding count, as in the usual MAC count.
    """
    ho, wo = (winograd.output_size(s, padding) for s in shape[1:3])
    return shape[0] * ho * wo * 9 * shape[3] * features


def dense(shape: tuple[int, ...], features: int, *, m: int = 2, padding: Padding = "SAME") -> int:
    """Multiplications of dense Winograd, ``tiles * (m + 2)^2 * c * o``: cropped outputs count."""
    return _tile_count(shape, m, padding) * (m + 2) ** 2 * shape[3] * features


def transform_additions(
    shape: tuple[int, ...], features: int, *, m: int = 2, padding: Padding = "SAME"
) -> int:
    """Additions of the input and output transforms, each matrix row as written (no sharing)."""
    bt, _, at = winograd.matrices(m)
    a = m + 2
    adds_in = int((np.count_nonzero(bt, axis=1) - 1).sum()) * a * 2
    adds_out = int((np.count_nonzero(at, axis=1) - 1).sum()) * (a + m)
    return _tile_count(shape, m, padding) * (adds_in * shape[3] + adds_out * features)


@jax.jit
def _active_direct(x: Any, kernel: Any) -> tuple[Any, Any]:
    return (x != 0).astype(jnp.int32), jnp.sum(kernel != 0, axis=-1)


def sparse_direct(x: Any, kernel: Any, *, padding: Padding = "SAME") -> int:
    """Multiplications of a direct 3x3 convolution that skips zero weights and zero activations.

    Args:
      x: (n, h, w, c), as the convolution gets it (after the ReLU).
      kernel: (3, 3, c, o).
      padding: zeros of the padding are skipped too.
    """
    active, weights = (np.asarray(a) for a in _active_direct(jnp.asarray(x), jnp.asarray(kernel)))
    ho, wo = (winograd.output_size(s, padding) for s in active.shape[1:3])
    edge = 1 if padding == "SAME" else 0
    active = np.pad(active, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    total = 0
    for i in range(3):
        for j in range(3):
            seen = active[:, i : i + ho, j : j + wo].sum(axis=(0, 1, 2), dtype=np.int64)
            total += int(seen @ weights[i, j].astype(np.int64))
    return total


def sparse_winograd(x: Any, weights: Any, *, padding: Padding = "SAME", relu: bool = True) -> int:
    """Multiplications of a Winograd layer: tiles x (weight non-zero and activation non-zero).

    Args:
      x: (n, h, w, c), as the layer gets it (before the ReLU).
      weights: (a, a, c, o) in the Winograd domain, zeros where pruned.
      padding: "SAME" or "VALID".
      relu: whether the ReLU acts on the tiles (Winograd-ReLU) or not (plain Winograd).
    """
    weights = np.asarray(weights)
    m = weights.shape[0] - 2
    transformed = winograd.tiles(jnp.asarray(x), m, padding)
    # the sign test is the ReLU's
    active = np.asarray(transformed > 0 if relu else transformed != 0)
    seen = active.sum(axis=(2, 3, 4), dtype=np.int64)
    return int((seen * np.count_nonzero(weights, axis=-1)).sum())
