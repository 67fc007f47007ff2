"""Relative index coding of sparse vectors (Han et al., "Deep compression", arXiv 1510.00149).

Each non-zero is stored with its gap to the one before, in ``bits`` bits. A gap beyond ``2**bits``
is bridged by filler entries: the largest gap with the value zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 24:
        raise ValueError(f"gap bits must be 1 to 24, got {bits}")


def encode(flat: Any, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaps and values of a flat array.

    Args:
      flat: (n,) numbers or codes; zero means absent. A negative zero is absent too, so make zeros
        positive first if their bits matter (`cnnjax.coding.drop_negative_zeros`).
      bits: width of a gap, 1 to 24.

    Returns:
      gaps (entries,) int32 in 1..2**bits, and values (entries,), zero at the fillers. The position
      before the first element counts as -1: a non-zero at position 0 has gap 1.
    """
    _check_bits(bits)
    flat = np.asarray(flat)
    if flat.ndim != 1:
        raise ValueError(f"expected a flat array, got shape {flat.shape}; use .ravel()")
    where = np.flatnonzero(flat)
    distance = np.diff(where, prepend=-1)
    fillers = (distance - 1) >> bits
    last = np.cumsum(fillers + 1) - 1
    entries = int(last[-1]) + 1 if len(last) else 0
    gaps = np.full(entries, 1 << bits, np.int32)
    values = np.zeros(entries, flat.dtype)
    gaps[last] = distance - (fillers << bits)
    values[last] = flat[where]
    return gaps, values


def decode(gaps: Any, values: Any, length: int) -> np.ndarray:
    """The flat array of ``length`` numbers (trailing zeros need the length).

    Raises:
      ValueError: if a gap is below 1 or the entries run past ``length``.
    """
    gaps, values = np.asarray(gaps), np.asarray(values)
    if gaps.shape != values.shape or gaps.ndim != 1:
        raise ValueError(f"{gaps.shape} gaps do not match {values.shape} values")
    out = np.zeros(length, values.dtype)
    if not gaps.size:
        return out
    if gaps.min() < 1:
        raise ValueError("a gap below 1")
    position = np.cumsum(gaps, dtype=np.int64) - 1
    if position[-1] >= length:
        raise ValueError(f"the gaps reach position {int(position[-1])} of {length} elements")
    out[position] = values
    return out


def expected_entries(density: float, bits: int) -> float:
    """Expected entries (fillers included) per non-zero at uniformly random positions.

    ``1 / (1 - (1-q)^(2^b))``: each entry is a filler with probability ``(1-q)^(2^b)``.
    """
    return 1.0 / (1.0 - (1.0 - density) ** (2**bits))


def expected_bits_per_weight(density: float, bits: int, value_bits: int) -> float:
    """Expected fixed-width bits per original weight: ``q * (value + gap) * expected_entries``."""
    return density * (value_bits + bits) * expected_entries(density, bits)


def best_bits(flat: Any, value_bits: int, *, candidates: range = range(1, 17)) -> int:
    """The gap width with the smallest fixed-width size on this array (ties: the narrower).

    Args:
      flat: (n,) numbers or codes; zero means absent.
      value_bits: bits of one stored value.
      candidates: the widths to try.
    """
    where = np.flatnonzero(np.asarray(flat))
    distance = np.diff(where, prepend=-1)
    sizes = {
        bits: int(((distance - 1) >> bits).sum() + len(where)) * (value_bits + bits)
        for bits in candidates
    }
    return min(sizes, key=lambda bits: (sizes[bits], bits))
