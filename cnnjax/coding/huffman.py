"""Canonical Huffman coding: optimal prefix code lengths, vectorised encoding, decoding by a table.

The code is stored as one length per symbol. The stream is cut into blocks of `BLOCK` symbols whose
bit lengths are stored as well, so that decoding runs over all blocks at once.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from cnnjax.coding import bits as bitlib

BLOCK = 2048  # symbols; BLOCK * MAX_LENGTH fits in 16 bits
MAX_LENGTH = 16  # bits of the longest code; a decoding table has 2**MAX_LENGTH entries at most
MAX_ALPHABET = 1 << MAX_LENGTH


def _unlimited(freqs: np.ndarray) -> np.ndarray:
    """Huffman code lengths of positive frequencies, ties broken by creation order."""
    count = len(freqs)
    order = np.argsort(freqs, kind="stable")
    heap = [(int(freqs[i]), rank, int(i)) for rank, i in enumerate(order)]
    parent = np.zeros(2 * count - 1, np.int64)
    for node in range(count, 2 * count - 1):
        a = heapq.heappop(heap)
        b = heapq.heappop(heap)
        parent[a[2]] = parent[b[2]] = node
        heapq.heappush(heap, (a[0] + b[0], node, node))
    depth = np.zeros(2 * count - 1, np.int64)
    for node in range(2 * count - 3, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[:count]


def _limited(freqs: np.ndarray, limit: int) -> np.ndarray:
    """Optimal lengths of at most ``limit`` bits, by package-merge (Larmore and Hirschberg)."""
    count = len(freqs)
    order = np.argsort(freqs, kind="stable")
    leaves = freqs[order].astype(np.int64)
    levels = []  # per level: which of the sorted items are packages
    packages = np.zeros(0, np.int64)
    for _ in range(limit):
        merged = np.concatenate([leaves, packages])
        by = np.argsort(merged, kind="stable")
        levels.append(by >= count)
        merged = merged[by]
        usable = len(merged) // 2 * 2
        packages = merged[0:usable:2] + merged[1:usable:2]
    lengths = np.zeros(count, np.int64)
    take = 2 * count - 2
    for is_package in reversed(levels):
        chosen = is_package[:take]
        pairs = int(chosen.sum())
        lengths[: take - pairs] += 1
        take = 2 * pairs
    out = np.empty(count, np.int64)
    out[order] = lengths
    return out


def lengths(freqs: Any, *, max_length: int | None = MAX_LENGTH) -> np.ndarray:
    """Optimal prefix code lengths.

    Args:
      freqs: (alphabet,) counts; symbols that do not occur get no code (length 0).
      max_length: no code is longer (optimal under this limit); None for no limit.

    Returns:
      (alphabet,) uint8 lengths. A single occurring symbol gets one bit.

    Raises:
      ValueError: for negative counts or an alphabet that does not fit the limit.
    """
    freqs = np.asarray(freqs)
    if freqs.ndim != 1 or (freqs.size and freqs.min() < 0):
        raise ValueError(f"expected a vector of counts >= 0, got shape {freqs.shape}")
    used = np.flatnonzero(freqs)
    out = np.zeros(len(freqs), np.uint8)
    if len(used) <= 1:
        out[used] = 1
        return out
    if max_length is not None and len(used) > 1 << max_length:
        raise ValueError(
            f"{len(used)} symbols do not fit codes of {max_length} bits; use fewer symbols"
        )
    found = _unlimited(freqs[used])
    if max_length is not None and found.max() > max_length:
        found = _limited(freqs[used], max_length)
    out[used] = found
    return out


def kraft(code_lengths: Any) -> float:
    """``sum 2^-length`` over the coded symbols: 1 for a complete code of two or more symbols."""
    code_lengths = np.asarray(code_lengths, np.int64)
    return float(np.sum(0.5 ** code_lengths[code_lengths > 0]))


def canonical(code_lengths: Any) -> np.ndarray:
    """(alphabet,) uint32 canonical codes: ordered by length, then by symbol."""
    code_lengths = np.asarray(code_lengths, np.int64)
    order = np.argsort(code_lengths, kind="stable")
    order = order[code_lengths[order] > 0]
    codes = np.zeros(len(code_lengths), np.uint32)
    if not len(order):
        return codes
    sorted_lengths = code_lengths[order]
    if sorted_lengths[-1] > 32:
        raise ValueError(f"a code of {int(sorted_lengths[-1])} bits; 32 is the longest supported")
    # left-justified in 64 bits, each code is the one before plus the room that it took
    step = np.uint64(1) << (63 - sorted_lengths).astype(np.uint64)
    left = np.cumsum(step, dtype=np.uint64) - step
    codes[order] = (left >> (63 - sorted_lengths).astype(np.uint64)).astype(np.uint32)
    return codes


def check_lengths(code_lengths: np.ndarray) -> None:
    """Raises unless the lengths are those of a complete prefix code (or of one symbol)."""
    used = code_lengths[code_lengths > 0].astype(np.int64)
    if len(used) == 1 and used[0] == 1:
        return
    if len(used) and used.max() > MAX_LENGTH:
        raise ValueError(f"a code of {int(used.max())} bits; the longest allowed is {MAX_LENGTH}")
    room = int((np.int64(1) << (MAX_LENGTH - used)).sum())
    if len(used) < 2 or room != 1 << MAX_LENGTH:
        raise ValueError("the code lengths are not those of a complete prefix code")


def encode(symbols: Any, code_lengths: Any) -> tuple[bytes, np.ndarray]:
    """Codes a stream of symbols.

    Args:
      symbols: (n,) integers that all have a code.
      code_lengths: (alphabet,) from `lengths`.

    Returns:
      the bytes, and (ceil(n / BLOCK),) uint16 bits of each block.

    Raises:
      ValueError: if a symbol has no code.
    """
    symbols = np.asarray(symbols)
    code_lengths = np.asarray(code_lengths, np.int64)
    if not symbols.size:
        return b"", np.zeros(0, np.uint16)
    if symbols.min() < 0 or symbols.max() >= len(code_lengths):
        raise ValueError(f"a symbol lies outside the alphabet of {len(code_lengths)}")
    each = code_lengths[symbols]
    if not each.all():
        bad = int(symbols[np.flatnonzero(each == 0)[0]])
        raise ValueError(f"symbol {bad} has no code")
    data, _ = bitlib.pack_codes(canonical(code_lengths)[symbols], each)
    return data, np.add.reduceat(each, np.arange(0, len(each), BLOCK)).astype(np.uint16)


def _table(code_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """For every window of ``width`` bits: the symbol that it starts with, and its length."""
    width = int(code_lengths.max())
    order = np.argsort(code_lengths, kind="stable")
    order = order[code_lengths[order] > 0]
    repeat = np.int64(1) << (width - code_lengths[order])
    pad = (1 << width) - int(repeat.sum())  # not zero for a single symbol only
    symbol = np.concatenate([np.repeat(order, repeat), np.full(pad, -1)]).astype(np.int32)
    length = np.concatenate([np.repeat(code_lengths[order], repeat), np.zeros(pad, np.int64)])
    return symbol, length, width


def decode(data: bytes, code_lengths: Any, count: int, block_bits: Any) -> np.ndarray:
    """The inverse of `encode`.

    Args:
      data: the coded bytes.
      code_lengths: (alphabet,) lengths.
      count: number of symbols.
      block_bits: (ceil(count / BLOCK),) bits of each block.

    Returns:
      (count,) int32.

    Raises:
      ValueError: if the lengths are not a code, or the data is not a stream of ``count`` symbols.
    """
    code_lengths = np.asarray(code_lengths, np.int64)
    block_bits = np.asarray(block_bits, np.int64)
    blocks = -(-count // BLOCK)
    if count < 0 or block_bits.shape != (blocks,):
        raise ValueError(f"{count} symbols come in {blocks} blocks, got {block_bits.shape}")
    if count == 0:
        if data:
            raise ValueError("bytes of an empty stream")
        return np.zeros(0, np.int32)
    check_lengths(code_lengths)
    ends = np.cumsum(block_bits)
    if len(data) != (int(ends[-1]) + 7) // 8 or count > ends[-1]:
        raise ValueError(f"{len(data)} bytes do not hold blocks of {int(ends[-1])} bits")
    symbol, length, width = _table(code_lengths)
    wide = bitlib.windows(data)
    position = ends - block_bits
    out = np.empty((BLOCK, blocks), np.int32)  # a step's symbols are contiguous
    tail = count - (blocks - 1) * BLOCK
    end_bits = len(data) * 8
    for step in range(BLOCK if blocks > 1 else tail):
        if step == tail:  # the last block is done
            finished = position[-1]
            position = position[:-1]
        window = (wide[position >> 3] << (position & 7).astype(np.uint32)) >> (32 - width)
        out[step, : len(position)] = symbol[window]
        position = position + length[window]
        # a lying stream may not run away: positions stay in the data, the final check rejects
        np.minimum(position, end_bits, out=position)
    if blocks > 1 and tail < BLOCK:
        position = np.append(position, finished)
    if not np.array_equal(position, ends):
        raise ValueError("the coded stream is damaged: a block does not end where it should")
    flat = out.T.reshape(-1)[:count]
    if flat.min() < 0:
        raise ValueError("the coded stream is damaged: a window that no code starts")
    return flat
