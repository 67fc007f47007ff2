"""Readers of the formats in which image sets are handed out: IDX, CIFAR archives, image folders.

Every file is checked completely (magic number, length, counts, label range) before any is used.
"""

from __future__ import annotations

import gzip
import io
import pathlib
import pickle
import tarfile
import zlib
from typing import Any

import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class BadFileError(ValueError):
    """A data file is damaged, or is not what its name says."""


def _read(path: pathlib.Path) -> bytes:
    """A file's bytes, gunzipped if it is gzip (told by its first bytes, not its name)."""
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise BadFileError(f"{path}: damaged or cut-off gzip file ({e})") from e


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes (LeCun's MNIST format), gzipped or not.

    Raises:
      BadFileError: wrong magic number, or a length that does not match the header.
    """
    data = _read(path)
    if len(data) < 4:
        raise BadFileError(f"{path}: {len(data)} bytes are too few for an IDX file")
    if data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 4:
        raise BadFileError(
            f"{path}: wrong magic number 0x{data[:4].hex()}; an IDX file of bytes starts with"
            " 0x00000803 (images) or 0x00000801 (labels)"
        )
    rank = data[3]
    header = 4 + 4 * rank
    if len(data) < header:
        raise BadFileError(f"{path}: cut off inside the header ({len(data)} bytes)")
    shape = tuple(np.frombuffer(data, ">u4", rank, 4).tolist())
    wanted = header + int(np.prod(shape, dtype=np.int64))
    if len(data) != wanted:
        what = "cut off" if len(data) < wanted else "too long"
        raise BadFileError(
            f"{path}: {what}: the header announces {shape}, so {wanted} bytes, got {len(data)}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _find(folder: pathlib.Path, stems: tuple[str, ...]) -> pathlib.Path:
    """The file with one of these names below a folder, ``.gz`` or not, ``-idx3`` or ``.idx3``."""
    for stem in stems:
        for name in (stem, stem.replace("-idx", ".idx")):
            for suffix in ("", ".gz"):
                found = sorted(folder.rglob(name + suffix))
                if found:
                    return found[0]
    raise FileNotFoundError(f"no file {stems[0]} (or {stems[0]}.gz) in {folder}")


def read_mnist(
    folder: pathlib.Path, shape: tuple[int, int], classes: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The four IDX files of an MNIST-like set.

    Args:
      folder: holds ``train-images-idx3-ubyte[.gz]`` and so on, at any depth.
      shape: ``(height, width)`` that the images must have.
      classes: labels must lie in ``0..classes - 1``.

    Returns:
      ``{"train": (images, labels), "test": ...}``: uint8 ``(n, height, width)`` and ``(n,)``.

    Raises:
      FileNotFoundError: a file is missing.
      BadFileError: a file is damaged or two do not match.
    """
    out = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        image_path = _find(folder, (f"{prefix}-images-idx3-ubyte",))
        label_path = _find(folder, (f"{prefix}-labels-idx1-ubyte",))
        images, labels = read_idx(image_path), read_idx(label_path)
        if images.ndim != 3 or labels.ndim != 1:
            raise BadFileError(
                f"{image_path} has {images.ndim} dimensions (expected 3), {label_path} has"
                f" {labels.ndim} (expected 1): are they swapped?"
            )
        if images.shape[1:] != shape:
            raise BadFileError(f"{image_path}: images {images.shape[1:]}, expected {shape}")
        if len(images) != len(labels):
            raise BadFileError(
                f"{image_path} has {len(images)} images but {label_path} {len(labels)} labels"
            )
        check_labels(label_path, labels, classes)
        out[split] = images, labels
    return out


def check_labels(path: Any, labels: np.ndarray, classes: int) -> None:
    """Raises `BadFileError` unless there are labels and all lie in ``0..classes - 1``."""
    if not len(labels):
        raise BadFileError(f"{path}: no examples")
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        bad = int(labels.max()) if int(labels.max()) >= classes else int(labels.min())
        raise BadFileError(f"{path}: label {bad} is outside 0..{classes - 1}")


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers, strings, numbers and numpy arrays; nothing that runs code."""

    _ALLOWED = frozenset(
        (module, name)
        for module, names in {
            "numpy": ("ndarray", "dtype"),
            "numpy.core.multiarray": ("_reconstruct", "scalar"),
            "numpy._core.multiarray": ("_reconstruct", "scalar"),
            "_codecs": ("encode",),
            "collections": ("OrderedDict",),
        }.items()
        for name in names
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._ALLOWED:
            raise BadFileError(
                f"this pickle asks for {module_name}.{global_name}; only numpy arrays and"
                " containers are read"
            )
        if module_name == "numpy.core.multiarray":  # its old name, deprecated in numpy 2
            module_name = "numpy._core.multiarray"
        return super().find_class(module_name, global_name)


def unpickle(path: Any, data: bytes) -> dict[str, Any]:
    """Reads one pickled dict of a CIFAR python archive, with text keys.

    Raises:
      BadFileError: damaged, not a dict, or it asks for anything but arrays and containers.
    """
    try:
        value = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except BadFileError as e:
        raise BadFileError(f"{path}: {e}") from e
    except Exception as e:  # a damaged pickle may raise nearly anything
        raise BadFileError(f"{path}: damaged pickle ({type(e).__name__}: {e})") from e
    if not isinstance(value, dict):
        raise BadFileError(f"{path}: expected a dict, got {type(value).__name__}")
    return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in value.items()}


def _members(source: pathlib.Path, names: set[str]) -> dict[str, bytes]:
    """Contents of the files with these names: in a folder, in a tar, or in a tar in a folder."""
    if source.is_dir():
        found = {p.name: p.read_bytes() for p in sorted(source.rglob("*")) if p.name in names}
        if found:
            return found
        tars = sorted(source.glob("*.tar.gz")) + sorted(source.glob("*.tar"))
        for tar in tars:
            found = _members(tar, names)
            if found:
                return found
        return {}
    out = {}
    try:
        with tarfile.open(source) as archive:  # members are read, never extracted to the disk
            for member in archive:
                name = pathlib.PurePosixPath(member.name).name
                if member.isfile() and name in names:
                    stream = archive.extractfile(member)
                    out[name] = stream.read() if stream else b""
    except (tarfile.TarError, EOFError, zlib.error) as e:
        raise BadFileError(f"{source}: damaged archive ({e})") from e
    return out


def read_cifar(source: pathlib.Path, classes: int) -> dict[str, Any]:
    """CIFAR-10 or CIFAR-100: binary or python version; a folder, a ``.tar.gz``, or its folder.

    Args:
      source: where the files are.
      classes: 10 or 100.

    Returns:
      ``{"train": (images, labels, coarse), "test": ..., "names": names, "coarse_names": ...}``;
      uint8 images ``(n, 32, 32, 3)``; coarse labels are None for CIFAR-10.

    Raises:
      FileNotFoundError: files are missing.
      BadFileError: a file is damaged.
    """
    ten = classes == 10
    train = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    test = ["test_batch"] if ten else ["test"]
    metas = ("batches.meta",) if ten else ("meta",)
    texts = ("batches.meta.txt",) if ten else ("fine_label_names.txt", "coarse_label_names.txt")
    binary = {f"{n}.bin" for n in train + test}
    wanted = binary | set(train + test) | set(metas) | set(texts)
    found = _members(source, wanted)
    is_binary = binary <= set(found)
    if not is_binary and not set(train + test) <= set(found):
        missing = (
            sorted(binary - set(found))
            if binary & set(found)
            else sorted(set(train + test) - set(found))
        )
        raise FileNotFoundError(f"CIFAR-{classes} in {source}: missing {', '.join(missing)}")
    out: dict[str, Any] = {}
    for split, names in (("train", train), ("test", test)):
        parts = [
            _cifar_binary(f"{source}/{n}.bin", found[f"{n}.bin"], ten)
            if is_binary
            else _cifar_python(f"{source}/{n}", found[n], ten)
            for n in names
        ]
        images, labels = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        coarse = None if ten else np.concatenate([p[2] for p in parts])
        check_labels(f"{source} ({split})", labels, classes)
        if coarse is not None:
            check_labels(f"{source} ({split}, coarse)", coarse, 20)
        out[split] = images, labels, coarse
    out["names"], out["coarse_names"] = _cifar_names(found, metas[0], texts, ten)
    return out


def _planes(flat: np.ndarray) -> np.ndarray:
    """``(n, 3072)`` colour planes -> ``(n, 32, 32, 3)``."""
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _cifar_binary(path: str, data: bytes, ten: bool) -> tuple[Any, Any, Any]:
    width = 3073 if ten else 3074
    if len(data) % width or not data:
        raise BadFileError(f"{path}: cut off: {len(data)} bytes are no multiple of {width}")
    rows = np.frombuffer(data, np.uint8).reshape(-1, width)
    coarse = None if ten else rows[:, 0]
    return _planes(rows[:, -3072:]), rows[:, width - 3073], coarse


def _cifar_python(path: str, data: bytes, ten: bool) -> tuple[Any, Any, Any]:
    value = unpickle(path, data)
    keys = ("labels",) if ten else ("fine_labels", "coarse_labels")
    for key in ("data", *keys):
        if key not in value:
            raise BadFileError(f"{path}: no {key!r} in the pickle; it has {sorted(value)}")
    flat = np.asarray(value["data"])
    if flat.dtype != np.uint8 or flat.ndim != 2 or flat.shape[1] != 3072:
        raise BadFileError(f"{path}: data is {flat.dtype}{flat.shape}, expected uint8 (n, 3072)")
    labels = [np.asarray(value[k], np.int64) for k in keys]
    for key, given in zip(keys, labels):
        if given.shape != (len(flat),):
            raise BadFileError(f"{path}: {len(flat)} images but {key} has shape {given.shape}")
    return _planes(flat), labels[0], None if ten else labels[1]


def _cifar_names(found: dict[str, bytes], meta: str, texts: tuple[str, ...], ten: bool) -> Any:
    if meta in found and texts[0] not in found:
        value = unpickle(meta, found[meta])
        keys = ("label_names",) if ten else ("fine_label_names", "coarse_label_names")
        names = [[n.decode() if isinstance(n, bytes) else n for n in value[k]] for k in keys]
    else:
        names = [found[t].decode().split() if t in found else None for t in texts]
    return names[0], None if ten else names[1]


def read_folder(folder: pathlib.Path) -> tuple[list[str], dict[str, list[tuple[str, int]]]]:
    """A folder ``<split>/<class>/*.jpg|png`` with splits train and, optionally, val or test.

    Returns:
      ``(class names, {split: [(path, label), ...]})``, both sorted by name; ``val`` is called
      ``validation`` as TFDS does.

    Raises:
      FileNotFoundError: no ``train`` folder, or a split without images.
      BadFileError: a class that the training images do not have, or a file that is no image.
    """
    if not (folder / "train").is_dir():
        raise FileNotFoundError(f"no folder {folder / 'train'} with one folder of images per class")
    names = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())
    if not names:
        raise FileNotFoundError(f"{folder / 'train'} has no class folders")
    number = {n: i for i, n in enumerate(names)}
    out: dict[str, list[tuple[str, int]]] = {}
    for place, split in (
        ("train", "train"),
        ("val", "validation"),
        ("validation", "validation"),
        ("test", "test"),
    ):
        if not (folder / place).is_dir():
            continue
        rows = []
        for group in sorted(p for p in (folder / place).iterdir() if p.is_dir()):
            if group.name not in number:
                raise BadFileError(f"{group}: no such class in {folder / 'train'}")
            for path in sorted(group.iterdir()):
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    _check_image(path)
                    rows.append((str(path), number[group.name]))
        if not rows:
            raise FileNotFoundError(f"{folder / place} has no {', '.join(IMAGE_SUFFIXES)} files")
        out[split] = rows
    return names, out


def _check_image(path: pathlib.Path) -> None:
    with path.open("rb") as f:
        head = f.read(8)
    if not (head.startswith(b"\xff\xd8\xff") or head == b"\x89PNG\r\n\x1a\n"):
        raise BadFileError(f"{path}: neither a JPEG nor a PNG file (starts with 0x{head.hex()})")
