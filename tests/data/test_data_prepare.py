"""Prepared sets are read back by TFDS' stock names; a failure leaves nothing behind."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_data_files import cifar, image_folder, mnist_folder

import cnnjax.data
from cnnjax.data import files, prepare, sources
from scripts import prepare_cifar10_jpeg, prepare_data


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to open a connection fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def sorted_rows(images, labels):
    """TFDS stores examples in an order of its own: compare as sets."""
    return sorted((x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True))


def leftovers(root):
    return sorted(p.name for p in pathlib.Path(root).rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_idx_sets(tmp_path, name):
    want = mnist_folder(tmp_path / "raw", shape=(28, 28), suffix=".gz", train=40)
    root = tmp_path / "tfds"
    made = prepare.prepare(name, tmp_path / "raw", root, progress=False)
    assert made.parent == root / name
    info = cnnjax.data.info(name, root)
    assert (info.num_classes, info.image_shape) == (10, (28, 28, 1))
    assert info.splits == {"train": 40, "test": 3}
    for split in ("train", "test"):
        images, labels = cnnjax.data.arrays(name, split, root)
        assert images.shape[1:] == (28, 28, 1)
        assert sorted_rows(images, labels) == sorted_rows(*want[split])
    assert {p.name for p in root.iterdir()} == {name}
    # TFDS itself, by the stock name, in the same order and with its own decoder
    stock = sources.tfds().data_source(name, split="train", data_dir=str(root))
    images, labels = cnnjax.data.arrays(name, "train", root)
    for i, row in enumerate(stock):
        np.testing.assert_array_equal(row["image"], images[i])
        assert row["label"] == labels[i]
    with pytest.raises(FileExistsError, match="exists already"):
        prepare.prepare(name, tmp_path / "raw", root, progress=False)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar_sets(tmp_path, name, kind):
    classes = int(name[5:])
    want = cifar(tmp_path / "raw", classes, kind)
    prepare.prepare(name, tmp_path / "raw", tmp_path / "tfds", progress=False)
    for split in ("train", "test"):
        got = cnnjax.data.arrays(name, split, tmp_path / "tfds")
        assert sorted_rows(*got) == sorted_rows(*want[split][:2])
    info = cnnjax.data.info(name, tmp_path / "tfds")
    assert info.class_names == tuple(f"class{i}" for i in range(classes))
    stock = sources.tfds().data_source(name, split="test", data_dir=str(tmp_path / "tfds"))
    assert sorted(row["id"] for row in stock) == [b"test_00000", b"test_00001"]
    if classes == 100:
        assert sorted(r["coarse_label"] for r in stock) == sorted(want["test"][2].tolist())


def test_an_image_folder_under_a_new_name(tmp_path):
    want = image_folder(tmp_path / "raw")
    prepare.prepare("my_pets", tmp_path / "raw", tmp_path / "tfds", progress=False)
    info = cnnjax.data.info("my_pets", tmp_path / "tfds")
    assert info.class_names == ("cat", "dog")
    assert info.image_shape == (None, None, 3)
    assert info.splits == {"train": 6, "validation": 6}
    records = sources.Records("my_pets", "validation", tmp_path / "tfds")
    encoded, labels = records.encoded(range(6))
    got = sorted_rows([sources.decode_image(e, 3) for e in encoded], labels)
    assert got == sorted(
        (v.tobytes(), info.class_names.index(name))
        for (split, name, _), v in want.items()
        if split == "val"
    )
    with pytest.raises(ValueError, match="differ in size"):
        cnnjax.data.arrays("my_pets", "train", tmp_path / "tfds")
    augment = cnnjax.data.Augment(size=8, random_resized_crop=(0.2, 1.0), resize=9, flip=True)
    for train, split in ((True, "train"), (False, "validation")):
        it = cnnjax.data.loader(
            "my_pets",
            split,
            batch_size=4,
            train=train,
            augment=augment,
            data_dir=tmp_path / "tfds",
            workers=2,
        )
        assert next(it)["image"].shape == (4, 8, 8, 3)
        it.close()


def test_an_image_folder_as_imagenet(tmp_path):
    image_folder(tmp_path / "raw", classes=("n01440764", "n01443537"))
    prepare.prepare("imagenet2012", tmp_path / "raw", tmp_path / "tfds", progress=False)
    info = cnnjax.data.info("imagenet2012", tmp_path / "tfds")
    assert info.num_classes == 1000
    stock = sources.tfds().data_source(
        "imagenet2012", split="train", data_dir=str(tmp_path / "tfds")
    )
    assert sorted(row["label"] for row in stock) == [0, 0, 0, 1, 1, 1]
    names = {row["file_name"] for row in stock}
    assert names == {b"train0.png", b"train1.JPEG", b"train2.JPEG"}
    image_folder(tmp_path / "pets")
    with pytest.raises(ValueError, match="classes that TFDS' 'imagenet2012' has not"):
        prepare.prepare("imagenet2012", tmp_path / "pets", tmp_path / "other")
    with pytest.raises(ValueError, match="cannot be described without TensorFlow"):
        prepare.prepare("coco", tmp_path / "pets", tmp_path / "other")
    with pytest.raises(ValueError, match="a folder of images cannot fill"):
        prepare.prepare("caltech_birds2010", tmp_path / "pets", tmp_path / "other")


def test_damaged_files_leave_nothing(tmp_path, capsys):
    mnist_folder(tmp_path / "raw", shape=(28, 28))
    root = tmp_path / "tfds"
    path = tmp_path / "raw" / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for data, told in (
        (whole[: len(whole) // 2], "cut off"),
        (b"\0\0\x08\x01" + whole[4:], "too long|cut off"),
        (b"abcd" + whole[4:], "wrong magic number"),
    ):
        path.write_bytes(data)
        with pytest.raises(files.BadFileError, match=told):
            prepare.prepare("mnist", tmp_path / "raw", root)
    code = prepare_data.main(["mnist", "--from", str(tmp_path / "raw"), "--data_dir", str(root)])
    assert code == 1
    assert "wrong magic number 0x61626364" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="does not exist"):
        prepare.prepare("mnist", tmp_path / "nowhere", root)
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        prepare.prepare("../mnist", tmp_path / "raw", root)
    assert not leftovers(root)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, error):
    mnist_folder(tmp_path / "raw", shape=(28, 28))
    root = tmp_path / "tfds"
    whole, calls = prepare._picture, []

    def fails_later(pixels):
        calls.append(0)
        if len(calls) == 8:  # in the second split, with the first one written
            raise error
        return whole(pixels)

    monkeypatch.setattr(prepare, "_picture", fails_later)
    with pytest.raises((KeyboardInterrupt, OSError)):
        prepare.prepare("mnist", tmp_path / "raw", root, progress=False)
    assert list(root.iterdir()) == []
    monkeypatch.setattr(prepare, "_picture", whole)
    prepare.prepare("mnist", tmp_path / "raw", root, progress=False)
    assert cnnjax.data.info("mnist", root).splits == {"train": 6, "test": 3}


def test_what_a_killed_process_left_is_swept(tmp_path):
    mnist_folder(tmp_path / "raw", shape=(28, 28))
    old = tmp_path / "tfds" / ".mnist-abc.partial" / "data"
    old.mkdir(parents=True)
    (tmp_path / "tfds" / ".mnist.lock").touch()
    prepare.prepare("mnist", tmp_path / "raw", tmp_path / "tfds", progress=False)
    assert [p.name for p in (tmp_path / "tfds").iterdir()] == ["mnist"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing(tmp_path, root, number, code):
    mnist_folder(tmp_path / "raw", shape=(28, 28), train=60000)
    command = [sys.executable, "scripts/prepare_data.py", "mnist", "--from", tmp_path / "raw"]
    command += ["--data_dir", tmp_path / "tfds"]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    limit = time.time() + 60
    while time.time() < limit and not list((tmp_path / "tfds").rglob("*.array_record*")):
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == code
    assert list((tmp_path / "tfds").iterdir()) == []


def test_the_script(tmp_path, capsys):
    mnist_folder(tmp_path / "raw", shape=(28, 28))
    args = ["mnist", "--from", str(tmp_path / "raw"), "--data_dir", str(tmp_path / "tfds")]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert prepare_data.main(args) == 0
        shown = capsys.readouterr()
        assert "mnist: 6 train, 3 test, 10 classes" in shown.out
        assert "mnist train: 100%" in shown.err
        assert prepare_data.main(args) == 1
        assert "exists already" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


def jpeg_npz(path, n):
    rng = np.random.default_rng(0)
    folder = path.parent / f"images{n}"
    image_folder(folder, splits=("train",), classes=("a",))
    one = (folder / "train" / "a" / "train1.JPEG").read_bytes()
    parts = [one] * n
    offset = np.cumsum([0] + [len(p) for p in parts])
    label = rng.integers(0, 10, n).astype(np.uint8)
    jpeg = np.frombuffer(b"".join(parts), np.uint8)
    np.savez(path, jpeg=jpeg, offset=offset, label=label)
    return {"jpeg": jpeg, "offset": offset, "label": label}


def test_damaged_jpeg_npz(tmp_path):
    path = tmp_path / "train_jpeg.npz"
    with pytest.raises(FileNotFoundError):
        prepare_cifar10_jpeg.read(path)
    good = jpeg_npz(path, 4)
    got, label = prepare_cifar10_jpeg.read(path)
    assert b"".join(got) == good["jpeg"].tobytes()
    np.testing.assert_array_equal(label, good["label"])
    for change, told in (
        ({"label": good["label"][:-1]}, "3 labels, 5 offsets"),
        ({"jpeg": good["jpeg"][:-1]}, "do not match"),
        ({"label": good["label"] + 10}, "outside 0..9"),
        ({"offset": good["offset"][[0, 2, 1, 3, 4]]}, "do not increase"),
        ({"jpeg": good["jpeg"] ^ 1}, "file 0 is no JPEG"),
    ):
        np.savez(path, **(good | change))
        with pytest.raises(files.BadFileError, match=told):
            prepare_cifar10_jpeg.read(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(files.BadFileError, match="not a whole npz"):
        prepare_cifar10_jpeg.read(path)


def test_part_of_real_mnist(tmp_path, real_data):
    """The first images of the original files, through the whole way."""
    raw = real_data / "mnist"
    (tmp_path / "raw").mkdir()
    want = {}
    for split, prefix, n in (("train", "train", 300), ("test", "t10k", 100)):
        x = files.read_idx(raw / f"{prefix}-images-idx3-ubyte.gz")[:n]
        y = files.read_idx(raw / f"{prefix}-labels-idx1-ubyte.gz")[:n]
        want[split] = x, y
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / "raw" / f"{prefix}-{kind}-ubyte").write_bytes(head + array.tobytes())
    assert want["train"][1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    prepare.prepare("mnist", tmp_path / "raw", tmp_path / "tfds", progress=False)
    for split in want:
        got = cnnjax.data.arrays("mnist", split, tmp_path / "tfds")
        assert sorted_rows(*got) == sorted_rows(*want[split])


@pytest.mark.slow
def test_all_of_real_mnist(tmp_path, real_data):
    prepare.prepare("mnist", real_data / "mnist", tmp_path, progress=False)
    want = files.read_mnist(real_data / "mnist", (28, 28), 10)
    for split, n in (("train", 60000), ("test", 10000)):
        got = cnnjax.data.arrays("mnist", split, tmp_path)
        assert len(got[0]) == n
        assert sorted_rows(*got) == sorted_rows(*want[split])


@pytest.mark.slow
def test_the_cifar10_jpeg_copy(tmp_path, real_data):
    source = real_data / "cifar10_jpeg"
    args = ["--from", str(source), "--data_dir", str(tmp_path), "--quiet"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert prepare_cifar10_jpeg.main(args) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    info = cnnjax.data.info("cifar10_jpeg", tmp_path)
    assert info.splits == {"train": 50000, "test": 10000}
    assert info.image_shape == (32, 32, 3)
    records = sources.Records("cifar10_jpeg", "test", tmp_path)
    encoded, labels = records.encoded(range(10000))
    want = prepare_cifar10_jpeg.read(source / "test_jpeg.npz")
    assert sorted(zip(encoded, labels.tolist())) == sorted(zip(want[0], want[1].tolist()))
    assert os.listdir(tmp_path) == ["cifar10_jpeg"]
