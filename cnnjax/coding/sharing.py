"""Which leaves of a network are shared or uniformly quantized, and with how many bits.

Weight sharing is stage 2 of Han et al., "Deep compression", arXiv 1510.00149.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import tree as treelib
from cnnjax.coding import kmeans, uniform
from cnnjax.coding.coded import Shared

PyTree = Any
MAX_BITS = 16


def _per_leaf(value: Any, path: str, what: str) -> Any:
    """``value``, or the entry of the first matching glob where it is a mapping."""
    if not isinstance(value, Mapping):
        return value
    for pattern, chosen in value.items():
        if treelib.glob_match(pattern, path):
            return chosen
    raise ValueError(
        f"no entry of {what} matches {path!r}; patterns: {list(value)}. Add a '**' entry as default"
    )


def code_dtype(k: int) -> Any:
    """The smallest unsigned integer type for codes 0..k."""
    return np.uint8 if k < 256 else np.uint16 if k < 65536 else np.uint32


def sharing_rate(count: int, k: int, *, value_bits: int = 32) -> float:
    """Compression by weight sharing alone, indices of the positions apart.

    ``n b / (n log2 k + k b)``: 16 weights in 4 clusters at 32 bits give 3.2.
    """
    return count * value_bits / (count * math.log2(k) + k * value_bits)


def share_tensor(
    weight: Any,
    bits: int,
    *,
    init: kmeans.Init = "linear",
    iterations: int = 1000,
    centroid_dtype: str | None = None,
    key: Any = None,
) -> Shared:
    """Clusters the non-zero entries of one tensor into ``2**bits`` centroids at most.

    Args:
      weight: finite; exact zeros stay zeros and are no part of the codebook.
      bits: 1 to 16.
      init: see `cnnjax.coding.kmeans.fit`.
      iterations: Lloyd iterations at most.
      centroid_dtype: round the centroids to this type ("float16", "bfloat16"), which halves the
        codebook in the file; None keeps float32.
      key: PRNG key of the random initialisation.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1 to {MAX_BITS}, got {bits}")
    host = np.asarray(weight)
    dtype = str(host.dtype)
    if not jnp.issubdtype(host.dtype, jnp.floating):
        raise TypeError(f"only floating-point tensors are shared, got {dtype}")
    flat = host.astype(np.float32).reshape(-1)
    kept = np.flatnonzero(flat)
    if not kept.size:
        return Shared(np.zeros(0, np.float32), np.zeros(host.shape, np.uint8), dtype)
    survivors = flat if len(kept) == len(flat) else flat[kept]
    book = kmeans.fit(survivors, 2**bits, init=init, iterations=iterations, key=key)
    small = code_dtype(len(book))
    found = kmeans.assign(survivors, book).astype(small)
    found += small(1)
    if centroid_dtype is not None:
        book = book.astype(jnp.dtype(centroid_dtype)).astype(np.float32)
    if len(kept) == len(flat):
        codes = found
    else:
        codes = np.zeros(flat.shape, small)
        codes[kept] = found
    return Shared(book, codes.reshape(host.shape), dtype)


def share(
    params: PyTree,
    bits: int | Mapping[str, int] = 5,
    *,
    mask: PyTree | None = None,
    include: treelib.Patterns = "**/kernel",
    exclude: treelib.Patterns = (),
    init: kmeans.Init = "linear",
    iterations: int = 1000,
    centroid_dtype: str | None = None,
    key: Any = None,
) -> PyTree:
    """Shares the weights of the chosen leaves, one codebook per leaf.

    Args:
      params: any Flax tree; zeros in it are pruned weights and stay zero.
      bits: codebook bits, or ``{glob: bits}`` with the first match deciding.
      mask: an optional 0/1 tree of the same structure, applied first.
      include: leaves to share; the rest (biases, normalisation) stay as they are.
      exclude: leaves not to share.
      init: "linear", "density" or "random" (needs ``key``).
      iterations: Lloyd iterations at most.
      centroid_dtype: see `share_tensor`.
      key: PRNG key, split per leaf.

    Returns:
      a coded tree: the same containers, with `Shared` nodes for the chosen leaves.

    Raises:
      ValueError: for NaN or infinity, bits out of range, a glob that matches nothing.
    """
    if mask is not None:
        treelib.check_same_structure(params, mask, what="mask")
        params = jax.tree.map(lambda w, m: jnp.where(m != 0, w, 0), params, mask)
    chosen = treelib.flatten(treelib.select(params, include, exclude))
    chosen_index = {path: index for index, path in enumerate(chosen)}

    def one(path: str, leaf: Any) -> Any:
        if not chosen[path]:
            return leaf
        try:
            return share_tensor(
                leaf,
                _per_leaf(bits, path, "bits"),
                init=init,
                iterations=iterations,
                centroid_dtype=centroid_dtype,
                key=None if key is None else jax.random.fold_in(key, chosen_index[path]),
            )
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    return treelib.map_with_path(one, params)


def quantize_tree(
    params: PyTree,
    bits: int | Mapping[str, int] = 8,
    *,
    include: treelib.Patterns = "**/kernel",
    exclude: treelib.Patterns = (),
    symmetric: bool = True,
    axis: int | None = -1,
) -> PyTree:
    """Uniformly quantizes the chosen leaves.

    Args:
      params: any Flax tree.
      bits: 2 to 16, or ``{glob: bits}`` with the first match deciding.
      include: leaves to quantize.
      exclude: leaves not to quantize.
      symmetric: see `cnnjax.coding.uniform.grid`.
      axis: channel axis of the scales (-1: output channels), or None for one scale per tensor.

    Returns:
      a coded tree whose chosen leaves are `Uniform`.
    """
    chosen = treelib.flatten(treelib.select(params, include, exclude))

    def one(path: str, leaf: Any) -> Any:
        if not chosen[path]:
            return leaf
        try:
            width = _per_leaf(bits, path, "bits")
            return uniform.quantize(leaf, width, symmetric=symmetric, axis=axis)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    return treelib.map_with_path(one, params)


def fake_quantize_tree(
    params: PyTree,
    bits: int | Mapping[str, int] = 8,
    *,
    include: treelib.Patterns = "**/kernel",
    exclude: treelib.Patterns = (),
    symmetric: bool = True,
    axis: int | None = -1,
) -> PyTree:
    """`quantize_tree` inside a loss: quantized values forward, straight-through gradients back."""
    chosen = treelib.flatten(treelib.select(params, include, exclude))

    def one(path: str, leaf: Any) -> Any:
        if not chosen[path]:
            return leaf
        width = _per_leaf(bits, path, "bits")
        return uniform.fake_quantize(leaf, width, symmetric=symmetric, axis=axis)

    return treelib.map_with_path(one, params)


def round_array(array: np.ndarray, dtype: str, *, what: str = "array") -> np.ndarray:
    """Rounds to a narrower floating type and back.

    Raises:
      ValueError: if a value overflows the narrow type.
    """
    with np.errstate(over="ignore"):
        rounded = array.astype(jnp.dtype(dtype)).astype(array.dtype)
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise ValueError(f"{what}: a value is not finite in {dtype}")
    return rounded


def round_leaves(params: PyTree, dtype: str = "float16", *, include: treelib.Patterns) -> PyTree:
    """Rounds the chosen leaves to a narrower type, keeping their own: the file stores the narrow.

    Args:
      params: any Flax tree (coded nodes are left alone).
      dtype: "float16" or "bfloat16".
      include: leaves to round, e.g. ``"**/bias"``.

    Raises:
      ValueError: if a value overflows the narrow type.
    """

    def one(path: str, leaf: Any) -> Any:
        if not treelib.match_any(include, path):
            return leaf
        return round_array(np.asarray(leaf), dtype, what=path)

    treelib.check_patterns(include, treelib.flatten(params))
    return treelib.map_with_path(one, params)
