"""Scalars as TensorBoard event files, written directly: no TensorFlow, no protobuf.

A file is a sequence of TFRecords (length, masked CRC-32C of the length, data, masked CRC-32C of the
data); each holds one ``Event`` message, whose few fields are encoded here by hand.
"""

from __future__ import annotations

import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping


def _table() -> tuple[int, ...]:
    out = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        out.append(crc)
    return tuple(out)


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC of RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _event(wall_time: float, step: int, body: bytes) -> bytes:
    # wall_time: double, field 1; step: int64, field 2
    return b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + body


class EventWriter:
    """Appends scalars to a new event file in a folder; TensorBoard joins the files of a folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens ``events.out.tfevents.<time>.<host>.<pid>`` in the folder, made if missing."""
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = path / name
        self._file = open(self.path, "ab")  # noqa: SIM115
        self._record(_event(now, 0, _field(3, b"brain.Event:2")))

    def _record(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked(length) + data + _masked(data))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes ``{tag: value}`` at a step and flushes."""
        summary = b"".join(
            _field(1, _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
            for tag, value in values.items()
        )
        self._record(_event(time.time(), step, _field(5, summary)))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
