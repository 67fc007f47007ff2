"""Metric files, the progress line, event files, and the compilation cache's switch."""

from __future__ import annotations

import io
import json
import struct

import jax
import pytest

from cnnjax import training
from cnnjax.training.tensorboard import EventWriter, crc32c


def test_jsonl_resume_drops_later_and_torn_records(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = training.JsonlWriter(path)
    for step in (2, 4, 6):
        writer.write({"step": step, "loss": step / 2})
    writer.sync()
    writer.close()
    with open(path, "a") as f:
        f.write('{"step": 8, "lo')  # the writer was killed here
    assert [r["step"] for r in training.read_jsonl(path)] == [2, 4, 6]
    writer = training.JsonlWriter(path, resume_step=4)
    assert [r["step"] for r in writer.records] == [2, 4]
    writer.write({"step": 6, "loss": float("nan")})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in lines] == [2, 4, 6]
    assert lines[-1]["loss"] == "nan"
    training.JsonlWriter(path).close()  # a fresh run starts anew
    assert path.read_text() == ""


def test_jsonl_damage_in_the_middle(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        training.read_jsonl(path)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_line():
    stream = _Terminal()
    bar = training.Progress(10, stream=stream)
    bar.update(4, {"loss": 1.25, "accuracy": 0.5}, 12345.6)
    bar.close()
    text = stream.getvalue()
    assert text.startswith("\rtrain 4/10  loss 1.25  accuracy 0.5  12,346 images/s")
    assert text.endswith("s left\n")
    plain = io.StringIO()
    bar = training.Progress(10, stream=plain, interval=100)
    bar.update(4, {"loss": 1.0})
    bar.update(5, {"loss": 1.0})
    bar.close()
    assert plain.getvalue().count("\n") == 1
    silent = io.StringIO()
    training.Progress(10, stream=silent, enabled=False).update(4, {})
    assert silent.getvalue() == ""


def _records(data):
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[12 + length + 4 :]


def _fields(message):
    """A decoder of the wire format, written from its specification."""
    i = 0

    def varint():
        nonlocal i
        value = shift = 0
        while True:
            byte = message[i]
            i += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while i < len(message):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
        elif kind == 2:
            size = varint()
            yield number, message[i : i + size]
            i += size
        else:
            size = {1: 8, 5: 4}[kind]
            yield number, struct.unpack("<d" if size == 8 else "<f", message[i : i + size])[0]
            i += size


def test_event_files(tmp_path):
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value
    writer = EventWriter(tmp_path / "tb")
    writer.scalars(3, {"train/loss": 1.5, "train/rate": -2.0})
    writer.scalars(300, {"train/loss": 0.25})
    writer.close()
    data = writer.path.read_bytes()
    first, second, third = (dict(_fields(r)) for r in _records(data))
    assert first[3] == b"brain.Event:2"
    assert (second[2], third[2]) == (3, 300)
    values = [dict(_fields(v)) for number, v in _fields(second[5]) if number == 1]
    assert values == [{1: b"train/loss", 2: 1.5}, {1: b"train/rate", 2: -2.0}]
    # each record's length carries its own masked checksum
    (stored,) = struct.unpack("<I", data[8:12])
    crc = crc32c(data[:8])
    assert stored == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_compilation_cache_switch(tmp_path, monkeypatch):
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {n: getattr(jax.config, n) for n in names}
    try:
        assert training.enable_compilation_cache(False) is None
        assert jax.config.jax_enable_compilation_cache is False
        folder = training.enable_compilation_cache(tmp_path / "a" / "b")
        assert folder == tmp_path / "a" / "b"
        assert folder.is_dir()
        assert jax.config.jax_enable_compilation_cache is True
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        assert training.enable_compilation_cache() == tmp_path / "xdg" / "cnnjax" / "xla"
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "env"))
        assert training.enable_compilation_cache(True) == tmp_path / "env"
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            training.enable_compilation_cache(tmp_path / "file" / "x")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
