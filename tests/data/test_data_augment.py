"""Augmentation against plain per-image transcriptions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnnjax.data import Augment, transforms


def uniforms(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).random((n, transforms.COLUMNS))


def images(seed: int, n: int, h: int, w: int, c: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


def crop_by_hand(image, u, augment, size):
    """Pixel by pixel: where does each output pixel come from?"""
    h, w, c = image.shape
    out = np.empty((*size, c), np.uint8)
    top = math.floor(u[1] * (h + 2 * augment.pad - size[0] + 1)) - augment.pad
    left = math.floor(u[2] * (w + 2 * augment.pad - size[1] + 1)) - augment.pad
    mirrored = augment.flip and u[0] < 0.5
    for y in range(size[0]):
        for x in range(size[1]):
            sy = top + y
            sx = left + (size[1] - 1 - x if mirrored else x)
            if augment.pad_mode == "reflect":
                sy = -sy if sy < 0 else 2 * (h - 1) - sy if sy >= h else sy
                sx = -sx if sx < 0 else 2 * (w - 1) - sx if sx >= w else sx
            inside = 0 <= sy < h and 0 <= sx < w
            out[y, x] = image[sy, sx] if inside else augment.pad_value
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    h=st.integers(3, 7),
    w=st.integers(3, 7),
    c=st.sampled_from([1, 3]),
    pad=st.integers(0, 2),
    mode=st.sampled_from(["constant", "reflect"]),
    flip=st.booleans(),
    smaller=st.integers(0, 2),
    padded=st.booleans(),
)
def test_pad_crop_flip(seed, h, w, c, pad, mode, flip, smaller, padded):
    size = (h - smaller, w)
    augment = Augment(size=size, pad=pad, pad_mode=mode, pad_value=7, flip=flip)
    assert augment.out_size((h, w, c), train=True) == size
    x, u = images(seed, 4, h, w, c), uniforms(seed, 6)
    rows = np.array([3, 0, 1, 1, 2, 0])
    source = transforms.pad_images(x, augment) if padded else x
    got = transforms.geometry(source, rows, u, augment, size, train=True, padded=padded)
    want = np.stack([crop_by_hand(x[r], v, augment, size) for r, v in zip(rows, u)])
    np.testing.assert_array_equal(got, want)


def test_every_offset_and_both_mirrors_occur():
    x = np.arange(25, dtype=np.uint8).reshape(1, 5, 5, 1)
    augment = Augment(pad=1, flip=True)
    got = transforms.geometry(
        x, np.zeros(2000, np.intp), uniforms(0, 2000), augment, (5, 5), train=True
    )
    kinds, counts = np.unique(got.reshape(2000, -1), axis=0, return_counts=True)
    assert len(kinds) == 9 * 2
    assert counts.min() > 2000 / 18 * 0.6
    assert counts.max() < 2000 / 18 * 1.5


def test_evaluation_takes_the_centre_and_no_chance():
    augment = Augment(size=4, pad=2, flip=True, brightness=0.5, mean=(0.5,), std=(0.25,))
    x = images(0, 3, 6, 8, 1)
    got = transforms.geometry(x, np.arange(3), None, augment, (4, 4), train=False)
    np.testing.assert_array_equal(got, x[:, 1:5, 2:6])
    y = transforms.pixels(got, None, augment, train=False)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, (x[:, 1:5, 2:6] / 255.0 - 0.5) / 0.25, atol=1e-5)


def test_normalisation_per_channel():
    x = images(1, 2, 3, 5, 3)
    augment = Augment(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    want = (x / 255.0 - np.array(augment.mean)) / np.array(augment.std)
    np.testing.assert_allclose(transforms.pixels(x, None, augment, train=True), want, atol=2e-6)


def jitter_by_hand(image, u, augment):
    """One image in float64, pixel formulas written out."""
    x = image.astype(np.float64)
    x = np.clip(x * (1 - augment.brightness + 2 * augment.brightness * u[3]), 0, 255)
    grey = 0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]
    f = 1 - augment.contrast + 2 * augment.contrast * u[4]
    x = np.clip(f * x + (1 - f) * grey.mean(), 0, 255)
    grey = 0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]
    f = 1 - augment.saturation + 2 * augment.saturation * u[5]
    return np.clip(f * x + (1 - f) * grey[..., None], 0, 255)


def test_colour_jitter():
    x, u = images(2, 5, 4, 6, 3), uniforms(2, 5)
    augment = Augment(brightness=0.4, contrast=0.3, saturation=0.5)
    want = np.stack([jitter_by_hand(i, v, augment) for i, v in zip(x, u)]) / 255
    np.testing.assert_allclose(transforms.pixels(x, u, augment, train=True), want, atol=1e-5)


def test_lighting_has_imagenets_covariance():
    x = np.full((20000, 1, 1, 3), 100, np.uint8)
    augment = Augment(lighting=0.1)
    y = transforms.pixels(x, uniforms(3, 20000), augment, train=True)[:, 0, 0] * 255 - 100
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    want = vectors @ np.diag((0.1 * np.array([55.46, 4.794, 1.148])) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(y.T), want, rtol=0.06, atol=0.05)


@pytest.mark.parametrize("shape", [(60, 80), (100, 20), (8, 8)])
def test_random_box_lies_inside_with_the_asked_area_and_ratio(shape):
    h, w = shape
    shares, fallback = [], 0
    for u in uniforms(4, 400):
        left, top, right, bottom = transforms.random_box(u, h, w, (0.3, 0.9))
        assert 0 <= left < right <= w
        assert 0 <= top < bottom <= h
        bw, bh = right - left, bottom - top
        if (bh, bw) == (min(h, round(w * 4 / 3)), min(w, round(h * 4 / 3))):
            fallback += 1
            continue
        shares.append(bw * bh / (w * h))
        rounding = 0.5 / min(bw, bh) * 3
        assert 3 / 4 * (1 - rounding) <= bw / bh <= 4 / 3 * (1 + rounding)
    if shape == (100, 20):  # no window of 30 % fits: the largest centre crop
        assert fallback == 400
    else:
        assert fallback < 40
        assert min(shares) < 0.45
        assert max(shares) > 0.75


def test_resample_is_pillows_and_shrink_keeps_the_ratio():
    x = images(5, 1, 10, 14, 3)[0]
    want = np.asarray(Image.fromarray(x[2:8, 1:9]).resize((4, 5), Image.Resampling.BILINEAR))
    got = transforms.resample(x[2:8, 1:9], None, (5, 4))
    np.testing.assert_array_equal(got, want)
    assert transforms.resample(x, (1, 2, 9, 8), (5, 4)).shape == (5, 4, 3)
    assert transforms.shrink(x, 5).shape == (5, 7, 3)
    assert transforms.shrink(x, 10) is x


def test_soft_labels_and_mixup():
    labels = np.array([2, 0, 1, 1])
    soft = transforms.soft_labels(labels, 4, 0.1)
    want = np.eye(4)[labels] * 0.9 + 0.1 / 4
    np.testing.assert_allclose(soft, want, atol=1e-7)
    x = np.random.default_rng(0).random((4, 2, 2, 1)).astype(np.float32)
    got = transforms.mix(x, 0.7)
    for row, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
        np.testing.assert_allclose(got[row], 0.7 * x[row] + 0.3 * x[partner], atol=1e-6)
    np.testing.assert_allclose(transforms.mix(soft, 0.7).sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "shape", "told"),
    [
        ({"mean": (0.5,)}, (8, 8, 3), "mean has 1 values but the images have 3 channels"),
        ({"saturation": 0.2}, (8, 8, 1), "need 3 channels"),
        ({"size": 9}, (8, 8, 1), "does not fit into images 8x8"),
        ({"size": 12, "pad": 1}, (8, 8, 1), "padded by 1"),
        ({"pad": 8, "pad_mode": "reflect"}, (8, 8, 1), "cannot be reflected"),
        ({}, (None, None, 3), "give an output size"),
        ({"size": 8}, (None, None, 3), "give resize"),
        ({"size": 8, "resize": 7}, (None, None, 3), "larger than resize 7"),
        ({"resize": 7}, (8, 8, 3), "resize needs an output size"),
    ],
)
def test_an_augmentation_that_does_not_fit(fields, shape, told):
    with pytest.raises(ValueError, match=told):
        Augment(**fields).out_size(shape, train=True)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"pad": -1}, "pad must be >= 0, got -1"),
        ({"pad_mode": "wrap"}, "'wrap'"),
        ({"pad_value": 300}, "300"),
        ({"brightness": 1.5}, "brightness must be in"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"mixup": -1.0}, "mixup"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"random_resized_crop": (0.5, 0.2), "size": 4}, "0 < min <= max"),
        ({"random_resized_crop": (0.5, 1.0)}, "needs an output size"),
        ({"random_resized_crop": (0.5, 1.0), "size": 4, "pad": 1}, "cannot go together"),
    ],
)
def test_fields_out_of_range(fields, told):
    with pytest.raises(ValueError, match=told):
        Augment(**fields)


def test_lists_from_config_files_become_tuples():
    augment = Augment(size=[4, 4], mean=[0.5], std=[0.5], random_resized_crop=[0.1, 1.0])
    assert augment == Augment(size=4, mean=(0.5,), std=(0.5,), random_resized_crop=(0.1, 1.0))
    assert hash(augment)
