"""Augmentation on whole batches in numpy; every random choice comes from one table of uniforms.

A batch's table ``u`` has one row of `COLUMNS` numbers in [0, 1) per image. So the result depends
on the seed, the epoch and the image's place in the global batch, never on the number of hosts or
workers, and each operation can be checked by itself.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens between a stored image and the network. The random parts act in training only.

    Attributes:
      size: ``(height, width)`` of the output, or an int for a square; None keeps the stored size.
      pad: training: pad every side by so many pixels, then crop at random.
      pad_mode: ``"constant"`` (the value ``pad_value``) or ``"reflect"`` (edge not repeated).
      pad_value: 0..255.
      flip: training: mirror left-right with probability 1/2.
      random_resized_crop: training: ``(min, max)`` share of the area, e.g. ``(0.08, 1.0)``;
        aspect ratio 3/4..4/3; ten tries, then the largest centre crop (Szegedy et al. 2015).
      resize: evaluation (and training without ``random_resized_crop``): shorter side to so many
        pixels, before the crop to ``size``; None leaves images as they are.
      brightness: training: factor from ``[1 - b, 1 + b]``; then contrast, then saturation.
      contrast: likewise, around the image's mean grey.
      saturation: likewise, around each pixel's grey.
      lighting: training: standard deviation of the PCA noise on RGB (0.1 in AlexNet).
      mean: per channel, for pixels in 0..1; empty: no shift.
      std: per channel; empty: no scale.
      mixup: alpha of the Beta distribution (Zhang et al. 2018, 1710.09412); 0 is off. Rows 0 and 1,
        2 and 3, ... of a batch are mixed with each other, with one weight per batch.
      label_smoothing: share of the label spread evenly over all classes (Szegedy et al. 2016).
        With it or with mixup a training batch has ``soft_label``, float32 ``(n, classes)``.
    """

    size: int | tuple[int, int] | None = None
    pad: int = 0
    pad_mode: str = "constant"
    pad_value: int = 0
    flip: bool = False
    random_resized_crop: tuple[float, float] | None = None
    resize: int | None = None
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    lighting: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    mixup: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mean", "std", "random_resized_crop", "size"):  # config files hold lists
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.size, int):
            object.__setattr__(self, "size", (self.size, self.size))
        _check(self.pad >= 0, f"pad must be >= 0, got {self.pad}")
        _check(
            self.pad_mode in ("constant", "reflect"),
            f"pad_mode must be 'constant' or 'reflect', got {self.pad_mode!r}",
        )
        _check(0 <= self.pad_value <= 255, f"pad_value must be in 0..255, got {self.pad_value}")
        for name in ("brightness", "contrast", "saturation", "label_smoothing"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"{name} must be in [0, 1], got {value}")
        for name in ("lighting", "mixup"):
            _check(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")
        _check(all(s > 0 for s in self.std), f"std must be positive, got {self.std}")
        crop = self.random_resized_crop
        if crop is not None:
            _check(
                len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1,
                f"random_resized_crop must be (min, max) with 0 < min <= max <= 1, got {crop}",
            )
            _check(self.pad == 0, "random_resized_crop and pad cannot go together")
            _check(self.size is not None, "random_resized_crop needs an output size")

    @property
    def soft(self) -> bool:
        """Whether training batches carry soft labels."""
        return self.mixup > 0 or self.label_smoothing > 0

    def out_size(self, shape: tuple[int | None, int | None, int], *, train: bool) -> Any:
        """Checks that this augmentation fits images of a shape.

        Args:
          shape: stored ``(height, width, channels)``; None where it varies.
          train: whether the random parts act.

        Returns:
          ``(height, width)`` of the output.

        Raises:
          ValueError: it does not fit.
        """
        height, width, channels = shape
        for name in ("mean", "std"):
            given = len(getattr(self, name))
            _check(
                given in (0, channels),
                f"{name} has {given} values but the images have {channels} channels",
            )
        if train and (self.saturation or self.lighting):
            _check(channels == 3, f"saturation and lighting need 3 channels, got {channels}")
        if height is None or width is None:
            _check(self.size is not None, "the images differ in size: give an output size")
            _check(
                self.resize is not None or (train and self.random_resized_crop is not None),
                "the images differ in size: give resize (the shorter side)",
            )
        if self.size is None:
            _check(self.resize is None, "resize needs an output size")
            size = (height, width)
        else:
            size = self.size
        random_resized = train and self.random_resized_crop is not None
        if not random_resized:
            if self.resize is not None:
                _check(max(size) <= self.resize, f"size {size} is larger than resize {self.resize}")
                height = width = self.resize
            room = 2 * self.pad if train else 0
            _check(
                size[0] <= height + room and size[1] <= width + room,
                f"size {size} does not fit into images {height}x{width}"
                + (f" padded by {self.pad}" if room else "")
                + "; give resize or random_resized_crop to enlarge them",
            )
            if train and self.pad and self.pad_mode == "reflect":
                _check(
                    self.pad < min(height, width),
                    f"pad {self.pad} cannot be reflected in images {height}x{width}",
                )
        return size


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(f"augmentation: {message}")


def crop_flip(
    padded: np.ndarray,
    rows: np.ndarray,
    top: np.ndarray,
    left: np.ndarray,
    flip: np.ndarray,
    size: tuple[int, int],
) -> np.ndarray:
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
    out = out.reshape(len(rows), h, w, channels)
    mirrored = np.flatnonzero(flip)
    if mirrored.size:
        out[mirrored] = out[mirrored, :, ::-1]
    return out


def pad_images(images: np.ndarray, augment: Augment) -> np.ndarray:
    """Pads ``(n, height, width, channels)`` by ``augment.pad`` on every side."""
    if not augment.pad:
        return images
    widths = ((0, 0), (augment.pad,) * 2, (augment.pad,) * 2, (0, 0))
    if augment.pad_mode == "reflect":
        return np.pad(images, widths, mode="reflect")
    return np.pad(images, widths, constant_values=augment.pad_value)


def offsets(u: np.ndarray, room: int) -> np.ndarray:
    """Uniform integers in ``0..room`` from uniforms in [0, 1)."""
    return (u * (room + 1)).astype(np.intp)


def random_box(
    u: np.ndarray, height: int, width: int, area: tuple[float, float]
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


def resample(image: np.ndarray, box: tuple[float, ...] | None, size: tuple[int, int]) -> np.ndarray:
    """Resizes a window of a uint8 image ``(h, w, c)`` to ``size`` (bilinear, antialiased)."""
    from PIL import Image

    channels = image.shape[-1]
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    out = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR, box=box))
    return out.reshape(*size, channels)


def short_side(height: int, width: int, target: int) -> tuple[int, int]:
    """``(height, width)`` after scaling the shorter side to ``target``."""
    scale = target / min(height, width)
    return max(target, round(height * scale)), max(target, round(width * scale))


def one(image: np.ndarray, u: np.ndarray, augment: Augment, size: Any, *, train: bool) -> Any:
    """Geometry of a single image of any size, for images that do not share one shape.

    Args:
      image: uint8 ``(height, width, channels)``.
      u: its row of the table of uniforms.
      augment: what to do.
      size: ``(height, width)`` of the output.
      train: whether the random parts act.

    Returns:
      uint8 ``(*size, channels)``.
    """
    if train and augment.random_resized_crop is not None:
        box = random_box(u, image.shape[0], image.shape[1], augment.random_resized_crop)
        image = resample(image, box, size)
    elif augment.resize is not None:
        image = resample(image, None, short_side(image.shape[0], image.shape[1], augment.resize))
    return geometry(image[None], np.zeros(1, np.intp), u[None], augment, size, train=train)[0]


def geometry(
    images: np.ndarray,
    rows: np.ndarray,
    u: np.ndarray,
    augment: Augment,
    size: Any,
    *,
    train: bool,
    padded: bool = False,
) -> np.ndarray:
    """Crop and flip of a batch of equally large images.

    Args:
      images: uint8 ``(n, height, width, channels)``.
      rows: int ``(b,)``, the images of this batch.
      u: ``(b, COLUMNS)`` uniforms.
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


def pixels(images: np.ndarray, u: np.ndarray, augment: Augment, *, train: bool) -> np.ndarray:
    """Colour jitter (training) and normalisation.

    Args:
      images: uint8 ``(b, height, width, channels)``.
      u: ``(b, COLUMNS)`` uniforms.
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


def soft_labels(labels: np.ndarray, classes: int, smoothing: float) -> np.ndarray:
    """One-hot rows with ``smoothing`` of the weight spread over all classes: float32 (n, classes)."""
    out = np.full((len(labels), classes), smoothing / classes, np.float32)
    out[np.arange(len(labels)), labels] += 1.0 - smoothing
    return out


def mix(x: np.ndarray, weight: float) -> np.ndarray:
    """Mixes rows 0 and 1, 2 and 3, ...: ``weight * own + (1 - weight) * partner``; n must be even."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    w = np.float32(weight)
    return (w * pairs + (np.float32(1) - w) * pairs[:, ::-1]).reshape(x.shape)
