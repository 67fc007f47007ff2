"""The loader: one stream per seed, however it is sharded, prefetched or resumed."""

from __future__ import annotations

import itertools
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax.data import Augment, arrays, loader

AUGMENT = Augment(pad=1, flip=True, mean=(0.3,), std=(0.4,))


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes loaders of digits in one folder."""
    root = tmp_path_factory.mktemp("tfds")

    def build(split="train", **options):
        settings = {"batch_size": 128, "train": True, "seed": 3, "augment": AUGMENT, "workers": 0}
        return loader("digits", split, data_dir=root, **(settings | options))

    build.root = root
    return build


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert set(x) == set(y)
        for key in x:
            assert x[key].dtype == y[key].dtype
            np.testing.assert_array_equal(x[key], y[key])


def test_a_batch(make):
    it = make()
    batch = next(it)
    assert batch["image"].shape == (128, 8, 8, 1)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (128,)
    assert batch["label"].dtype == np.int32
    assert set(batch) == {"image", "label"}
    assert it.image_shape == (8, 8, 1)
    assert it.steps_per_epoch == 1442 // 128
    assert (it.position, it.epoch) == (1, 0)


def test_every_epoch_shows_every_example_once_in_a_new_order(make):
    images, labels = arrays("digits", "train", make.root)
    it = make(augment=Augment(), batch_size=103, drop_remainder=False)
    assert it.steps_per_epoch == 14
    orders = []
    for _ in range(3):
        seen, kept = [], []
        for batch in take(it, 14):
            real = batch["weight"] > 0
            seen += [tuple(row) for row in np.rint(batch["image"][real] * 255).reshape(-1, 64)]
            kept += batch["label"][real].tolist()
        want = {tuple(row) for row in images.reshape(-1, 64).astype(float)}
        assert len(seen) == len(images)
        assert set(seen) == want
        assert np.bincount(kept).tolist() == np.bincount(labels).tolist()
        orders.append(kept)
    assert orders[0] != orders[1] != orders[2]


def test_augmentation_is_drawn_anew_each_epoch(make):
    it = make(split="train[:1]", batch_size=1)
    shown = {next(it)["image"].tobytes() for _ in range(100)}
    assert 12 <= len(shown) <= 18  # nine offsets, two mirrors


def test_seeds(make):
    same(take(make(seed=5), 15), take(make(seed=5), 15))
    a, b = next(make(seed=5)), next(make(seed=6))
    assert not np.array_equal(a["label"], b["label"])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"train": False, "split": "test"}, {"augment": Augment(mixup=0.4)}]
)
def test_processes_share_out_the_batch_of_one_process(make, count, options):
    options = {"drop_remainder": False, "epochs": 2} | options
    whole = list(make(**options))
    parts = [list(make(process_index=i, process_count=count, **options)) for i in range(count)]
    joined = [
        {k: np.concatenate([p[k] for p in step]) for k in step[0]}
        for step in zip(*parts, strict=True)
    ]
    same(whole, joined)


@pytest.fixture(scope="module")
def reference(make):
    return take(make(workers=0, augment=Augment(pad=1, mixup=0.2, label_smoothing=0.1)), 30)


@settings(max_examples=12, deadline=None)
@given(position=st.integers(0, 29), ahead=st.integers(0, 5), workers=st.sampled_from([0, 1, 2]))
def test_resume_from_any_position(make, reference, position, ahead, workers):
    options = {"augment": Augment(pad=1, mixup=0.2, label_smoothing=0.1)}
    first = make(workers=workers, **options)
    take(first, position)
    state = json.loads(json.dumps(first.get_state()))
    take(first, ahead)  # what comes after the state is taken must not matter
    assert first.get_state()["next_batch"] == position + ahead
    other = make(workers=2, **options)
    take(other, 2)
    other.set_state(state)
    assert other.position == position
    same(take(other, 30 - position), reference[position:])
    first.set_state(state)
    same(take(first, 2)[: 30 - position], reference[position : position + 2])
    first.close()
    other.close()


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 2, "prefetch": 1}, {"workers": 3}])
def test_workers_do_not_change_the_stream(make, options):
    with_workers = make(**options)
    same(take(make(), 25), take(with_workers, 25))
    with_workers.close()


def test_close_ends_the_workers(make):
    # only the threads that this loader starts: others of the process may end at any moment
    before = set(threading.enumerate())
    it = make(workers=2)
    take(it, 2)
    workers = set(threading.enumerate()) - before
    assert workers
    it.close()
    limit = time.time() + 20
    while any(thread.is_alive() for thread in workers) and time.time() < limit:
        time.sleep(0.01)
    assert not [thread for thread in workers if thread.is_alive()]
    same(take(it, 1), take(make(), 3)[2:])  # the position stays
    it.close()


def test_memory_and_records_give_the_same_stream(make):
    same(take(make(), 13), take(make(in_memory=False), 13))
    resized = {"augment": Augment(size=6, random_resized_crop=(0.3, 1.0), flip=True)}
    same(take(make(**resized), 3), take(make(in_memory=False, **resized), 3))
    centre = {"augment": Augment(size=6, resize=7), "train": False, "split": "test"}
    a, b = list(make(**centre)), list(make(in_memory=False, **centre))
    same(a, b)
    assert a[0]["image"].shape == (128, 6, 6, 1)


@pytest.mark.slow
def test_worker_processes_give_the_same_stream(make):
    options = {"workers": 2, "worker_processes": True, "in_memory": False}
    it = make(**options)
    want = take(make(), 9)
    same(take(it, 6), want[:6])
    state = it.get_state()
    it.close()
    it.set_state(state)
    same(take(it, 3), want[6:])
    it.close()


def test_evaluation_sees_each_example_once_in_order(make):
    images, labels = arrays("digits", "test", make.root)
    it = make(split="test", train=False, batch_size=100, augment=Augment(pad=2, mixup=1.0))
    batches = list(it)
    assert len(batches) == 4
    assert all(b["image"].shape == (100, 8, 8, 1) for b in batches)
    weight = np.concatenate([b["weight"] for b in batches])
    assert weight.tolist() == [1.0] * 355 + [0.0] * 45
    image = np.concatenate([b["image"] for b in batches])
    np.testing.assert_allclose(image[:355], images / 255.0, atol=1e-6)
    assert not image[355:].any()
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches])[:355], labels)
    assert "soft_label" not in batches[0]
    same(list(it.reset()), batches)
    with pytest.raises(StopIteration):
        next(it)


def test_a_process_may_get_nothing_but_padding(make):
    parts = [
        list(make("test[:3]", train=False, batch_size=8, process_index=i, process_count=4))
        for i in range(4)
    ]
    assert [p[0]["weight"].tolist() for p in parts] == [[1, 1], [1, 0], [0, 0], [0, 0]]
    assert all(p[0]["image"].shape == (2, 8, 8, 1) for p in parts)


def test_soft_labels(make):
    plain = next(make(augment=Augment()))
    batch = next(make(augment=Augment(label_smoothing=0.1)))
    np.testing.assert_allclose(batch["soft_label"], np.eye(10)[plain["label"]] * 0.9 + 0.01)
    mixed = next(make(augment=Augment(mixup=0.5)))
    np.testing.assert_array_equal(mixed["label"], plain["label"])
    # the weight can be read off a pair with different labels; image and label share it
    pair = next(i for i in range(0, 128, 2) if plain["label"][i] != plain["label"][i + 1])
    lam = mixed["soft_label"][pair, plain["label"][pair]]
    assert 0 < lam < 1
    for own, other in ((pair, pair + 1), (pair + 1, pair)):
        want = lam * plain["image"][own] + (1 - lam) * plain["image"][other]
        np.testing.assert_allclose(mixed["image"][own], want, atol=1e-6)


def test_epochs_end_the_stream(make):
    assert len(list(make(epochs=2))) == 2 * (1442 // 128)
    assert len(take(make(), 50)) == 50


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 0}, "positive multiple"),
        ({"batch_size": 10, "process_index": 0, "process_count": 4}, "processes, 4"),
        ({"batch_size": 2000}, "larger than the 1442 examples"),
        ({"process_index": 0}, "both process_index and process_count"),
        ({"process_index": 2, "process_count": 2}, "outside 0..1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"workers": -1}, "workers"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 7, "augment": Augment(mixup=1.0)}, "7 per process is odd"),
        ({"augment": Augment(mean=(0.1, 0.2, 0.3))}, "1 channels"),
        ({"split": "tran"}, "unknown split 'tran'.*Did you mean 'train'"),
    ],
)
def test_bad_arguments(make, options, told):
    with pytest.raises(ValueError, match=told):
        make(**options)


def test_a_position_of_another_stream_is_refused(make):
    state = make(seed=3).get_state()
    with pytest.raises(ValueError, match=r"seed 3 \(here 4\)"):
        make(seed=4).set_state(state)
    with pytest.raises(ValueError, match="not a loader's position"):
        make().set_state({"next_batch": 3})
    with pytest.raises(ValueError, match="outside"):
        make(epochs=1).set_state(state | {"next_batch": 12})
