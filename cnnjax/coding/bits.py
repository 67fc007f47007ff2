"""Packing of variable-length codes into bytes, most significant bit first, without Python loops."""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 18  # codes at a time: the temporaries stay in the cache


def pack_codes(codes: np.ndarray, lengths: np.ndarray) -> tuple[bytes, int]:
    """Concatenates codes of up to 32 bits.

    Args:
      codes: (n,) unsigned integers; code i is below ``2**lengths[i]``.
      lengths: (n,) bits of each code, 0 to 32.

    Returns:
      the bytes (the last one padded with zero bits) and the number of bits.
    """
    total = int(lengths.sum(dtype=np.int64))
    words = np.zeros(total // 32 + 2, np.uint32)
    start = 0
    for low in range(0, len(codes), _CHUNK):
        part = lengths[low : low + _CHUNK].astype(np.int64)
        ends = start + np.cumsum(part)
        offsets = ends - part
        start = int(ends[-1])
        word = offsets >> 5
        shift = (64 - (offsets & 31) - part).astype(np.uint64)
        # a shift by 64 is undefined; it can only come with an empty code at a word's start
        shift[part == 0] = 0
        placed = codes[low : low + _CHUNK].astype(np.uint64) << shift
        first = np.flatnonzero(np.diff(word, prepend=-1))
        merged = np.bitwise_or.reduceat(placed, first)
        at = word[first]
        # words of one chunk are distinct, so plain fancy indexing does not lose updates
        words[at] |= (merged >> np.uint64(32)).astype(np.uint32)
        words[at + 1] |= (merged & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return words.astype(">u4").tobytes()[: (total + 7) // 8], total


def pack_fixed(values: np.ndarray, bits: int) -> bytes:
    """(n,) unsigned integers below ``2**bits`` at a fixed width of 0 to 32 bits."""
    if bits == 0:
        return b""
    if bits in (8, 16, 32):
        return np.ascontiguousarray(values).astype(f">u{bits // 8}").tobytes()
    return pack_codes(values, np.full(len(values), bits, np.int64))[0]


def windows(data: bytes, *, slack: int = 8) -> np.ndarray:
    """(len + slack,) uint32: the four bytes that start at each byte, zeros past the end."""
    raw = np.zeros(len(data) + slack + 4, np.uint32)
    raw[: len(data)] = np.frombuffer(data, np.uint8)
    end = len(data) + slack
    out = raw[:end] << np.uint32(24)
    out |= raw[1 : end + 1] << np.uint32(16)
    out |= raw[2 : end + 2] << np.uint32(8)
    out |= raw[3 : end + 3]
    return out


def unpack_fixed(data: bytes, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack_fixed`: (count,) uint32.

    Raises:
      ValueError: if ``data`` is not exactly the bytes of ``count`` values.
    """
    if not 0 <= bits <= 32:
        raise ValueError(f"a fixed width must be 0 to 32 bits, got {bits}")
    expected = (count * bits + 7) // 8
    if len(data) != expected:
        raise ValueError(f"{count} values of {bits} bits take {expected} bytes, got {len(data)}")
    if bits == 0:
        return np.zeros(count, np.uint32)
    if bits in (8, 16, 32):
        return np.frombuffer(data, f">u{bits // 8}").astype(np.uint32)
    out = np.empty(count, np.uint32)
    wide = windows(data)
    for low in range(0, count, _CHUNK):
        offsets = np.arange(low, min(count, low + _CHUNK), dtype=np.int64) * bits
        at, within = offsets >> 3, (offsets & 7).astype(np.uint64)
        pair = (wide[at].astype(np.uint64) << np.uint64(32)) | wide[at + 4]
        pair <<= within
        out[low : low + len(offsets)] = pair >> np.uint64(64 - bits)
    return out
