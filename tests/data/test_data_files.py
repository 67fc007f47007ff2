"""Readers of IDX, CIFAR and image folders: round trips, and every kind of damage."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from cnnjax.data import files


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)])
def test_idx_round_trip(tmp_path, zipped, shape):
    want = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    data = idx_bytes(want)
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(data) if zipped else data)
    np.testing.assert_array_equal(files.read_idx(path), want)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: d[: len(d) // 2], r"cut off: the header announces \(6, 4, 4\), so 112 bytes"),
        (lambda d: d + b"\0", "too long"),
        (lambda d: b"\0\0\x0d\x03" + d[4:], "wrong magic number 0x00000d03"),
        (lambda d: b"PK\x03\x04" + d[4:], "wrong magic number 0x504b0304"),
        (lambda d: d[:9], "cut off inside the header"),
        (lambda d: b"", "too few"),
        (lambda d: gzip.compress(d)[:-20], "damaged or cut-off gzip"),
        (lambda d: gzip.compress(d)[:60] + b"\xff" * 40, "damaged or cut-off gzip"),
    ],
)
def test_damaged_idx(tmp_path, damage, told):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4))
    (tmp_path / "x").write_bytes(damage(idx_bytes(images)))
    with pytest.raises(files.BadFileError, match=told):
        files.read_idx(tmp_path / "x")


def mnist_folder(folder, *, train=6, labels=None, shape=(4, 4), suffix="", value=None):
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for prefix, n in (("train", train), ("t10k", 3)):
        x = rng.integers(0, 256, (n, *shape), np.uint8)
        y = rng.integers(0, 10, labels if labels and prefix == "train" else n).astype(np.uint8)
        if value is not None:
            y[-1] = value
        pack = gzip.compress if suffix else bytes
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(x)))
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(y)))
        out["train" if prefix == "train" else "test"] = x, y
    return out


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path, suffix):
    want = mnist_folder(tmp_path / "deeper" / "raw", suffix=suffix)
    got = files.read_mnist(tmp_path, (4, 4), 10)
    for split in ("train", "test"):
        for a, b in zip(got[split], want[split]):
            np.testing.assert_array_equal(a, b)


def test_mnist_that_does_not_match(tmp_path):
    mnist_folder(tmp_path / "a", labels=5)
    with pytest.raises(files.BadFileError, match="has 6 images but .* 5 labels"):
        files.read_mnist(tmp_path / "a", (4, 4), 10)
    mnist_folder(tmp_path / "b", value=10)
    with pytest.raises(files.BadFileError, match="label 10 is outside 0..9"):
        files.read_mnist(tmp_path / "b", (4, 4), 10)
    mnist_folder(tmp_path / "c")
    with pytest.raises(files.BadFileError, match=r"images \(4, 4\), expected \(28, 28\)"):
        files.read_mnist(tmp_path / "c", (28, 28), 10)
    os.remove(tmp_path / "c" / "t10k-labels-idx1-ubyte")
    with pytest.raises(FileNotFoundError, match="no file t10k-labels-idx1-ubyte"):
        files.read_mnist(tmp_path / "c", (4, 4), 10)
    images = tmp_path / "b" / "train-images-idx3-ubyte"
    images.replace(tmp_path / "b" / "train-labels-idx1-ubyte")
    images.write_bytes(idx_bytes(np.zeros(4, np.uint8)))
    with pytest.raises(files.BadFileError, match="swapped"):
        files.read_mnist(tmp_path / "b", (4, 4), 10)


def cifar(folder, classes, kind):
    """Writes a tiny CIFAR; returns images (n, 32, 32, 3), fine and coarse labels per split."""
    rng = np.random.default_rng(classes)
    folder.mkdir(parents=True, exist_ok=True)
    ten = classes == 10
    names = {"train": [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]}
    names["test"] = ["test_batch"] if ten else ["test"]
    out = {}
    for split, parts in names.items():
        rows = []
        for name in parts:
            x = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
            fine, coarse = rng.integers(0, classes, 2), rng.integers(0, 20, 2)
            rows.append((x, fine, coarse))
            flat = np.stack([i.transpose(2, 0, 1).ravel() for i in x])  # red, green, blue planes
            if kind == "binary":
                heads = [fine[:, None]] if ten else [coarse[:, None], fine[:, None]]
                data = np.concatenate([*heads, flat], 1).astype(np.uint8).tobytes()
                (folder / f"{name}.bin").write_bytes(data)
            else:
                value = {b"data": flat, b"batch_label": b"x"}
                if ten:
                    value[b"labels"] = fine.tolist()
                else:
                    value |= {b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
                (folder / name).write_bytes(pickle.dumps(value, protocol=2))
        out[split] = [np.concatenate(c) for c in zip(*rows)]
    fine_names = [f"class{i}" for i in range(classes)]
    coarse_names = [f"group{i}" for i in range(20)]
    if kind == "binary":
        texts = {"batches.meta.txt": fine_names} if ten else {}
        if not ten:
            texts = {"fine_label_names.txt": fine_names, "coarse_label_names.txt": coarse_names}
        for name, text in texts.items():
            (folder / name).write_text("\n".join(text) + "\n")
    else:
        meta = {"label_names": fine_names} if ten else {}
        if not ten:
            meta = {"fine_label_names": fine_names, "coarse_label_names": coarse_names}
        (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return out


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("packed", ["folder", "tar", "folder of tar"])
def test_cifar(tmp_path, classes, kind, packed):
    want = cifar(tmp_path / "files", classes, kind)
    source = tmp_path / "files"
    if packed != "folder":
        (tmp_path / "only").mkdir()
        source = tmp_path / "only" / "cifar.tar.gz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(tmp_path / "files", "cifar-batches")
        if packed == "folder of tar":
            source = source.parent
    got = files.read_cifar(source, classes)
    for split in ("train", "test"):
        np.testing.assert_array_equal(got[split][0], want[split][0])
        np.testing.assert_array_equal(got[split][1], want[split][1])
        if classes == 100:
            np.testing.assert_array_equal(got[split][2], want[split][2])
    assert got["names"] == [f"class{i}" for i in range(classes)]
    assert (got["coarse_names"] is None) == (classes == 10)


def test_damaged_cifar(tmp_path):
    cifar(tmp_path, 10, "binary")
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(files.BadFileError, match=r"data_batch_3.bin: cut off: 6145 bytes"):
        files.read_cifar(tmp_path, 10)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"missing data_batch_3.bin"):
        files.read_cifar(tmp_path, 10)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"no tar at all" * 100))
    with pytest.raises(files.BadFileError, match="damaged archive"):
        files.read_cifar(tmp_path / "x.tar.gz", 10)


def test_damaged_python_cifar(tmp_path):
    cifar(tmp_path, 100, "python")
    good = pickle.loads((tmp_path / "train").read_bytes())

    def write(**changed):
        value = {k.decode(): v for k, v in good.items()} | changed
        (tmp_path / "train").write_bytes(pickle.dumps(value, protocol=2))

    write(fine_labels=[1])
    with pytest.raises(files.BadFileError, match="2 images but fine_labels has shape"):
        files.read_cifar(tmp_path, 100)
    write(data=good[b"data"][:, :-1])
    with pytest.raises(files.BadFileError, match=r"expected uint8 \(n, 3072\)"):
        files.read_cifar(tmp_path, 100)
    write(fine_labels=[1, 100])
    with pytest.raises(files.BadFileError, match="label 100 is outside 0..99"):
        files.read_cifar(tmp_path, 100)
    (tmp_path / "train").write_bytes(b"\x80\x02}q\x00cut")
    with pytest.raises(files.BadFileError, match="damaged pickle"):
        files.read_cifar(tmp_path, 100)


class Evil:
    """Unpickles by running a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_cannot_run_code(tmp_path):
    data = pickle.dumps({"data": Evil(tmp_path / "ran"), "labels": []}, protocol=2)
    with pytest.raises(files.BadFileError, match="only numpy arrays and containers"):
        files.unpickle("x", data)
    assert not (tmp_path / "ran").exists()
    old = pickle.dumps({"a": np.arange(3)}, protocol=2).replace(
        b"numpy._core.multiarray", b"numpy.core.multiarray"
    )
    np.testing.assert_array_equal(files.unpickle("x", old)["a"], [0, 1, 2])


def image_folder(folder, splits=("train", "val"), classes=("cat", "dog")):
    """JPEG and PNG images of several sizes; returns the decoded pixels per split and class."""
    rng = np.random.default_rng(2)
    out = {}
    for split in splits:
        for k, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(3):
                x = rng.integers(0, 256, (10 + i, 12 + k, 3), np.uint8)
                data = io.BytesIO()
                kind = "png" if i == 0 else "jpeg"
                Image.fromarray(x).save(data, kind)
                path = folder / split / name / f"{split}{i}.{'png' if i == 0 else 'JPEG'}"
                path.write_bytes(data.getvalue())
                out[split, name, path.name] = np.asarray(Image.open(path))
            (folder / split / name / "notes.txt").write_text("not an image")
    return out


def test_image_folder(tmp_path):
    image_folder(tmp_path)
    names, splits = files.read_folder(tmp_path)
    assert names == ["cat", "dog"]
    assert {k: len(v) for k, v in splits.items()} == {"train": 6, "validation": 6}
    assert [label for _, label in splits["train"]] == [0, 0, 0, 1, 1, 1]


def test_bad_image_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*train"):
        files.read_folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="no class folders"):
        files.read_folder(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="has no .jpg"):
        files.read_folder(tmp_path)
    (tmp_path / "train" / "cat" / "a.jpg").write_bytes(b"hello world")
    with pytest.raises(files.BadFileError, match="neither a JPEG nor a PNG"):
        files.read_folder(tmp_path)
    (tmp_path / "train" / "cat" / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 rest")
    (tmp_path / "val" / "horse").mkdir(parents=True)
    with pytest.raises(files.BadFileError, match="horse: no such class"):
        files.read_folder(tmp_path)
