"""Coded trees: parameter trees some of whose leaves are codes with what expands them.

A *coded tree* is a parameter tree (any Flax tree) in which some leaves are `Shared` or `Uniform`
nodes. It is a pytree of arrays. `expand` gives the parameters back; `codebooks` and
`with_codebooks` split off the part that is trained, so that ordinary gradients through `expand` are
the summed gradients ``dL/dC_k = sum over codes == k of dL/dW``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import tree as treelib
from cnnjax.coding.uniform import Uniform
from cnnjax.typing import AnyArray

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """One tensor of shared weights.

    Attributes:
      codebook: (k,) centroids, ascending at first (fine-tuning may reorder them).
      codes: the tensor's shape; 0 is an exact zero (pruned), i is centroid i - 1.
      dtype: of the tensor.
    """

    codebook: Any
    codes: Any
    dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.codes.shape)

    def expand(self) -> AnyArray:
        """The tensor, by table look-up; of numpy arrays a numpy array (nothing is compiled)."""
        if isinstance(self.codebook, np.ndarray) and isinstance(self.codes, np.ndarray):
            table = np.concatenate([np.zeros(1, self.codebook.dtype), self.codebook])
            return table[self.codes].astype(jnp.dtype(self.dtype))
        book = jnp.asarray(self.codebook)
        table = jnp.concatenate([jnp.zeros(1, book.dtype), book])
        return table[jnp.asarray(self.codes, jnp.int32)].astype(self.dtype)


def is_coded(node: Any) -> bool:
    """Whether a node of a coded tree is a coded tensor."""
    return isinstance(node, (Shared, Uniform))


def nest_like(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """Nested plain dicts of ``{path: leaf}``; keys that are all numbers are ints, as in NNX."""

    def keys(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        numbers = all(k.isascii() and k.isdigit() and str(int(k)) == k for k in node)
        return {int(k) if numbers else k: keys(v) for k, v in node.items()}

    return keys(treelib.nest(flat))


def expand(coded: PyTree) -> PyTree:
    """The parameters of a coded tree: coded nodes become arrays, arrays stay."""
    return jax.tree.map(lambda n: n.expand() if is_coded(n) else n, coded, is_leaf=is_coded)


def codebooks(coded: PyTree) -> PyTree:
    """What is trained: codebooks in place of `Shared` nodes, arrays as they are.

    The structure is the coded tree's, so optax, masks and checkpoints treat it as parameters.
    `Uniform` nodes have nothing to train here (train them with `fake_quantize` before coding).
    """
    return jax.tree.map(
        lambda n: n.codebook if isinstance(n, Shared) else None if is_coded(n) else n,
        coded,
        is_leaf=is_coded,
    )


def with_codebooks(coded: PyTree, books: PyTree) -> PyTree:
    """The coded tree with the codebooks and arrays of ``books`` (from `codebooks`, trained)."""
    flat, treedef = jax.tree.flatten(coded, is_leaf=is_coded)
    new = jax.tree.leaves(books, is_leaf=lambda leaf: leaf is None)
    if len(new) != len(flat):
        raise ValueError(f"{len(new)} codebooks for a coded tree of {len(flat)} tensors")
    merged = [
        dataclasses.replace(n, codebook=b) if isinstance(n, Shared) else n if is_coded(n) else b
        for n, b in zip(flat, new)
    ]
    return jax.tree.unflatten(treedef, merged)


def centroid_grad(grads: PyTree, coded: PyTree) -> PyTree:
    """Gradients of the codebooks from gradients of the expanded parameters (summed per code).

    Args:
      grads: a tree like ``expand(coded)``.
      coded: the coded tree.

    Returns:
      a tree like ``codebooks(coded)``.
    """

    def one(node: Any, grad: Any) -> Any:
        if not isinstance(node, Shared):
            return None if is_coded(node) else grad
        sums = jax.ops.segment_sum(
            jnp.ravel(grad), jnp.ravel(jnp.asarray(node.codes, jnp.int32)), len(node.codebook) + 1
        )
        return sums[1:]

    return jax.tree.map(one, coded, grads, is_leaf=is_coded)
