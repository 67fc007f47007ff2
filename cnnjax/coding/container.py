"""The compressed file: a header with version and checksums, a table of tensors, their payloads.

Layout (integers are varints unless noted)::

    magic (8 bytes) | version | table crc32 (4) | table (deflated) | payloads | sha256 (32)
    table:  metadata (JSON block) | number of tensors | per tensor:
            path (block) | kind | dtype | rank | dims | payload length | payload crc32 (4)

Reading trusts nothing: the digest is compared first, and since anyone can compute a digest, every
length is checked against what is there and against ``max_bytes`` before memory is taken. All
failures are `FormatError`. No code is stored or run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import files
from cnnjax import tree as treelib
from cnnjax.coding import tensors
from cnnjax.coding.coded import is_coded, nest_like
from cnnjax.coding.streams import Method
from cnnjax.coding.wire import FormatError, Reader, Writer

PyTree = Any
MAGIC = b"\x89CNNZ\r\n\x1a"
VERSION = 1
DIGEST = 32
MAX_BYTES = 2 << 30
_TABLE_LIMIT = 16 << 20
_MAX_TENSORS = 10_000
_MAX_RANK = 8
_MAX_SIZE = 2**40
_MAX_NAME = 4096


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: its path, kind, dtype, shape, payload length and where bytes went."""

    path: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    parts: tensors.Parts


@dataclasses.dataclass(frozen=True)
class Contents:
    """A read file: the coded tree (numpy leaves), the user's metadata, one entry per tensor."""

    coded: PyTree
    metadata: dict[str, Any]
    entries: tuple[Entry, ...]


def coded_leaves(coded: PyTree) -> dict[str, Any]:
    """``{path: leaf}`` of a coded tree, coded nodes whole."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(coded, is_leaf=is_coded)
    out = {treelib.path_string(keypath): leaf for keypath, leaf in leaves}
    if len(out) != len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return out


def pack(
    coded: PyTree,
    *,
    metadata: Mapping[str, Any] | None = None,
    method: Method = "auto",
    gap_bits: int | None = None,
) -> bytes:
    """A coded tree as the bytes of a compressed file.

    Args:
      coded: a tree of arrays, `Shared` and `Uniform` nodes; plain arrays are stored without loss.
      metadata: JSON-able facts to store with it, e.g. the model's name and configuration.
      method: entropy coder: "auto" (smallest per stream), "fixed", "huffman" or "ans".
      gap_bits: width of relative indices; None picks it per tensor.

    Raises:
      ValueError: for NaN or infinity, or a path that cannot be stored.
      TypeError: for dtypes that cannot be stored.
    """
    table, payloads = Writer(), []
    table.block(json.dumps(dict(metadata or {}), separators=(",", ":")).encode())
    if gap_bits is not None and not 1 <= gap_bits <= 16:
        raise ValueError(f"gap_bits must be 1 to 16 or None, got {gap_bits}")
    leaves = coded_leaves(coded)
    _check_paths(list(leaves), ValueError)
    if len(leaves) > _MAX_TENSORS:
        raise ValueError(f"{len(leaves)} tensors; a file holds at most {_MAX_TENSORS}")
    table.varint(len(leaves))
    for path, leaf in leaves.items():
        try:
            kind, dtype, payload = tensors.write(leaf, method=method, gap_bits=gap_bits)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None
        table.block(path.encode())
        table.varint(kind)
        table.varint(tensors.DTYPES.index(dtype))
        shape = tuple(np.shape(leaf)) if not is_coded(leaf) else leaf.shape
        table.varint(len(shape))
        for size in shape:
            table.varint(size)
        table.varint(len(payload))
        table.raw(zlib.crc32(payload).to_bytes(4, "little"))
        payloads.append(payload)
    head = Writer()
    head.raw(MAGIC)
    head.varint(VERSION)
    body = table.bytes()
    head.raw(zlib.crc32(body).to_bytes(4, "little"))
    head.packed(body)
    data = head.bytes() + b"".join(payloads)
    return data + hashlib.sha256(data).digest()


def _check_paths(paths: list[str], error: type[Exception]) -> None:
    seen = set(paths)
    if len(seen) != len(paths):
        raise error("two tensors have the same path")
    for path in paths:
        parts = path.split("/")
        if not all(parts) or len(path.encode()) > _MAX_NAME or len(parts) > 64:
            raise error(f"the path {path[:80]!r} is empty in part, too long or too deep")
        if any("/".join(parts[:i]) in seen for i in range(1, len(parts))):
            raise error(f"the path {path!r} runs through another tensor")


def _open(data: bytes) -> Reader:
    if data[: len(MAGIC)] != MAGIC:
        raise FormatError("not a cnnjax compressed file: it does not start with the magic bytes")
    if len(data) < len(MAGIC) + DIGEST:
        raise FormatError("the file is truncated: it ends within the header")
    version = data[len(MAGIC)]
    if version != VERSION:
        raise FormatError(f"file version {version}; this library reads version {VERSION}")
    view = memoryview(data)
    if hashlib.sha256(view[:-DIGEST]).digest() != data[-DIGEST:]:
        raise FormatError("the file is truncated or damaged: its SHA-256 digest does not match")
    return Reader(data[len(MAGIC) + 1 : -DIGEST])


def _metadata(table: Reader) -> dict[str, Any]:
    try:
        found = json.loads(table.block(what="the metadata").decode())
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"the metadata is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError("the metadata is not a JSON object")
    return found


def unpack(data: bytes, *, max_bytes: int = MAX_BYTES) -> Contents:
    """Reads a compressed file.

    Args:
      data: the whole file.
      max_bytes: refuse files whose tensors would take more than this once expanded; checked from
        the declared shapes before anything is decoded.

    Returns:
      the coded tree (nested dicts, numpy arrays; all-digit keys are ints), metadata and entries.

    Raises:
      FormatError: for anything that is not an intact file of this version and size.
    """
    reader = _open(bytes(data))
    crc = int.from_bytes(reader.raw(4), "little")
    body = reader.packed(limit=_TABLE_LIMIT, what="the table")
    if zlib.crc32(body) != crc:
        raise FormatError("the table is damaged: its checksum does not match")
    table = Reader(body, what="table")
    metadata = _metadata(table)
    rows, budget = [], max_bytes
    for _ in range(table.varint(limit=_MAX_TENSORS, what="the number of tensors")):
        row = _row(table)
        size = math.prod(row[3])
        budget -= size * max(jnp.dtype(row[2]).itemsize, 4)
        if budget < 0:
            raise FormatError(
                f"the tensors would take more than {max_bytes} bytes (at {row[0]!r}); if the file "
                "is trusted, raise max_bytes"
            )
        rows.append(row)
    table.end()
    _check_paths([row[0] for row in rows], FormatError)
    if sum(row[4] for row in rows) != reader.left:
        raise FormatError(f"the table promises payloads of another size than {reader.left} bytes")
    flat, entries = {}, []
    for path, kind, dtype, shape, length, check in rows:
        payload = reader.raw(length)
        if zlib.crc32(payload) != check:
            raise FormatError(f"{path}: damaged, its checksum does not match")
        try:
            flat[path], parts = tensors.read(payload, kind, dtype, shape)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        entries.append(Entry(path, tensors.KINDS[kind], dtype, shape, length, parts))
    return Contents(nest_like(flat), metadata, tuple(entries))


def _row(table: Reader) -> tuple[str, int, str, tuple[int, ...], int, int]:
    """Path, kind, dtype, shape, payload length and checksum of one tensor."""
    try:
        path = table.block(limit=_MAX_NAME, what="a path").decode()
    except UnicodeDecodeError:
        raise FormatError("a tensor's path is not UTF-8") from None
    kind = table.varint(limit=tensors.UNIFORM, what="a tensor's kind")
    dtype = tensors.DTYPES[table.varint(limit=len(tensors.DTYPES) - 1, what="a dtype")]
    if kind != tensors.RAW and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise FormatError(f"{path}: codes of a {dtype} tensor")
    rank = table.varint(limit=_MAX_RANK, what="a rank")
    shape = tuple(table.varint(limit=_MAX_SIZE, what="a dimension") for _ in range(rank))
    if math.prod(max(size, 1) for size in shape) > _MAX_SIZE:
        raise FormatError(f"{path}: the shape {shape} is too large for any tensor")
    length = table.varint(what="a payload's length")
    return path, kind, dtype, shape, length, int.from_bytes(table.raw(4), "little")


def save(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a packed network; the file appears whole or not at all."""
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Contents:
    """Reads and `unpack`\\ s a file; one longer than ``max_bytes`` is refused unread."""
    source = pathlib.Path(path)
    length = source.stat().st_size
    if length > max_bytes:
        raise FormatError(f"{source} has {length} bytes, more than max_bytes={max_bytes}")
    return unpack(source.read_bytes(), max_bytes=max_bytes)
