"""Hostile files: whatever the bytes, a clear error, in little time and memory."""

from __future__ import annotations

import contextlib
import hashlib
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import coding
from cnnjax.coding import container, tensors
from cnnjax.coding.wire import FormatError, Reader, Writer

pytestmark = pytest.mark.method("deep_compression")


def network():
    rng = np.random.default_rng(0)

    def codes(shape, density, k):
        return (rng.integers(1, k + 1, shape) * (rng.random(shape) < density)).astype(np.uint8)

    book = rng.normal(size=7).astype("f4")
    return {
        "sparse": coding.Shared(book, codes((40, 30), 0.1, 7)),
        "dense": coding.Shared(book, codes((10, 8), 1.0, 7)),
        "uniform": coding.quantize(rng.normal(size=(9, 4)).astype("f4"), 5, axis=-1),
        "shifted": coding.quantize(rng.normal(size=(9, 4)).astype("f4"), 4, symmetric=False),
        "raw": rng.normal(size=5).astype("f4"),
        "few": (rng.normal(size=(20, 20)) * (rng.random((20, 20)) < 0.05)).astype("f4"),
    }


@pytest.fixture(scope="module")
def blobs():
    return [coding.pack(network(), method=m, metadata={"a": 1}) for m in ("auto", "huffman", "ans")]


def sealed(data):
    """With a digest that fits: an attacker can do this too."""
    return data + hashlib.sha256(data).digest()


def split(blob):
    """Table bytes and payloads of a file."""
    reader = Reader(blob[9:-32])
    reader.raw(4)
    body = reader.packed(limit=1 << 24)
    return body, reader.raw(reader.left)


def rebuilt(body, payloads):
    """A file with this table and these payloads and all checksums of the header right."""
    head = Writer()
    head.raw(container.MAGIC)
    head.varint(container.VERSION)
    head.raw(zlib.crc32(body).to_bytes(4, "little"))
    head.packed(body)
    return sealed(head.bytes() + payloads)


def must_be_clean(data, max_bytes=1 << 24):
    """Reading succeeds or raises FormatError and nothing else, quickly."""
    began = time.process_time()
    ok = True
    try:
        coding.unpack(data, max_bytes=max_bytes)
    except FormatError:
        ok = False
    assert time.process_time() - began < 10
    return ok


def peak_of(data, max_bytes):
    """Peak memory of a refused read."""
    tracemalloc.start()
    try:
        assert not must_be_clean(data, max_bytes)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_every_truncation_is_noticed(blobs):
    for cut in range(0, len(blobs[0]), 3):
        with pytest.raises(FormatError):
            coding.unpack(blobs[0][:cut])
    with pytest.raises(FormatError, match="truncated or damaged"):
        coding.unpack(blobs[0][:-1])
    with pytest.raises(FormatError):
        coding.unpack(blobs[0] + b"x")


def test_every_bit_flip_is_noticed(blobs):
    blob = blobs[0]
    for position in range(0, len(blob)):
        damaged = bytearray(blob)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(FormatError):
            coding.unpack(bytes(damaged))


@pytest.mark.parametrize("which", [0, 1, 2])
@given(st.data())
@settings(max_examples=80, deadline=None)
def test_damage_under_fitting_checksums(blobs, which, data):
    """The table and payloads are mutated and every checksum is made right again."""
    contents = coding.unpack(blobs[which])
    body, payloads = split(blobs[which])
    sizes = [e.nbytes for e in contents.entries]
    index = data.draw(st.integers(0, len(sizes) - 1))
    start = sum(sizes[:index])
    part = bytearray(payloads[start : start + sizes[index]])
    old = zlib.crc32(bytes(part)).to_bytes(4, "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(part) - 1, 60)) | st.integers(0, len(part) - 1))
        part[at] = data.draw(st.integers(0, 255))
    new = zlib.crc32(bytes(part)).to_bytes(4, "little")
    payloads = payloads[:start] + bytes(part) + payloads[start + sizes[index] :]
    must_be_clean(rebuilt(body.replace(old, new), payloads))


@pytest.mark.parametrize("which", [0, 1])
@given(st.data())
@settings(max_examples=80, deadline=None)
def test_lying_tables_under_fitting_checksums(blobs, which, data):
    body, payloads = split(blobs[which])
    body = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)) | st.just(len(body)))
    must_be_clean(rebuilt(bytes(body[:cut]), payloads))


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes(data):
    assert not must_be_clean(data)
    assert not must_be_clean(sealed(container.MAGIC + b"\x01" + data))


@given(
    st.binary(max_size=120),
    st.sampled_from([tensors.RAW, tensors.SHARED, tensors.UNIFORM]),
    st.lists(st.integers(0, 40), max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_arbitrary_payloads(data, kind, shape):
    with contextlib.suppress(FormatError):
        tensors.read(data, kind, "float32", tuple(shape))


def table(*rows, metadata=b"{}", count=None):
    out = Writer()
    out.block(metadata)
    out.varint(len(rows) if count is None else count)
    for path, kind, dtype, shape, payload in rows:
        out.block(path)
        out.varint(kind)
        out.varint(dtype)
        out.varint(len(shape))
        for size in shape:
            out.varint(size)
        out.varint(len(payload))
        out.raw(zlib.crc32(payload).to_bytes(4, "little"))
    return rebuilt(out.bytes(), b"".join(row[4] for row in rows))


EMPTY_SPARSE = b"\x00\x00\x01\x03\x00\x00\x00\x00"  # k, dtype, rows, gap bits, two empty streams
EMPTY_RAW = b"\x01\x01\x03\x00\x00\x00\x00\x00"  # flag, rows, gap bits, two empty streams, dtype


def test_bombs_are_refused_before_memory_is_taken():
    huge = (1 << 20, 1 << 19)
    for kind, payload in ((tensors.RAW, EMPTY_RAW), (tensors.SHARED, EMPTY_SPARSE)):
        assert must_be_clean(table((b"a", kind, 0, (5, 4), payload)))
        blob = table((b"a", kind, 0, huge, payload))
        assert len(blob) < 200
        assert peak_of(blob, 1 << 20) < 1 << 20
        with pytest.raises(FormatError, match="more than 2147483648 bytes"):
            coding.unpack(blob)
    # many small lies that only add up to a large one
    rows = [(b"a%d" % i, tensors.SHARED, 0, (1000,), EMPTY_SPARSE) for i in range(50)]
    with pytest.raises(FormatError, match="at 'a25'"):
        coding.unpack(table(*rows), max_bytes=26 * 4000 - 1)
    # a deflated table that would inflate without end
    bomb = zlib.compress(b"\0" * (40 << 20), 9)
    head = Writer()
    head.raw(container.MAGIC + b"\x01" + b"\0\0\0\0")
    head.varint((40 << 20) << 1 | 1)
    head.block(bomb)
    assert peak_of(sealed(head.bytes()), 1 << 24) < 1 << 20
    head = Writer()
    head.raw(container.MAGIC + b"\x01" + b"\0\0\0\0")
    head.varint(1000 << 1 | 1)
    head.block(bomb)
    assert peak_of(sealed(head.bytes()), 1 << 24) < 1 << 20
    with pytest.raises(FormatError, match="inflates to another length"):
        coding.unpack(sealed(head.bytes()))
    # a stream that promises a symbol per element and holds none: one symbol costs no bits
    zero_bits = b"\x00\x00\x00" + b"\x00" + b"\x80\x80\x40"
    one_symbol = table((b"a", tensors.SHARED, 0, (1 << 20,), zero_bits))
    assert must_be_clean(one_symbol, max_bytes=1 << 22)
    assert peak_of(one_symbol, (1 << 22) - 1) < 1 << 20


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (table((b"a", 1, 0, (4,), EMPTY_SPARSE), (b"a", 1, 0, (4,), EMPTY_SPARSE)), "same path"),
        (table((b"a", 1, 0, (4,), EMPTY_SPARSE), (b"a/b", 1, 0, (4,), EMPTY_SPARSE)), "through"),
        (table((b"a//b", 1, 0, (4,), EMPTY_SPARSE)), "empty in part"),
        (table((b"", 1, 0, (4,), EMPTY_SPARSE)), "empty in part"),
        (table((b"\xff", 1, 0, (4,), EMPTY_SPARSE)), "UTF-8"),
        (table((b"a", 1, 4, (4,), EMPTY_SPARSE)), "int8"),
        (table((b"a", 3, 0, (4,), EMPTY_SPARSE)), "kind"),
        (table((b"a", 1, 99, (4,), EMPTY_SPARSE)), "dtype"),
        (table((b"a", 1, 0, (1,) * 9, EMPTY_SPARSE)), "rank"),
        (table((b"a", 1, 0, (0, 1 << 30, 1 << 30), EMPTY_SPARSE)), "too large"),
        (table((b"a", 0, 0, (1,), b"\x00\x0d\x00\x00\x80\x3f")), "one number for 1 equal"),
        (table((b"a", 0, 0, (0,), b"\x00\x0d\x00\x00\x80\x3f")), "one number for 0 equal"),
        (table((b"a", 0, 0, (3,), b"\x00\x1a\x00\x00\x80\x3f")), "a stored dtype"),
        (table(count=3), "ends too early"),
        (table(count=1 << 60), "number of tensors"),
        (table(metadata=b"[1]"), "not a JSON object"),
        (table(metadata=b"{"), "not JSON"),
        (table(metadata=b"[" * 100_000), "not JSON"),
        (container.MAGIC + b"\x02" + b"\0" * 60, "version 2"),
        (b"PK\x03\x04" + b"\0" * 60, "not a cnnjax compressed file"),
        (b"", "not a cnnjax compressed file"),
        (container.MAGIC, "truncated"),
    ],
)
def test_lies_get_the_right_message(blob, message):
    with pytest.raises(FormatError, match=message):
        coding.unpack(blob)


def test_an_empty_sparse_tensor_is_fine():
    out = coding.unpack(table((b"a", 1, 0, (4, 5), EMPTY_SPARSE))).coded["a"]
    np.testing.assert_array_equal(np.asarray(out.expand()), np.zeros((4, 5)))


def test_varints_have_one_form():
    with pytest.raises(FormatError, match="shortest"):
        Reader(b"\x80\x00").varint()
    with pytest.raises(FormatError, match="longer"):
        Reader(b"\xff" * 20).varint()
    with pytest.raises(ValueError, match="negative"):
        Writer().varint(-1)
