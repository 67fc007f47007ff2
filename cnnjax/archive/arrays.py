"""The arrays of an archive: an Orbax checkpoint with a checksum for each array."""

from __future__ import annotations

import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.tree import flatten, nest


class ArchiveError(ValueError):
    """An archive that cannot be read, or a model that cannot be saved: says why and what to do."""


def collect(
    model: nnx.Module,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """The model's arrays on the host, and the manifest's entry of each.

    Raises:
      ArchiveError: if a leaf is abstract or not wholly on this host.
    """
    values: dict[str, np.ndarray] = {}
    entries: dict[str, dict[str, Any]] = {}
    for path, leaf in surgery.leaves(model).items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ArchiveError(f"{path} is abstract: there are no numbers to save")
        if not getattr(leaf, "is_fully_addressable", True):
            raise ArchiveError(f"{path} lives on other hosts too; gather the model first")
        entry: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            entry["key"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        elif isinstance(leaf, np.ndarray):
            entry["numpy"] = True
        value = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
        entry["crc32"] = zlib.crc32(value.tobytes())
        entries[path] = entry
        if value.size:  # Orbax refuses empty arrays; the shape says it all
            values[path] = value
    return values, entries


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp  # slow to import, needed by save and load only

    return ocp.StandardCheckpointer()


def write(path: pathlib.Path, values: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays as an Orbax checkpoint."""
    with _checkpointer() as checkpointer:
        checkpointer.save(path.resolve(), nest(values))


def read(
    path: pathlib.Path, model: nnx.Module, entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The arrays of an archive, checked against the model's leaves and their checksums.

    Raises:
      FileNotFoundError: if the folder is missing.
      ArchiveError: names what does not fit or is damaged.
    """
    want = surgery.leaves(model)
    problems = [f"the archive lacks {p}" for p in want if p not in entries]
    problems += [f"the model has no {p}" for p in entries if p not in want]
    for p, leaf in want.items():
        entry = entries.get(p)
        if entry is None:
            continue
        if tuple(entry["shape"]) != tuple(leaf.shape):
            problems.append(f"{p} is {tuple(entry['shape'])}, the model needs {tuple(leaf.shape)}")
        elif not _same_dtype(entry["dtype"], str(leaf.dtype)):
            problems.append(f"{p} is {entry['dtype']}, the model needs {leaf.dtype}")
    if problems:
        raise ArchiveError(
            f"{path}: arrays do not fit the model ({len(problems)}): {'; '.join(problems[:5])}"
        )
    targets = {p: np.zeros(_stored(e)[0], _stored(e)[1]) for p, e in entries.items()}
    stored = {p: t for p, t in targets.items() if t.size}
    if stored:
        folder = path / "arrays"
        if not folder.is_dir():
            raise FileNotFoundError(f"{path}: the folder 'arrays' is missing")
        try:
            with _checkpointer() as checkpointer:
                targets |= flatten(checkpointer.restore(folder.resolve(), nest(stored)))
        except Exception as error:
            raise ArchiveError(f"{folder} is damaged: {str(error)[:300]}") from error
    out: dict[str, Any] = {}
    for p, entry in entries.items():
        value = np.asarray(targets[p])
        if value.shape != _stored(entry)[0] or zlib.crc32(
            np.ascontiguousarray(value).tobytes()
        ) != int(entry["crc32"]):
            raise ArchiveError(f"{path}: the array {p} is damaged (its checksum differs)")
        if "key" in entry:
            out[p] = jax.random.wrap_key_data(jnp.asarray(value), impl=entry["key"])
        else:
            out[p] = value if entry.get("numpy") else jnp.asarray(value)
    return out


def _same_dtype(a: str, b: str) -> bool:
    # numpy attributes may be 64 bit where the traced factory shows 32
    wide = {"int64": "int32", "uint64": "uint32", "float64": "float32"}
    return a == b or wide.get(a) == b


def _stored(entry: Mapping[str, Any]) -> tuple[tuple[int, ...], Any]:
    shape = tuple(entry["shape"])
    if "key" in entry:
        data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=entry["key"])))
        return shape + data.shape, data.dtype
    return shape, jnp.dtype(entry["dtype"])
