"""What a network costs: parameters, non-zeros, bytes, multiply-accumulates.

MACs follow `cnnjax.graph.profile`: one example; ``Ho * Wo * kh * kw * C * O / groups`` for a
convolution, padding counted like data. *Effective* MACs leave out the products with a weight that
is zero: what a sparse kernel could skip and a dense one does not.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax import graph, tree

PyTree = Any


def effective_macs(profile: graph.Profile, params: PyTree) -> int:
    """MACs with a non-zero weight, for one example, rounded down.

    Args:
      profile: of the network.
      params: its parameters (host or device arrays); a layer's density is that of the leaves of
        rank 2 or more that its module owns.
    """
    size: dict[str, int] = {}
    kept: dict[str, int] = {}
    for path, leaf in tree.flatten(params).items():
        if np.ndim(leaf) >= 2:
            module = path.rpartition("/")[0]
            size[module] = size.get(module, 0) + np.size(leaf)
            kept[module] = kept.get(module, 0) + int(np.count_nonzero(np.asarray(leaf)))
    total = 0
    for layer in profile.layers:
        if layer.kind != "matmul":  # a product of two activations is not counted, as in `macs`
            full = size.get(layer.path, 0)
            total += layer.macs * kept[layer.path] // full if full else layer.macs
    return total


def sparse_bytes(params: PyTree) -> int:
    """Bytes when each kernel is stored dense or as CSR, whichever is smaller.

    A kernel is the matrix ``(h * w * c, o)`` by rows; CSR takes its values in their own dtype, a
    16- or 32-bit column index per value (by ``o``) and a 32-bit pointer per row and one.
    """
    total = 0
    for leaf in jax.tree.leaves(params):
        leaf = np.asarray(leaf)
        stored = leaf.nbytes
        if leaf.ndim >= 2:
            columns = leaf.shape[-1]
            index = 2 if columns <= 1 << 16 else 4
            rows = leaf.size // columns
            csr = int(np.count_nonzero(leaf)) * (leaf.itemsize + index) + 4 * (rows + 1)
            stored = min(stored, csr)
        total += stored
    return total


def measure(model: Any, example: Any) -> dict[str, Any]:
    """Counts of a network.

    Args:
      model: NNX module with arrays.
      example: one image as a batch of one, array or `jax.ShapeDtypeStruct`.

    Returns:
      ``params``, ``nonzeros``, ``bytes`` (dense, in the parameters' dtypes), ``sparse_bytes``,
      ``macs``, ``effective_macs``, ``activation_peak`` (bytes), ``compression`` (params /
      nonzeros).
    """
    profile = graph.profile(model, example)
    params = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    nonzeros = tree.nonzeros(params)
    return {
        "params": profile.params,
        "nonzeros": nonzeros,
        "bytes": profile.param_bytes,
        "sparse_bytes": sparse_bytes(params),
        "macs": profile.macs,
        "effective_macs": effective_macs(profile, params),
        "activation_peak": profile.activation_peak,
        "compression": profile.params / max(nonzeros, 1),
    }
