"""Augmentation on whole batches in numpy; every random choice comes from one table of uniforms.

A batch's table ``u`` has one row of `COLUMNS` numbers in [0, 1) per image. So the result depends
on the seed, the epoch and the image's place in the global batch, never on the number of hosts or
workers, and each operation can be checked by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Shaped, UInt8

from cnnjax.data.augment import Augment

# columns of the table of uniforms
FLIP, DY, DX, BRIGHTNESS, CONTRAST, SATURATION, LIGHTING = 0, 1, 2, 3, 4, 5, slice(6, 9)
CROP_Y, CROP_X, CROP_TRIES = 10, 11, slice(12, 32)
COLUMNS = 32

# eigenvalues (square roots) and eigenvectors of ImageNet's RGB covariance, Krizhevsky et al. 2012
_EIGVAL = np.array([55.46, 4.794, 1.148], np.float32)
_EIGVEC = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
    np.float32,
)
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def crop_flip(
    padded: Shaped[np.ndarray, "n height width c"],
    rows: Int[np.ndarray, " b"],
    top: Int[np.ndarray, " b"],
    left: Int[np.ndarray, " b"],
    flip: Bool[np.ndarray, " b"],
    size: tuple[int, int],
) -> Shaped[np.ndarray, "b h w c"]:
    """Cuts one window out of each of some images, mirrored where asked.

    Args:
      padded: ``(n, height, width, channels)``, contiguous, any dtype.
      rows: int ``(b,)``, which image each window comes from.
      top: int ``(b,)``, the window's first row.
      left: int ``(b,)``, the window's first column.
      flip: bool ``(b,)``.
      size: ``(height, width)`` of the window.

    Returns:
      A new array ``(b, *size, channels)``.
    """
    n, height, width, channels = padded.shape
    h, w = size
    # windows of w * channels contiguous bytes: one gather copies whole image rows
    windows = np.lib.stride_tricks.sliding_window_view(
        padded.reshape(n, height, width * channels), w * channels, axis=2
    )[:, :, ::channels]
    out = windows[rows[:, None], top[:, None] + np.arange(h), left[:, None]]
    # one item per pixel: reversing those is much faster than reversing rows of 3 numbers
    pixel = out.reshape(len(rows), h, w * channels).view(f"V{channels * out.itemsize}")
    mirrored = np.flatnonzero(flip)
    if mirrored.size:
        pixel[mirrored] = pixel[mirrored][:, :, ::-1]
    return out.reshape(len(rows), h, w, channels)


def pad_images(
    images: Shaped[np.ndarray, "n height width c"], augment: Augment
) -> Shaped[np.ndarray, "n h w c"]:
    """Pads ``(n, height, width, channels)`` by ``augment.pad`` on every side."""
    if not augment.pad:
        return images
    widths = ((0, 0), (augment.pad,) * 2, (augment.pad,) * 2, (0, 0))
    if augment.pad_mode == "reflect":
        return np.pad(images, widths, mode="reflect")
    return np.pad(images, widths, constant_values=augment.pad_value)


def offsets(u: Float[np.ndarray, " b"], room: int) -> Int[np.ndarray, " b"]:
    """Uniform integers in ``0..room`` from uniforms in [0, 1)."""
    return (u * (room + 1)).astype(np.intp)


def random_box(
    u: Float[np.ndarray, " columns"], height: int, width: int, area: Sequence[float]
) -> tuple[int, int, int, int]:
    """The window of a random resized crop.

    Args:
      u: one row of the table of uniforms.
      height: of the image.
      width: of the image.
      area: ``(min, max)`` share of the image's area.

    Returns:
      ``(left, top, right, bottom)``.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for a, r in u[CROP_TRIES].reshape(-1, 2):
        target = height * width * (area[0] + a * (area[1] - area[0]))
        ratio = math.exp(low + r * (high - low))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(u[CROP_Y] * (height - h + 1)), int(u[CROP_X] * (width - w + 1))
            return left, top, left + w, top + h
    # the largest centre crop with an allowed ratio
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resample(
    image: np.ndarray, box: tuple[int, int, int, int] | None, size: tuple[int, int]
) -> np.ndarray:
    """Resizes a window of a uint8 image ``(h, w, c)`` to ``size`` (bilinear, antialiased)."""
    from PIL import Image

    channels = image.shape[-1]
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    out = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box))
    return out.reshape(*size, channels)


def shrink(image: np.ndarray, shorter: int) -> np.ndarray:
    """Scales a uint8 image ``(h, w, c)`` so that its shorter side has so many pixels."""
    height, width = image.shape[:2]
    scale = shorter / min(height, width)
    size = max(shorter, round(height * scale)), max(shorter, round(width * scale))
    return image if size == (height, width) else resample(image, None, size)


def geometry(
    images: UInt8[np.ndarray, "n height width c"],
    rows: Int[np.ndarray, " b"],
    u: Any,
    augment: Augment,
    size: Any,
    *,
    train: bool,
    padded: bool = False,
) -> UInt8[np.ndarray, "b h w c"]:
    """Crop and flip of a batch of equally large images.

    Args:
      images: uint8 ``(n, height, width, channels)``.
      rows: int ``(b,)``, the images of this batch.
      u: ``(b, COLUMNS)`` uniforms; not read in evaluation.
      augment: what to do; resizing is over already.
      size: ``(height, width)`` of the output.
      train: random crop and flip; otherwise the centre.
      padded: ``images`` are padded already.

    Returns:
      uint8 ``(b, *size, channels)``.
    """
    if not train:
        top, left = ((images.shape[1 + i] - size[i]) // 2 for i in (0, 1))
        return images[rows, top : top + size[0], left : left + size[1]]
    if not padded and augment.pad:
        images, rows = pad_images(images[rows], augment), np.arange(len(rows))
    room = images.shape[1] - size[0], images.shape[2] - size[1]
    flip = (u[:, FLIP] < 0.5) if augment.flip else np.zeros(len(rows), bool)
    if room == (0, 0) and not augment.flip:
        return images[rows]
    top, left = offsets(u[:, DY], room[0]), offsets(u[:, DX], room[1])
    return crop_flip(images, rows, top, left, flip, size)


def pixels(
    images: UInt8[np.ndarray, "b h w c"], u: Any, augment: Augment, *, train: bool
) -> Float32[np.ndarray, "b h w c"]:
    """Colour jitter (training) and normalisation.

    Args:
      images: uint8 ``(b, height, width, channels)``.
      u: ``(b, COLUMNS)`` uniforms; not read in evaluation.
      augment: what to do.
      train: whether colour jitter acts.

    Returns:
      float32, same shape: ``(pixel / 255 - mean) / std``.
    """
    if train and (augment.brightness or augment.contrast or augment.saturation or augment.lighting):
        images = _jitter(images.astype(np.float32), u, augment)
    b, height, width, channels = images.shape
    std = np.asarray(augment.std or (1.0,) * channels, np.float64)
    mean = np.asarray(augment.mean or (0.0,) * channels, np.float64)
    # whole image rows as the inner loop: a loop over 3 channels is much slower
    scale = np.tile((1.0 / (255.0 * std)).astype(np.float32), width)
    out = np.multiply(images.reshape(b, height, width * channels), scale, dtype=np.float32)
    if augment.mean:
        out -= np.tile((mean / std).astype(np.float32), width)
    return out.reshape(b, height, width, channels)


def _jitter(x: np.ndarray, u: np.ndarray, augment: Augment) -> np.ndarray:
    """Brightness, contrast, saturation in this order, clipped to 0..255 after each; then PCA."""

    def factor(column: int, strength: float) -> np.ndarray:
        f = 1.0 + strength * (2.0 * u[:, column] - 1.0)
        return f.astype(np.float32)[:, None, None, None]

    def grey(images: np.ndarray) -> np.ndarray:
        return images @ _GREY[:, None] if images.shape[-1] == 3 else images

    if augment.brightness:
        x = np.clip(x * factor(BRIGHTNESS, augment.brightness), 0, 255)
    if augment.contrast:
        middle = grey(x).mean((1, 2, 3), keepdims=True)
        x = np.clip(middle + factor(CONTRAST, augment.contrast) * (x - middle), 0, 255)
    if augment.saturation:
        middle = grey(x)
        x = np.clip(middle + factor(SATURATION, augment.saturation) * (x - middle), 0, 255)
    if augment.lighting:
        from scipy.special import ndtri

        # 0 would give -infinity
        normal = ndtri(np.clip(u[:, LIGHTING], 1e-7, 1 - 1e-7)).astype(np.float32)
        shift = (augment.lighting * normal * _EIGVAL) @ _EIGVEC.T
        x = x + shift[:, None, None, :]
    return x


def soft_labels(
    labels: Int[np.ndarray, " n"], classes: int, smoothing: float
) -> Float32[np.ndarray, "n classes"]:
    """One-hot rows with ``smoothing`` of the weight spread evenly over all classes.

    Returns:
      float32 ``(n, classes)``; rows sum to 1.
    """
    out = np.full((len(labels), classes), smoothing / classes, np.float32)
    out[np.arange(len(labels)), labels] += 1.0 - smoothing
    return out


def mix(x: Float32[np.ndarray, "n ..."], weight: float) -> Float32[np.ndarray, "n ..."]:
    """Mixes rows 0 and 1, 2 and 3, ...: ``weight * own + (1 - weight) * partner``.

    Args:
      x: ``(n, ...)`` with n even.
      weight: in [0, 1].
    """
    pairs = x.reshape(-1, 2, *x.shape[1:])
    w = np.float32(weight)
    return (w * pairs + (np.float32(1) - w) * pairs[:, ::-1]).reshape(x.shape)
