"""Teacher targets computed once: by example, or batch by batch of an augmented stream.

With augmentation a target belongs to an *augmented* image. The loader's batches are a pure
function of (seed, number), so targets are kept by batch number together with the identity of the
stream: data set, split, seed, batch size, augmentation. Attached to another stream they are
refused, and every batch is checked by a checksum on the way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from cnnjax.distillation.teachers import Teacher

_FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class TargetCache:
    """Targets in memory, on the device (`on_device`) or on the disk (memory-mapped).

    Attributes:
      logits: (steps, batch, classes) of a stream, or (examples, classes).
      features: by path, with the same leading axes.
      checks: uint32 checksum of each batch (or example).
      data: identity of the data, a JSON-able dict.
      teacher: `Teacher.fingerprint`.
    """

    logits: Any
    features: Mapping[str, Any]
    checks: np.ndarray
    data: Mapping[str, Any]
    teacher: str

    @property
    def fingerprint(self) -> str:
        """A hash of the data's identity."""
        return _digest(self.data)

    @property
    def nbytes(self) -> int:
        """Bytes of all targets."""
        return sum(int(a.nbytes) for a in (self.logits, *self.features.values()))

    def __len__(self) -> int:
        return len(self.logits)

    def on_device(self) -> TargetCache:
        """The same with its targets in device memory: batches then take them from there, no copy
        from the host in any step."""
        put = lambda a: jax.device_put(np.asarray(a))  # noqa: E731
        features = {path: put(values) for path, values in self.features.items()}
        return dataclasses.replace(self, logits=put(self.logits), features=features)

    def save(self, folder: str | os.PathLike[str]) -> pathlib.Path:
        """Writes a folder of ``.npy`` files and ``cache.json``, appearing by one rename."""
        target = pathlib.Path(folder)
        temporary = target.with_name(target.name + ".tmp")
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        names = {path: f"feature{i}.npy" for i, path in enumerate(self.features)}
        np.save(temporary / "logits.npy", np.asarray(self.logits))
        np.save(temporary / "checks.npy", self.checks)
        for path, name in names.items():
            np.save(temporary / name, np.asarray(self.features[path]))
        meta = {
            "format": _FORMAT,
            "features": names,
            "data": dict(self.data),
            "fingerprint": self.fingerprint,
            "teacher": self.teacher,
        }
        (temporary / "cache.json").write_text(json.dumps(meta, indent=1) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        return target


def load_cache(folder: str | os.PathLike[str], *, in_memory: bool = False) -> TargetCache:
    """Reads what `TargetCache.save` wrote; the arrays stay on the disk unless ``in_memory``.

    Raises:
      FileNotFoundError: no cache there.
      ValueError: another format, or a damaged description.
    """
    folder = pathlib.Path(folder)
    file = folder / "cache.json"
    if not file.is_file():
        raise FileNotFoundError(f"no target cache at {folder}: {file} is missing")
    meta = json.loads(file.read_text())
    if meta.get("format") != _FORMAT:
        raise ValueError(f"{folder}: format {meta.get('format')!r}, expected {_FORMAT}")
    if _digest(meta["data"]) != meta["fingerprint"]:
        raise ValueError(f"{folder}: the description of the data was changed by hand")
    how = None if in_memory else "r"

    def read(name: str) -> Any:
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{folder}: {name!r} lies outside of the cache")
        return np.load(folder / name, mmap_mode=how, allow_pickle=False)

    features = {path: read(name) for path, name in meta["features"].items()}
    checks = np.load(folder / "checks.npy", allow_pickle=False)
    return TargetCache(read("logits.npy"), features, checks, meta["data"], meta["teacher"])


def cache_stream(teacher: Teacher, loader: Any, steps: int) -> TargetCache:
    """Targets of the first ``steps`` batches of a training stream.

    Args:
      teacher: see `Teacher`.
      loader: a `cnnjax.data.Loader` (or anything with ``get_state`` and ``loader[number]``).
      steps: batches; the student can then be trained for so many steps.

    Returns:
      The cache in memory: steps * batch * classes floats, and the features.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; cache at least one batch")
    call = jax.jit(lambda constants, x: teacher(constants, x))
    constants = jax.device_put(teacher.constants)
    logits, features, checks = [], {tap: [] for tap in teacher.taps}, []
    for number in range(steps):
        batch = loader[number]
        targets = jax.device_get(call(constants, batch["image"]))
        logits.append(targets.logits)
        for tap, value in targets.features.items():
            features[tap].append(value)
        checks.append(checksum(batch))
    return TargetCache(
        np.stack(logits),
        {tap: np.stack(values) for tap, values in features.items()},
        np.asarray(checks, np.uint32),
        stream_identity(loader),
        teacher.fingerprint(),
    )


def cache_examples(
    teacher: Teacher, images: np.ndarray, *, batch_size: int = 500, name: str = ""
) -> TargetCache:
    """Targets of every example, to be looked up by its number: for training without augmentation.

    Args:
      teacher: see `Teacher`.
      images: (n, h, w, c) exactly as the student will see them.
      batch_size: at a time.
      name: of the data set, for the record.
    """
    call = jax.jit(lambda constants, x: teacher(constants, x))
    constants = jax.device_put(teacher.constants)
    logits, features = [], {tap: [] for tap in teacher.taps}
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        short = batch_size - len(part) if len(images) > batch_size else 0
        if short:  # one compilation
            part = np.concatenate([part, np.zeros((short, *part.shape[1:]), part.dtype)])
        targets = jax.device_get(call(constants, part))
        keep = len(part) - short
        logits.append(targets.logits[:keep])
        for tap, value in targets.features.items():
            features[tap].append(value[:keep])
    checks = np.array([_crc(x) for x in images], np.uint32)
    data = {"name": name, "examples": len(images), "content": _content(images)}
    return TargetCache(
        np.concatenate(logits),
        {tap: np.concatenate(values) for tap, values in features.items()},
        checks,
        data,
        teacher.fingerprint(),
    )


def lookup(cache: TargetCache, images: np.ndarray, numbers: np.ndarray) -> dict[str, Any]:
    """The targets of examples by number, as keys to add to a batch.

    Raises:
      ValueError: the images aren't those that the cache was made from.
    """
    numbers = np.asarray(numbers)
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < len(cache)):
        raise ValueError(
            f"example numbers {numbers.min()}..{numbers.max()}, cached 0..{len(cache) - 1}"
        )
    for number, image in zip(numbers.tolist(), images, strict=True):
        if _crc(image) != cache.checks[number]:
            raise ValueError(
                f"example {number} is another image than the one whose target was cached (other "
                "data, order, scaling or augmentation); make the cache anew"
            )
    return _keys(cache, numbers)


class CachedStream(Iterator[dict[str, np.ndarray]]):
    """A loader whose batches carry their cached targets; keeps the loader's exact position."""

    def __init__(self, loader: Any, cache: TargetCache, *, teacher: Teacher | None = None):
        """Checks that the cache belongs to this stream (and teacher).

        Raises:
          ValueError: it was made for other data, says what differs; or by another teacher.
        """
        mine = stream_identity(loader)
        if _digest(mine) != cache.fingerprint:
            other = {k: (cache.data.get(k), mine.get(k)) for k in {**mine, **cache.data}}
            told = ", ".join(f"{k} {a!r} (here {b!r})" for k, (a, b) in other.items() if a != b)
            raise ValueError(f"the targets were cached for other data: {told}")
        if teacher is not None and teacher.fingerprint() != cache.teacher:
            raise ValueError("the targets were cached from another teacher; make the cache anew")
        self._loader, self._cache = loader, cache

    def __next__(self) -> dict[str, np.ndarray]:
        number = int(self._loader.get_state()["next_batch"])
        if number >= len(self._cache):
            raise ValueError(
                f"batch {number} has no cached targets; {len(self._cache)} were cached"
            )
        batch = next(self._loader)
        if checksum(batch) != self._cache.checks[number]:
            raise ValueError(f"batch {number} differs from the one whose targets were cached")
        return {**batch, **_keys(self._cache, number)}

    def get_state(self) -> dict[str, Any]:
        """The loader's."""
        return self._loader.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """The loader's."""
        self._loader.set_state(state)

    def close(self) -> None:
        """The loader's."""
        self._loader.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


def stream_identity(loader: Any) -> dict[str, Any]:
    """What the batches of a loader depend on, as JSON values."""
    state = {k: v for k, v in loader.get_state().items() if k != "next_batch"}
    first = loader[0]
    return {**state, "first_batch": checksum(first), "shape": list(first["image"].shape)}


def checksum(batch: Mapping[str, Any]) -> int:
    """CRC of a batch's labels and of every 8th row of its images."""
    images = np.asarray(batch["image"])
    seen = np.ascontiguousarray(images.reshape(-1, images.shape[-1])[::8])
    return zlib.crc32(np.ascontiguousarray(batch["label"]).tobytes(), zlib.crc32(seen.tobytes()))


def _crc(image: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(image).tobytes())


def _content(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()[:32]


def _keys(cache: TargetCache, at: Any) -> dict[str, Any]:
    out = {"teacher_logits": _taken(cache.logits, at)}
    for path, values in cache.features.items():
        out[f"teacher_feature/{path}"] = _taken(values, at)
    return out


def _taken(values: Any, at: Any) -> Any:
    return _take(values, at) if isinstance(values, jax.Array) else np.asarray(values[at])


@jax.jit
def _take(values: jax.Array, at: Any) -> jax.Array:
    return values[at]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
