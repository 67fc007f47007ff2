"""A stream of symbols as bytes: fixed width, Huffman or ANS; with its table, self-delimiting."""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnjax.coding import ans, huffman
from cnnjax.coding import bits as bitlib
from cnnjax.coding.wire import FormatError, Reader, Writer

Method = str  # "auto" or one of METHODS
_FIXED, _HUFFMAN, _ANS = 0, 1, 2
METHODS: tuple[str, ...] = ("fixed", "huffman", "ans")
MAX_ANS_ALPHABET = 1 << ans.MAX_PRECISION


def entropy_bits(freqs: Any) -> float:
    """Zeroth-order entropy of a stream with these symbol counts, in bits in total."""
    freqs = np.asarray(freqs, np.float64)
    freqs = freqs[freqs > 0]
    return float((freqs * np.log2(freqs.sum() / freqs)).sum()) if freqs.size else 0.0


def _pack_table(table: np.ndarray) -> bytes:
    """A table of small numbers at the narrowest fixed width (one byte), then the numbers."""
    width = int(table.max()).bit_length()
    return bytes([width]) + bitlib.pack_fixed(table, width)


def _unpack_table(reader: Reader, size: int) -> np.ndarray:
    data = reader.packed(limit=4 * size + 1, what="a code table")
    if not data:
        raise FormatError("an empty code table")
    try:
        return bitlib.unpack_fixed(data[1:], data[0], size).astype(np.int64)
    except ValueError as error:
        raise FormatError(f"a code table: {error}") from None


def _fixed(symbols: np.ndarray, alphabet: int) -> bytes:
    width = max(alphabet - 1, 0).bit_length()
    return bitlib.pack_fixed(symbols, width)


def _huffman(symbols: np.ndarray, freqs: np.ndarray) -> bytes:
    code_lengths = huffman.lengths(freqs)
    data, blocks = huffman.encode(symbols, code_lengths)
    out = Writer()
    out.packed(_pack_table(code_lengths))
    # the last block's bits follow from the length of the data, but for the padding
    out.raw(blocks.astype("<u2").tobytes())
    out.block(data)
    return out.bytes()


def _ans(symbols: np.ndarray, freqs: np.ndarray) -> bytes:
    used = int(np.count_nonzero(freqs))
    least = max(1, (used - 1).bit_length())
    tried = {}
    for precision in range(least, ans.MAX_PRECISION + 1):
        table = ans.quantize_freqs(freqs, precision)
        out = Writer()
        out.packed(_pack_table(table))
        size = ans.cost_bits(freqs, table) / 8 + len(out.bytes())
        tried[precision] = (size, precision, table, out)
        if precision >= least + 3 and size > tried[precision - 1][0]:
            break
    _, _, table, out = min(tried.values(), key=lambda item: item[:2])
    out.block(ans.encode(symbols, table))
    return out.bytes()


def encode(symbols: Any, alphabet: int, *, method: Method = "auto") -> bytes:
    """Codes symbols; "auto" takes the smallest of the three (ties: the simplest).

    Args:
      symbols: (n,) integers in [0, alphabet).
      alphabet: number of possible symbols, 1 to 2**24.
      method: "fixed" width, "huffman", "ans" or "auto".

    Raises:
      ValueError: for an unknown method, a symbol outside the alphabet, or an alphabet too large
        for the named method.
    """
    if method not in ("auto", *METHODS):
        raise ValueError(f"method must be one of {('auto', *METHODS)}, got {method!r}")
    symbols = np.asarray(symbols).reshape(-1).astype(np.int64)
    if not 1 <= alphabet <= 1 << 24:
        raise ValueError(f"the alphabet must have 1 to 2**24 symbols, got {alphabet}")
    if symbols.size and (symbols.min() < 0 or symbols.max() >= alphabet):
        raise ValueError(f"a symbol lies outside the alphabet of {alphabet}")
    freqs = np.bincount(symbols, minlength=alphabet)
    candidates: list[tuple[int, bytes]] = []
    if method in ("auto", "fixed") or not symbols.size:
        candidates.append((_FIXED, _fixed(symbols, alphabet)))
    if symbols.size:
        used = int(np.count_nonzero(freqs))
        if method == "huffman" or (method == "auto" and used <= huffman.MAX_ALPHABET):
            candidates.append((_HUFFMAN, _huffman(symbols, freqs)))
        if method == "ans" or (method == "auto" and used <= MAX_ANS_ALPHABET):
            candidates.append((_ANS, _ans(symbols, freqs)))
    code, body = min(candidates, key=lambda item: (len(item[1]), item[0]))
    out = Writer()
    out.varint(code)
    out.varint(len(symbols))
    out.raw(body)
    return out.bytes()


def decode(reader: Reader, alphabet: int, *, limit: int) -> tuple[np.ndarray, str]:
    """Reads one stream.

    Args:
      reader: at the start of the stream.
      alphabet: what `encode` was given.
      limit: the largest number of symbols to accept; checked before anything is allocated.

    Returns:
      (n,) integers in [0, alphabet), and the method's name.

    Raises:
      FormatError: if the bytes are not such a stream.
    """
    code = reader.varint(limit=_ANS, what="a stream's method")
    count = reader.varint(limit=limit, what="a stream's symbol count")
    try:
        if code == _FIXED:
            width = max(alphabet - 1, 0).bit_length()
            data = reader.raw((count * width + 7) // 8)
            symbols = bitlib.unpack_fixed(data, width, count).astype(np.int32)
        elif code == _HUFFMAN:
            lengths = _unpack_table(reader, alphabet)
            blocks = np.frombuffer(reader.raw(-(-count // huffman.BLOCK) * 2), "<u2")
            symbols = huffman.decode(reader.block(what="Huffman data"), lengths, count, blocks)
        else:
            table = _unpack_table(reader, alphabet)
            symbols = ans.decode(reader.block(what="ANS data"), table, count)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(str(error)) from None
    if symbols.size and int(symbols.max()) >= alphabet:
        raise FormatError(f"a symbol lies outside the alphabet of {alphabet}")
    return symbols, METHODS[code]
