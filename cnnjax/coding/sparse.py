"""Compressed sparse rows and columns (CSR, CSC): exact storage, products on the device, bytes.

A matrix of shape (m, n) with ``a`` stored elements takes ``2a + m + 1`` numbers by rows and
``2a + n + 1`` by columns. Convolution kernels (h, w, c, o) are lowered to (h*w*c, o) first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jsparse

Order = str  # "row" or "column"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compressed:
    """A matrix in CSR (``order="row"``) or CSC (``order="column"``) form; a pytree.

    Attributes:
      values: (a,) stored elements, in the matrix's dtype.
      index: (a,) the column (CSR) or row (CSC) of each element, int32.
      ptr: (rows + 1,) or (columns + 1,) where each row (column) starts, int32; ends at a.
      shape: shape of the matrix (rows, columns).
      order: "row" or "column".
    """

    values: Any
    index: Any
    ptr: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    order: Order = dataclasses.field(default="row", metadata={"static": True})

    @property
    def nse(self) -> int:
        """Number of stored elements."""
        return int(self.values.shape[0])

    @property
    def numbers(self) -> int:
        """Count of stored numbers: 2a + n + 1."""
        return 2 * self.nse + int(self.ptr.shape[0])


def lower(kernel: Any) -> np.ndarray:
    """A kernel as a matrix (product of all axes but the last, last axis); vectors become a row."""
    kernel = np.asarray(kernel)
    if kernel.ndim == 0:
        raise ValueError("a scalar has no matrix form; expected an array with at least one axis")
    return kernel.reshape((math.prod(kernel.shape[:-1]), kernel.shape[-1]))


def _bits_nonzero(flat: np.ndarray) -> np.ndarray:
    """True where the stored bits are not all zero, so that -0.0 counts as an element."""
    if flat.dtype.kind in "f" and flat.itemsize in (2, 4, 8):
        return np.asarray(flat.view(f"u{flat.itemsize}") != 0)
    raw = np.frombuffer(np.ascontiguousarray(flat).tobytes(), np.uint8)
    return np.asarray(raw.reshape((*flat.shape, flat.itemsize)).any(axis=-1))


def encode(matrix: Any, *, order: Order = "row") -> Compressed:
    """Stores a matrix as CSR or CSC, bit for bit.

    An element is stored when its bits are not all zero: -0.0 and NaN are stored, so the round trip
    is exact; use `drop_negative_zeros` first where the sign of zero does not matter.

    Args:
      matrix: (rows, columns); kernels of other ranks are lowered by `lower`.
      order: "row" for CSR, "column" for CSC.

    Returns:
      host (numpy) arrays; ``jax.device_put`` moves the whole structure.

    Raises:
      ValueError: for an unknown order, or where int32 pointers would overflow.
    """
    if order not in ("row", "column"):
        raise ValueError(f"order must be 'row' (CSR) or 'column' (CSC), got {order!r}")
    dense = np.ascontiguousarray(lower(matrix))
    shape = (int(dense.shape[0]), int(dense.shape[1]))
    if dense.size >= 2**31:
        raise ValueError(
            f"a matrix of shape {shape} overflows int32 indices; split it by rows or columns"
        )
    by = dense if order == "row" else np.ascontiguousarray(dense.T)
    stored = _bits_nonzero(by)
    major, minor = np.nonzero(stored)
    ptr = np.zeros(by.shape[0] + 1, np.int32)
    np.cumsum(np.bincount(major, minlength=by.shape[0]), out=ptr[1:])
    return Compressed(by[major, minor], minor.astype(np.int32), ptr, shape, order)


def drop_negative_zeros(array: Any) -> np.ndarray:
    """The array with -0.0 replaced by 0.0 (equal in value, not in bits)."""
    array = np.array(array)
    array[array == 0] = 0
    return array


def decode(stored: Compressed) -> np.ndarray:
    """The dense matrix, bit for bit.

    Raises:
      ValueError: if the pointers or indices are not those of a matrix of this shape.
    """
    values, index, ptr = (np.asarray(a) for a in (stored.values, stored.index, stored.ptr))
    majors, minors = stored.shape if stored.order == "row" else stored.shape[::-1]
    counts = np.diff(ptr)
    if (
        ptr.shape != (majors + 1,)
        or ptr[0] != 0
        or (counts < 0).any()
        or ptr[-1] != values.shape[0]
        or index.shape != values.shape
    ):
        raise ValueError(
            f"broken {stored.order} pointers: expected {majors + 1} monotone numbers from 0 to "
            f"{values.shape[0]}"
        )
    if index.size and (index.min() < 0 or index.max() >= minors):
        raise ValueError(f"an index lies outside [0, {minors})")
    out = np.zeros((majors, minors), values.dtype)
    out[np.repeat(np.arange(majors), counts), index] = values
    return out if stored.order == "row" else np.ascontiguousarray(out.T)


def matmul(stored: Compressed, other: Any) -> jax.Array:
    """``matrix @ other`` on the device, without making the matrix dense.

    Args:
      stored: a (m, n) matrix.
      other: (n,) or (n, p).

    Returns:
      (m,) or (m, p).
    """
    other = jnp.asarray(other)
    if other.ndim not in (1, 2) or other.shape[0] != stored.shape[1]:
        raise ValueError(
            f"cannot multiply a matrix of shape {stored.shape} with an array of shape "
            f"{other.shape}; expected ({stored.shape[1]},) or ({stored.shape[1]}, p)"
        )
    values, index, ptr = (jnp.asarray(a) for a in (stored.values, stored.index, stored.ptr))
    if stored.nse == 0:
        shape = (stored.shape[0], *other.shape[1:])
        return jnp.zeros(shape, jnp.result_type(values.dtype, other.dtype))
    if stored.order == "row":
        return jsparse.CSR((values, index, ptr), shape=stored.shape) @ other
    # a CSC matrix is the transpose of a CSR one; as coordinates the product needs no conversion
    columns = jnp.searchsorted(ptr, jnp.arange(stored.nse, dtype=ptr.dtype), side="right") - 1
    coo = jsparse.COO((values, index, columns.astype(index.dtype)), shape=stored.shape)
    return coo @ other


def matvec(stored: Compressed, vector: Any) -> jax.Array:
    """``matrix @ vector`` on the device; ``vector`` is (n,), the result (m,)."""
    if np.ndim(vector) != 1:
        raise ValueError(f"matvec takes a vector, got shape {np.shape(vector)}; use matmul")
    return matmul(stored, vector)


def nbytes(
    shape: tuple[int, int],
    nse: int,
    *,
    order: Order = "row",
    value_bits: int = 32,
    index_bits: int = 32,
    ptr_bits: int = 32,
) -> int:
    """Bytes of CSR or CSC storage: ``a*(value + index) + (n + 1)*ptr`` bits, rounded up."""
    majors = shape[0] if order == "row" else shape[1]
    return -(-(nse * (value_bits + index_bits) + (majors + 1) * ptr_bits) // 8)


def break_even_density(
    shape: tuple[int, int], *, value_bits: int = 32, index_bits: int = 32, ptr_bits: int = 32
) -> float:
    """The density below which CSR takes fewer bits than dense storage (about 0.5 at 32/32)."""
    m, n = shape
    return max(0.0, (m * n * value_bits - (m + 1) * ptr_bits) / (m * n * (value_bits + index_bits)))
