"""Bounded reading and writing of the compressed file's primitives.

Every read checks what is left before it takes anything, so a lying length is an error and never an
allocation.
"""

from __future__ import annotations

import zlib


class FormatError(ValueError):
    """The bytes are not a valid compressed file (truncated, damaged, or of another kind)."""


class Writer:
    """Collects primitives into bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def varint(self, value: int) -> None:
        """An unsigned integer, seven bits per byte, the low ones first."""
        if value < 0:
            raise ValueError(f"a varint is not negative, got {value}")
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
        self._parts.append(bytes(out))

    def raw(self, data: bytes) -> None:
        """Bytes whose length the reader knows."""
        self._parts.append(data)

    def block(self, data: bytes) -> None:
        """A length and that many bytes."""
        self.varint(len(data))
        self._parts.append(data)

    def packed(self, data: bytes) -> None:
        """A block that is deflated where that makes it smaller."""
        small = zlib.compress(data, 9)
        flag = len(small) < len(data)
        self.varint(len(data) << 1 | flag)
        self.block(small) if flag else self.raw(data)

    def bytes(self) -> bytes:
        """All that was written."""
        return b"".join(self._parts)


class Reader:
    """Takes primitives from bytes; every method raises `FormatError` at a lie."""

    def __init__(self, data: bytes, *, what: str = "file") -> None:
        self._data = memoryview(data)
        self._at = 0
        self._what = what

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def raw(self, count: int) -> bytes:
        """``count`` bytes."""
        if count > self.left:
            raise FormatError(
                f"the {self._what} ends too early: {count} bytes wanted, {self.left} left"
            )
        out = bytes(self._data[self._at : self._at + count])
        self._at += count
        return out

    def varint(self, *, limit: int = 2**63 - 1, what: str = "a number") -> int:
        """An unsigned integer of at most ``limit``."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.raw(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    raise FormatError(f"{what} of the {self._what} is not in its shortest form")
                break
        else:
            raise FormatError(f"{what} of the {self._what} is longer than 10 bytes")
        if value > limit:
            raise FormatError(f"{what} of the {self._what} is {value}; at most {limit} is allowed")
        return value

    def block(self, *, limit: int = 2**63 - 1, what: str = "a block") -> bytes:
        """A length and that many bytes."""
        return self.raw(self.varint(limit=limit, what=f"the length of {what}"))

    def packed(self, *, limit: int, what: str = "a block") -> bytes:
        """The inverse of `Writer.packed`; never inflates beyond the declared, limited length."""
        head = self.varint(limit=limit * 2 + 1, what=f"the length of {what}")
        length, deflated = head >> 1, head & 1
        if not deflated:
            return self.raw(length)
        small = self.block(what=what)
        inflate = zlib.decompressobj()
        try:
            out = inflate.decompress(small, length + 1)
        except zlib.error as error:
            raise FormatError(f"{what} of the {self._what} does not inflate: {error}") from None
        if len(out) != length or not inflate.eof or inflate.unused_data:
            raise FormatError(f"{what} of the {self._what} inflates to another length")
        return out

    def end(self) -> None:
        """Raises unless everything was read."""
        if self.left:
            raise FormatError(f"{self.left} bytes too many at the end of the {self._what}")
