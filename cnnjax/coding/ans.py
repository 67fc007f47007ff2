"""Asymmetric numeral systems: entropy coding within a fraction of a percent of the entropy.

Range ANS (Duda, arXiv 1311.2540) with static frequencies, 32-bit states and 16-bit words. Symbols
are dealt out to lanes that share one word stream, so encoding and decoding run over all lanes at
once; the number of lanes follows from the number of symbols.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LANE = 4096  # symbols of one lane at least
MAX_LANES = 1024
MAX_PRECISION = 16
_LOW = np.uint64(1 << 16)
_WORD = np.uint64(16)


def lane_count(count: int) -> int:
    """Lanes of a stream of ``count`` symbols; each costs 32 bits."""
    return min(-(-count // LANE), MAX_LANES)


def quantize_freqs(freqs: Any, precision: int) -> np.ndarray:
    """Frequencies that sum to ``2**precision``; every symbol that occurs keeps at least 1.

    Args:
      freqs: (alphabet,) counts.
      precision: 1 to 16 bits.

    Returns:
      (alphabet,) int64.

    Raises:
      ValueError: if nothing occurs, or more symbols occur than ``2**precision``.
    """
    freqs = np.asarray(freqs, np.int64)
    used = int(np.count_nonzero(freqs))
    total = 1 << precision
    if not 1 <= precision <= MAX_PRECISION:
        raise ValueError(f"precision must be 1 to {MAX_PRECISION} bits, got {precision}")
    if used == 0 or used > total:
        raise ValueError(f"{used} occurring symbols do not fit a precision of {precision} bits")
    out = np.floor(freqs * (total / freqs.sum())).astype(np.int64)
    out = np.where(freqs > 0, np.maximum(1, out), 0)
    if int(out.sum()) - total > int((out > 1).sum()):
        # very many rare symbols: one each, the rest in proportion
        out = np.where(freqs > 0, 1 + np.floor(freqs * ((total - used) / freqs.sum())), 0)
        out = out.astype(np.int64)
    while (short := total - int(out.sum())) != 0:
        # the change in code length per unit given or taken is about count / frequency
        gain = np.where(freqs > 0, freqs / np.maximum(out, 1), -1.0)
        if short > 0:
            picked = np.argsort(-gain, kind="stable")[: min(short, used)]
            out[picked] += 1
        else:
            gain = np.where(out > 1, gain, np.inf)
            picked = np.argsort(gain, kind="stable")[: min(-short, int((out > 1).sum()))]
            out[picked] -= 1
    return out


def cost_bits(freqs: Any, quantized: Any) -> float:
    """Bits of the whole stream under the quantized frequencies, without table and states."""
    freqs, quantized = np.asarray(freqs, np.float64), np.asarray(quantized, np.float64)
    used = freqs > 0
    return float(-(freqs[used] * np.log2(quantized[used] / quantized.sum())).sum())


def _check(quantized: np.ndarray) -> int:
    """The precision of a frequency table; raises unless it sums to a power of two in range."""
    total = int(quantized.sum()) if quantized.size else 0
    precision = total.bit_length() - 1
    if (
        quantized.ndim != 1
        or total < 2
        or total != 1 << precision
        or precision > MAX_PRECISION
        or quantized.min() < 0
    ):
        raise ValueError(f"frequencies must sum to 2**1 .. 2**{MAX_PRECISION}, got {total}")
    return precision


def encode(symbols: Any, quantized: Any) -> bytes:
    """Codes a stream of symbols; the states come first, then the words, little-endian.

    Args:
      symbols: (n,) integers whose quantized frequency is positive.
      quantized: (alphabet,) from `quantize_freqs`.

    Raises:
      ValueError: if a symbol has no frequency.
    """
    symbols = np.asarray(symbols)
    quantized = np.asarray(quantized, np.int64)
    precision = _check(quantized)
    count = len(symbols)
    if count == 0:
        return b""
    if symbols.min() < 0 or symbols.max() >= len(quantized) or not quantized[symbols].all():
        raise ValueError("a symbol lies outside the frequency table")
    lanes = lane_count(count)
    freq = quantized.astype(np.uint64)
    start = np.cumsum(freq) - freq
    bits = np.uint64(precision)
    states = np.full(lanes, _LOW, np.uint64)
    words = []
    for low in range((count - 1) // lanes * lanes, -1, -lanes):
        part = symbols[low : low + lanes]
        x = states[: len(part)]
        f = freq[part]
        full = x >= f << (np.uint64(32) - bits)
        words.append(x[full].astype(np.uint16))
        x = np.where(full, x >> _WORD, x)
        quotient, rest = np.divmod(x, f)
        states[: len(part)] = (quotient << bits) + rest + start[part]
    stream = np.concatenate(words[::-1]) if words else np.zeros(0, np.uint16)
    return states.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


def decode(data: bytes, quantized: Any, count: int) -> np.ndarray:
    """The inverse of `encode`: (count,) int32.

    Raises:
      ValueError: if the table is not one, or the data is not a stream of ``count`` symbols.
    """
    quantized = np.asarray(quantized, np.int64)
    precision = _check(quantized)
    lanes = lane_count(count)
    if count < 0 or len(data) < 4 * lanes or (len(data) - 4 * lanes) % 2:
        raise ValueError(f"{len(data)} bytes do not hold {count} symbols in {lanes} lanes")
    if count == 0:
        if data:
            raise ValueError("bytes of an empty stream")
        return np.zeros(0, np.int32)
    states = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.uint64)
    # one step reads at most one word per lane: zeros past the end keep a lying stream in bounds
    words = np.frombuffer(data[4 * lanes :], "<u2").astype(np.uint64)
    total = len(words)
    words = np.concatenate([words, np.zeros(lanes, np.uint64)])
    freq = quantized.astype(np.uint64)
    slot_symbol = np.repeat(np.arange(len(quantized), dtype=np.int32), quantized)
    start = np.cumsum(freq) - freq
    slot_freq = freq[slot_symbol]
    slot_offset = np.arange(1 << precision, dtype=np.uint64) - start[slot_symbol]
    mask, bits = np.uint64((1 << precision) - 1), np.uint64(precision)
    out = np.empty(count, np.int32)
    at = 0
    for low in range(0, count, lanes):
        width = min(lanes, count - low)
        x = states[:width]
        slot = x & mask
        out[low : low + width] = slot_symbol[slot]
        x = slot_freq[slot] * (x >> bits) + slot_offset[slot]
        thirsty = np.flatnonzero(x < _LOW)
        if len(thirsty):
            x[thirsty] = (x[thirsty] << _WORD) | words[at : at + len(thirsty)]
            at += len(thirsty)
            if at > total:
                raise ValueError("the coded stream is damaged: it ends too early")
        states[:width] = x
    if at != total or (states != _LOW).any():
        raise ValueError("the coded stream is damaged: it does not end where it should")
    return out
