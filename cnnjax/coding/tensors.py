"""One tensor of the compressed file: raw, shared or uniform, dense or with relative indices.

Integer codes are stored so that 0 means an exact zero. The writer estimates the size of each layout
(dense, or gaps along rows or columns at several widths) by entropy and writes the smallest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from cnnjax.coding import ans, huffman, relative_index, streams
from cnnjax.coding.coded import Shared
from cnnjax.coding.sparse import _bits_nonzero
from cnnjax.coding.streams import Method
from cnnjax.coding.uniform import Uniform
from cnnjax.coding.wire import FormatError, Reader, Writer

DTYPES = (
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)
RAW, SHARED, UNIFORM = 0, 1, 2
KINDS = ("raw", "shared", "uniform")
_DENSE, _ROWS, _COLUMNS = 0, 1, 2
LAYOUTS = ("dense", "rows", "columns")
GAP_BITS = (3, 4, 5, 6, 7, 8, 10)
_MAX_GAP_BITS = 16


@dataclasses.dataclass
class Parts:
    """Where one tensor's bytes went.

    Attributes:
      kind: "raw", "shared" or "uniform".
      layout: "dense", or the direction of the gaps: "rows" or "columns".
      nonzeros: stored numbers that are not filler.
      entries: nonzeros and fillers (all elements when dense).
      gap_bits: width of a gap before entropy coding; 0 when dense.
      codes: symbols of the codebook or grid.
      gaps_bytes, codes_bytes, table_bytes: coded gaps, coded values, codebook or scales.
      methods: entropy coders used, gaps first.
    """

    kind: str = "raw"
    layout: str = "dense"
    nonzeros: int = 0
    entries: int = 0
    gap_bits: int = 0
    codes: int = 0
    gaps_bytes: int = 0
    codes_bytes: int = 0
    table_bytes: int = 0
    methods: tuple[str, ...] = ()


def _little(array: np.ndarray) -> bytes:
    """The array's bytes, little-endian, in C order."""
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


def _narrowest(array: np.ndarray) -> str:
    """A 16-bit type that holds these floats exactly, or their own."""
    for name in ("float16", "bfloat16") if array.dtype in (np.float32, np.float64) else ():
        with np.errstate(over="ignore"):
            back = array.astype(jnp.dtype(name)).astype(array.dtype)
        if back.tobytes() == array.tobytes():
            return name
    return str(array.dtype)


def _write_floats(out: Writer, array: np.ndarray) -> None:
    name = _narrowest(array)
    data = _little(array.astype(jnp.dtype(name)))
    one = data[: jnp.dtype(name).itemsize]
    # equal numbers (absorbed statistics, fresh scales) are stored once
    constant = array.size > 1 and data == one * array.size
    out.varint(DTYPES.index(name) + len(DTYPES) * constant)
    out.raw(one if constant else data)


def _read_floats(reader: Reader, count: int, dtype: str) -> np.ndarray:
    constant, index = divmod(
        reader.varint(limit=2 * len(DTYPES) - 1, what="a stored dtype"), len(DTYPES)
    )
    if constant and count < 2:
        raise FormatError(f"one number for {count} equal ones")
    name = DTYPES[index]
    narrow = name in ("float16", "bfloat16") and dtype in ("float32", "float64")
    if name != dtype and not narrow:
        raise FormatError(f"{dtype} numbers stored as {name}")
    stored = jnp.dtype(name)
    data = reader.raw((1 if constant else count) * stored.itemsize)
    if name == "bool" and data and max(data) > 1:
        raise FormatError("a bool that is neither 0 nor 1")
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and overflow are refused below
        out = np.frombuffer(data, stored).astype(jnp.dtype(dtype))
        wide = out.astype(np.float64) if jnp.issubdtype(out.dtype, jnp.floating) else out
    if wide is not out and not np.isfinite(wide).all():
        raise FormatError("a stored number is not finite")
    return np.repeat(out, count) if constant else out


def _lines(array: np.ndarray, layout: int) -> np.ndarray:
    """The array flat: in C order, or with the last axis first."""
    if layout == _COLUMNS and array.ndim > 1:
        return np.ascontiguousarray(np.moveaxis(array, -1, 0)).reshape(-1)
    return array.reshape(-1)


def _unlines(flat: np.ndarray, shape: tuple[int, ...], layout: int) -> np.ndarray:
    if layout == _COLUMNS and len(shape) > 1:
        moved = flat.reshape((shape[-1], *shape[:-1]))
        return np.ascontiguousarray(np.moveaxis(moved, 0, -1))
    return flat.reshape(shape)


def _plan(
    codes: np.ndarray, alphabet: int, gap_bits: int | None, method: Method = "auto"
) -> tuple[int, int]:
    """The layout and gap width with the smallest estimate: coded symbols plus their tables."""

    def size(freqs: np.ndarray) -> float:
        if method == "fixed":
            return float(freqs.sum()) * (len(freqs) - 1).bit_length()
        if method == "huffman" and len(freqs) <= huffman.MAX_ALPHABET:
            blocks = int(freqs.sum()) // huffman.BLOCK + 1
            coded = float((huffman.lengths(freqs) * freqs).sum())
            return coded + 16 * blocks + 4 * len(freqs)
        lanes = ans.lane_count(int(freqs.sum()))
        return streams.entropy_bits(freqs) + 32 * lanes + 4 * len(freqs)

    freqs = np.bincount(codes.reshape(-1), minlength=alphabet)
    best = (size(freqs), _DENSE, 0)
    if 2 * int(freqs[1:].sum()) > codes.size:
        return _DENSE, 0
    for layout in (_ROWS, _COLUMNS) if codes.ndim > 1 else (_ROWS,):
        where = np.flatnonzero(_lines(codes, layout))
        distance = np.diff(where, prepend=-1)
        for width in GAP_BITS if gap_bits is None else (gap_bits,):
            fillers = (distance - 1) >> width
            last = distance - (fillers << width) - 1
            gaps = np.bincount(last, minlength=1 << width)
            gaps[-1] += fillers.sum()
            # a filler is one more symbol among the codes
            values = np.concatenate([[fillers.sum()], freqs[1:]])
            best = min(best, (size(gaps) + size(values), layout, width))
    return best[1], best[2]


def _write_codes(
    out: Writer, codes: np.ndarray, alphabet: int, method: Method, gap_bits: int | None
) -> None:
    layout, width = _plan(codes, alphabet, gap_bits, method)
    out.varint(layout)
    if layout == _DENSE:
        out.raw(streams.encode(codes, alphabet, method=method))
        return
    gaps, values = relative_index.encode(_lines(codes, layout), width)
    out.varint(width)
    out.raw(streams.encode(gaps - 1, 1 << width, method=method))
    out.raw(streams.encode(values, alphabet, method=method))


def _read_codes(
    reader: Reader, shape: tuple[int, ...], alphabet: int, dtype: Any, parts: Parts
) -> np.ndarray:
    size = math.prod(shape)
    layout = reader.varint(limit=_COLUMNS, what="a layout")
    parts.layout = LAYOUTS[layout]
    gaps = None
    if layout != _DENSE:
        parts.gap_bits = reader.varint(limit=_MAX_GAP_BITS, what="a gap width")
        before = reader.left
        gaps, method = streams.decode(reader, 1 << parts.gap_bits, limit=size)
        parts.gaps_bytes = before - reader.left
        parts.methods += (method,)
    before = reader.left
    values, method = streams.decode(reader, alphabet, limit=size)
    parts.codes_bytes = before - reader.left
    parts.methods += (method,)
    parts.entries = len(values)
    if len(values) != (size if gaps is None else len(gaps)):
        raise FormatError(f"{len(values)} codes for a tensor of {size}, layout {parts.layout}")
    flat = values.astype(dtype)
    if gaps is not None:
        try:
            flat = relative_index.decode(gaps.astype(np.int64) + 1, flat, size)
        except ValueError as error:
            raise FormatError(f"relative indices: {error}") from None
    parts.codes = alphabet - 1
    parts.nonzeros = int(np.count_nonzero(flat))
    return _unlines(flat, shape, layout)


def check_finite(array: np.ndarray) -> None:
    """Raises ValueError for NaN and infinity."""
    if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
        raise ValueError("holds NaN or infinity; a compressed network must be finite")


def _write_raw(out: Writer, array: np.ndarray, method: Method) -> None:
    if str(array.dtype) not in DTYPES:
        raise TypeError(f"dtype {array.dtype} cannot be stored; one of {', '.join(DTYPES)} can")
    check_finite(array)
    best = Writer()
    best.varint(0)
    flat = array.reshape(-1)
    _write_floats(best, flat)
    nonzero = flat != 0
    if 2 * np.count_nonzero(nonzero) < array.size:
        # 0: zero, 1: a number that follows, 2: the -0.0 that multiplying by a mask leaves behind
        state = nonzero.astype(np.uint8)
        state[_bits_nonzero(flat) & ~nonzero] = 2
        sparse = Writer()
        sparse.varint(1)
        _write_codes(sparse, state.reshape(array.shape), 3, method, None)
        _write_floats(sparse, flat[nonzero])
        best = min(best, sparse, key=lambda w: len(w.bytes()))
    out.raw(best.bytes())


def _read_raw(reader: Reader, shape: tuple[int, ...], dtype: str, parts: Parts) -> np.ndarray:
    if not reader.varint(limit=1, what="a sparsity flag"):
        before = reader.left
        out = _read_floats(reader, math.prod(shape), dtype).reshape(shape)
        parts.entries = out.size
    else:
        state = _read_codes(reader, shape, 3, np.uint8, parts)
        before = reader.left
        values = _read_floats(reader, int(np.count_nonzero(state == 1)), dtype)
        out = np.zeros(shape, jnp.dtype(dtype))
        out[state == 1] = values
        if (negative := state == 2).any():
            if not jnp.issubdtype(out.dtype, jnp.floating):
                raise FormatError(f"a negative zero among {dtype} numbers")
            out[negative] = -0.0
    parts.codes_bytes += before - reader.left
    parts.codes = 0
    parts.nonzeros = int(np.count_nonzero(out))
    return out


def write(node: Any, *, method: Method, gap_bits: int | None) -> tuple[int, str, bytes]:
    """A leaf of a coded tree as (kind, dtype, payload)."""
    out = Writer()
    if isinstance(node, Shared):
        book, codes = np.asarray(node.codebook, np.float32), np.asarray(node.codes)
        check_finite(book)
        if codes.size and int(codes.max()) > len(book):
            raise ValueError(f"code {int(codes.max())} of a codebook of {len(book)}")
        out.varint(len(book))
        _write_floats(out, book)
        _write_codes(out, codes, len(book) + 1, method, gap_bits)
        return SHARED, node.dtype, out.bytes()
    if isinstance(node, Uniform):
        scale = np.asarray(node.scale, np.float32).reshape(-1)
        check_finite(scale)
        out.varint(node.bits)
        out.varint(node.symmetric)
        out.varint(0 if node.axis is None else node.axis + 1)
        _write_floats(out, scale)
        codes = np.asarray(node.codes).astype(np.int64)
        if not node.symmetric:
            out.raw(streams.encode(np.asarray(node.zero_point), 1 << node.bits, method=method))
        # two's complement: code 0 stays symbol 0
        _write_codes(out, codes % (1 << node.bits), 1 << node.bits, method, gap_bits)
        return UNIFORM, node.dtype, out.bytes()
    array = np.asarray(node)
    _write_raw(out, array, method)
    return RAW, str(array.dtype), out.bytes()


def read(data: bytes, kind: int, dtype: str, shape: tuple[int, ...]) -> tuple[Any, Parts]:
    """The inverse of `write`; the caller has checked that ``shape`` may be allocated."""
    reader = Reader(data, what="tensor")
    parts = Parts(kind=KINDS[kind])
    if kind == RAW:
        node: Any = _read_raw(reader, shape, dtype, parts)
    elif kind == SHARED:
        k = reader.varint(limit=min((1 << 24) - 1, reader.left), what="a codebook's length")
        before = reader.left
        book = _read_floats(reader, k, "float32")
        parts.table_bytes = before - reader.left
        small = np.uint8 if k < 256 else np.uint16 if k < 65536 else np.uint32
        node = Shared(book, _read_codes(reader, shape, k + 1, small, parts), dtype)
    else:
        node = _read_uniform(reader, shape, dtype, parts)
    reader.end()
    return node, parts


def _read_uniform(reader: Reader, shape: tuple[int, ...], dtype: str, parts: Parts) -> Uniform:
    bits = reader.varint(limit=16, what="a code width")
    symmetric = bool(reader.varint(limit=1, what="a symmetry flag"))
    axis = reader.varint(limit=len(shape), what="a channel axis") - 1
    if bits < 2:
        raise FormatError(f"codes of {bits} bits")
    channels = 1 if axis < 0 else shape[axis]
    before = reader.left
    scale = _read_floats(reader, channels, "float32")
    parts.table_bytes = before - reader.left
    zero = np.zeros(channels, np.int32)
    if not symmetric:
        zero, _ = streams.decode(reader, 1 << bits, limit=channels)
        if len(zero) != channels:
            raise FormatError(f"{len(zero)} zero points for {channels} channels")
    codes = _read_codes(reader, shape, 1 << bits, np.int32, parts)
    if symmetric:
        codes = np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
        if codes.size and codes.min() < 1 - (1 << (bits - 1)):
            raise FormatError("a code outside the symmetric range")
    kind = ("int" if symmetric else "uint") + ("8" if bits <= 8 else "16")
    form = () if axis < 0 else (channels,)
    return Uniform(
        codes.astype(kind),
        scale.reshape(form),
        zero.astype(np.int32).reshape(form),
        bits,
        None if axis < 0 else axis,
        symmetric,
        dtype,
    )
