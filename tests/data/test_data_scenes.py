"""Generated scenes: the same for the same arguments, boxes around the ink, splits apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cnnjax.data import scenes
from cnnjax.data.memory import MemoryLoader, in_order

CLEAN = scenes.SceneConfig(
    objects=(2, 3), noise=0.0, clutter=0, contrast=(1.0, 1.0), overlap=0.0, stretch=1.0
)


def test_scenes_are_a_function_of_their_arguments():
    a, b = scenes.digit_scenes("train", 6, seed=3), scenes.digit_scenes("train", 9, seed=3)
    for key in a:
        np.testing.assert_array_equal(a[key], b[key][:6])
    other = scenes.digit_scenes("train", 6, seed=4)
    assert (a["image"] != other["image"]).any()
    assert a["image"].shape == (6, 48, 48, 1)
    assert a["boxes"].shape == (6, 4, 4)
    assert a["image"].dtype == a["boxes"].dtype == np.float32
    assert a["label"].dtype == np.int32


def test_splits_hold_different_digits():
    rows = [set(scenes.digit_rows(s).tolist()) for s in scenes.SPLITS]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]
    assert len(rows[0] | rows[1] | rows[2]) == 1797
    a = scenes.digit_scenes("train", 2)["image"]
    assert (a != scenes.digit_scenes("test", 2)["image"]).any()


def test_boxes_surround_the_ink():
    """In clean scenes the background is a plane: what stands out of it lies in the boxes."""
    found = scenes.digit_scenes("train", 8, config=CLEAN)
    y, x = np.mgrid[:48, :48] / 47.0
    plane = np.stack([y.ravel(), x.ravel(), np.ones(48 * 48)], 1)
    for image, boxes, labels in zip(found["image"], found["boxes"], found["label"]):
        inside = np.zeros((48, 48), bool)
        for (y0, x0, y1, x1), label in zip(boxes.astype(int), labels):
            if label:
                inside[y0:y1, x0:x1] = True
        # digits keep a margin of faint ink outside of their boxes
        away = ~inside
        for shift in (1, -1, 2, -2):
            away &= ~np.roll(inside, shift, 0) & ~np.roll(inside, shift, 1)
        flat = image[..., 0].astype(np.float64)
        quiet = away.ravel()
        fit, *_ = np.linalg.lstsq(plane[quiet], flat.ravel()[quiet], rcond=None)
        rest = np.abs(flat - (plane @ fit).reshape(48, 48))
        for (y0, x0, y1, x1), label in zip(boxes.astype(int), labels):
            if label:
                ink = rest[y0:y1, x0:x1] / rest[y0:y1, x0:x1].max()
                # every edge of the box touches ink
                edges = (ink[0], ink[-1], ink[:, 0], ink[:, -1])
                assert min(e.max() for e in edges) > 0.2
        assert rest[away].max() < 0.6 * rest[inside].max()
        assert (labels > 0).sum() >= 1


def test_labels_are_digits_and_boxes_apart():
    config = dataclasses.replace(CLEAN, classes=4)
    found = scenes.digit_scenes("validation", 30, config=config)
    assert set(np.unique(found["label"])) == {0, 1, 2, 3, 4}
    for boxes, labels in zip(found["boxes"], found["label"]):
        mask = np.zeros((48, 48), int)
        for (y0, x0, y1, x1), label in zip(boxes.astype(int), labels):
            if label:
                mask[y0:y1, x0:x1] += 1
        assert mask.max() == 1


def test_resize_is_bilinear():
    image = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    np.testing.assert_allclose(scenes.resize(image, 8, 8), image, atol=1e-6)
    half = scenes.resize(image, 4, 4)
    expected = image.reshape(4, 2, 4, 2).mean((1, 3))  # both neighbours weigh a half
    np.testing.assert_allclose(half, expected, atol=1e-6)
    assert scenes.ink_box(np.pad(np.ones((2, 3)), ((1, 4), (2, 2)))) == (1, 2, 3, 5)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="split is 'dev'"):
        scenes.digit_scenes("dev", 2)
    with pytest.raises(ValueError, match="must not be negative"):
        scenes.digit_scenes("train", 2, seed=-1)
    with pytest.raises(ValueError, match="do not fit"):
        scenes.SceneConfig(size=20)
    with pytest.raises(ValueError, match="objects must be"):
        scenes.SceneConfig(objects=(3, 2))
    with pytest.raises(ValueError, match="classes must be"):
        scenes.SceneConfig(classes=11)


def test_memory_loader_batches_and_position():
    arrays = {"image": np.arange(10), "label": -np.arange(10)}
    loader = MemoryLoader(arrays, batch_size=3, seed=1)
    assert loader.steps_per_epoch == 3
    seen = [next(loader) for _ in range(7)]
    for batch in seen:
        np.testing.assert_array_equal(batch["image"], -batch["label"])
    first = np.concatenate([b["image"] for b in seen[:3]])
    assert len(set(first.tolist())) == 9
    assert (first != np.concatenate([b["image"] for b in seen[3:6]])).any()
    np.testing.assert_array_equal(loader[4]["image"], seen[4]["image"])
    again = MemoryLoader(arrays, batch_size=3, seed=1)
    state = loader.get_state()
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["image"], next(loader)["image"])
    with pytest.raises(ValueError, match="seed 1 \\(here 2\\)"):
        MemoryLoader(arrays, batch_size=3, seed=2).set_state(state)
    with pytest.raises(ValueError, match="equally long"):
        MemoryLoader({"image": np.arange(3), "label": np.arange(4)}, batch_size=1)
    with pytest.raises(ValueError, match="there are 10"):
        MemoryLoader(arrays, batch_size=11)
    parts = in_order(arrays, 4)
    assert [len(p["image"]) for p in parts] == [4, 4, 2]
