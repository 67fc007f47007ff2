"""Names, descriptions, splits, and what happens when something is not there."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.datasets import load_digits

import cnnjax.data
from cnnjax.data import sources


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to open a connection fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def test_digits_are_scikit_learns(root):
    raw = load_digits()
    images, labels = zip(*(cnnjax.data.arrays("digits", s, root) for s in ("train", "test")))
    assert [x.shape for x in images] == [(1442, 8, 8, 1), (355, 8, 8, 1)]
    assert all(x.dtype == np.uint8 for x in images)
    assert all(y.dtype == np.int32 for y in labels)
    got = sorted(
        ((x[..., 0] / 255 * 16).round().tobytes(), int(y))
        for x, y in zip(np.concatenate(images), np.concatenate(labels))
    )
    assert got == sorted((x.tobytes(), int(y)) for x, y in zip(raw.images, raw.target))
    # the split, counted by hand: every fifth of each class is in the test set
    seen, test = dict.fromkeys(range(10), 0), []
    for x, y in zip(raw.images, raw.target):
        seen[int(y)] += 1
        if seen[int(y)] % 5 == 0:
            test.append((x.tobytes(), int(y)))
    stored = [
        ((x[..., 0] / 255 * 16).round().tobytes(), int(y)) for x, y in zip(images[1], labels[1])
    ]
    assert sorted(stored) == sorted(test)


def test_digits_are_a_tfds_data_set(root):
    info = cnnjax.data.info("digits", root)
    assert info == sources.DatasetInfo(
        name="digits",
        num_classes=10,
        image_shape=(8, 8, 1),
        splits={"train": 1442, "test": 355},
        class_names=tuple("0123456789"),
        data_dir=str(root / "digits" / "1.0.0"),
    )
    source = sources.tfds().data_source("digits", split="test", data_dir=str(root))
    images, labels = cnnjax.data.arrays("digits", "test", root)
    assert len(source) == 355
    for i in (0, 7, 354):
        np.testing.assert_array_equal(source[i]["image"], images[i])
        assert source[i]["label"] == labels[i]


def test_no_tensorflow():
    assert "tensorflow" not in sys.modules


def test_arrays_are_shared_and_read_only(root):
    images, labels = cnnjax.data.arrays("digits", "train", root)
    assert cnnjax.data.arrays("digits", "train", str(root))[0] is images
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        labels[0] = 0


def test_slices_of_splits(root):
    whole = cnnjax.data.arrays("digits", "train", root)[0]
    parts = [cnnjax.data.arrays("digits", s, root)[0] for s in ("train[:90%]", "train[90%:]")]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("split", ["tset", "tset[:10]", "train[:5%]]", ""])
def test_unknown_split(root, split):
    with pytest.raises(ValueError, match=r"unknown split .* it has train \(1442 examples\)"):
        cnnjax.data.arrays("digits", split, root)


def test_unknown_data_set(root):
    for name, near in (("mnits", "mnist"), ("cifar_10", "cifar10"), ("digit", "digits")):
        with pytest.raises(ValueError, match=f"unknown data set '{name}'. Did you mean .*'{near}'"):
            cnnjax.data.info(name, root)
    with pytest.raises(ValueError, match="non-empty string"):
        cnnjax.data.info("", root)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("mnist", "python scripts/prepare_data.py mnist --from DIR --data_dir "),
        ("cifar10_jpeg", "python scripts/prepare_cifar10_jpeg.py --from DIR --data_dir "),
        ("oxford_flowers102", "tfds build oxford_flowers102 --file_format=array_record"),
        ("emnist/letters", "tfds build emnist/letters"),
        ("coco", "tfds build coco"),
    ],
)
def test_a_set_that_is_not_prepared(root, name, command):
    begin = time.perf_counter()
    with pytest.raises(cnnjax.data.DatasetNotPreparedError) as told:
        cnnjax.data.loader(name, "train", batch_size=8, train=True, data_dir=root)
    assert time.perf_counter() - begin < 10
    assert command in str(told.value)
    assert str(root) in str(told.value)
    assert "never downloads" in str(told.value)


def test_a_set_that_is_no_image_classification(root, tmp_path):
    lib = sources.tfds()
    from cnnjax.data import prepare

    made = prepare.own_builder("words", "text only", {"text": lib.features.Text()})
    made._info = lambda self: lib.core.DatasetInfo(
        builder=self, features=lib.features.FeaturesDict({"text": lib.features.Text()})
    )
    made._split_generators = lambda self, dl: {"train": iter([(0, {"text": "a"})])}
    prepare.write(made, tmp_path)
    with pytest.raises(ValueError, match=r"'words' is not an image-classification set.*'text'"):
        cnnjax.data.info("words", tmp_path)


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="TFDS_DATA_DIR"):
        cnnjax.data.info("digits", tmp_path / "file")


def test_default_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert cnnjax.data.default_data_dir() == str(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert cnnjax.data.default_data_dir().endswith("/tensorflow_datasets")
    assert cnnjax.data.default_data_dir("~/x").startswith("/")


def test_records_travel_to_worker_processes(root):
    records = sources.Records("digits", "train", root)
    again = pickle.loads(pickle.dumps(records))
    a, b = records.encoded([3, 1]), again.encoded([3, 1])
    assert a[0] == b[0]
    np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.slow
def test_several_processes_may_prepare_digits_together(tmp_path):
    code = f"import cnnjax.data as d; print(d.info('digits', {str(tmp_path)!r}).splits)"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in running:
        shown, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert shown == "{'train': 1442, 'test': 355}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]
