"""Scenes of handwritten digits for detection, generated from scikit-learn's digits: no files.

Several digits of different sizes, widths and brightness on a canvas with a gradient, clutter (cut
pieces of digits) and noise. A scene is a pure function of (split, seed, its number). The digits
of the training, validation and test scenes are different images, see `digit_rows`.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Float

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """What scenes look like.

    Attributes:
      size: height and width of the canvas in pixels.
      objects: least and greatest number of digits.
      scale: least and greatest height of a digit's 8x8 image in pixels.
      stretch: its width is its height times or divided by at most this.
      contrast: least and greatest brightness of a digit over its background.
      overlap: greatest share of a digit's box that another one's may cover.
      clutter: pieces of digits that are no objects.
      noise: standard deviation of the pixels' noise.
      classes: the digits 0 to classes - 1 occur; their class numbers are digit + 1.
    """

    size: int = 48
    objects: tuple[int, int] = (1, 4)
    scale: tuple[float, float] = (12.0, 22.0)
    stretch: float = 1.25
    contrast: tuple[float, float] = (0.35, 1.0)
    overlap: float = 0.15
    clutter: int = 3
    noise: float = 0.08
    classes: int = 10

    def __post_init__(self) -> None:
        low, high = self.objects
        if not 0 <= low <= high or high < 1:
            raise ValueError(f"objects must be (least, greatest), got {self.objects}")
        if not 2 <= self.scale[0] <= self.scale[1] or self.scale[1] * self.stretch > self.size:
            raise ValueError(
                f"digits of {self.scale} pixels, stretched by {self.stretch}, do not fit on a "
                f"canvas of {self.size}"
            )
        if not 1 <= self.classes <= 10:
            raise ValueError(f"classes must be 1 to 10, got {self.classes}")


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    raw = load_digits()
    return (raw.images / 16.0).astype(np.float32), np.asarray(raw.target, np.int32)


def digit_rows(split: str) -> np.ndarray:
    """Which of the 1,797 digits a split draws from: of every ten of a class, the tenth and fifth
    for test, the ninth and fourth for validation, the others for training.

    Raises:
      ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
    labels = _digits()[1]
    turn = np.zeros(len(labels), int)
    for digit in range(10):
        mine = np.flatnonzero(labels == digit)
        turn[mine] = np.arange(len(mine)) % 5
    wanted = {"train": turn < 3, "validation": turn == 3, "test": turn == 4}[split]
    return np.flatnonzero(wanted)


def resize(image: Float[np.ndarray, "h w"], height: int, width: int) -> np.ndarray:
    """Bilinear, pixel centres aligned, edges repeated."""

    def matrix(old: int, new: int) -> np.ndarray:
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.minimum(at.astype(int), old - 2)
        out = np.zeros((new, old), np.float32)
        out[np.arange(new), low] = 1 - (at - low)
        out[np.arange(new), low + 1] += at - low
        return out

    return matrix(image.shape[0], height) @ image @ matrix(image.shape[1], width).T


def ink_box(image: Float[np.ndarray, "h w"], level: float = 0.25) -> tuple[int, int, int, int]:
    """``(y0, x0, y1, x1)`` around the pixels above a share of the greatest, half-open."""
    ink = image > level * image.max()
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def digit_scenes(
    split: str, count: int, *, seed: int = 0, config: SceneConfig = SceneConfig()
) -> dict[str, np.ndarray]:
    """Scenes with their objects, the same for the same arguments.

    Args:
      split: ``"train"``, ``"validation"`` or ``"test"``: which digits occur.
      count: number of scenes; a longer set begins with a shorter one.
      seed: of the scenes.
      config: see `SceneConfig`.

    Returns:
      ``image`` float32 (count, size, size, 1) of about zero mean, ``boxes`` float32 (count, m, 4)
      ``(y0, x0, y1, x1)`` in pixels, ``label`` int32 (count, m), digit + 1 or 0 for padding; m is
      the greatest number of objects.

    Raises:
      ValueError: an unknown split, or a negative seed or count.
    """
    rows = digit_rows(split)
    rows = rows[_digits()[1][rows] < config.classes]
    if count < 0 or seed < 0:
        raise ValueError(f"count and seed must not be negative, got {count} and {seed}")
    size, most = config.size, config.objects[1]
    images = np.zeros((count, size, size, 1), np.float32)
    boxes = np.zeros((count, most, 4), np.float32)
    labels = np.zeros((count, most), np.int32)
    for i in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), i])
        images[i, :, :, 0], found = _scene(rng, rows, config)
        for j, (box, digit) in enumerate(found):
            boxes[i, j], labels[i, j] = box, digit + 1
    return {"image": images, "boxes": boxes, "label": labels}


def _scene(
    rng: np.random.Generator, rows: np.ndarray, c: SceneConfig
) -> tuple[np.ndarray, list[tuple[np.ndarray, int]]]:
    digits, labels = _digits()
    slope, ramp = rng.normal(0, 0.15, 2), np.linspace(-1, 1, c.size, dtype=np.float32)
    canvas = (slope[0] * ramp[:, None] + slope[1] * ramp[None, :]).astype(np.float32)

    def drawn() -> tuple[np.ndarray, int]:
        row = rows[rng.integers(len(rows))]
        height = rng.uniform(*c.scale)
        width = np.clip(height * c.stretch ** rng.uniform(-1, 1), 4, c.size)
        return resize(digits[row], round(height), round(width)), int(labels[row])

    for _ in range(c.clutter):
        image, _ = drawn()
        h, w = (max(3, int(n * rng.uniform(0.25, 0.5))) for n in image.shape)
        y, x = (rng.integers(n - k + 1) for n, k in zip(image.shape, (h, w)))
        at = rng.integers(c.size - h + 1), rng.integers(c.size - w + 1)
        patch = canvas[at[0] : at[0] + h, at[1] : at[1] + w]
        patch += rng.uniform(*c.contrast) * image[y : y + h, x : x + w]
    placed: list[tuple[np.ndarray, int]] = []
    for _ in range(rng.integers(c.objects[0], c.objects[1] + 1)):
        image, digit = drawn()
        ink = np.asarray(ink_box(image), np.float32)
        bright = rng.uniform(*c.contrast)
        for _ in range(20):  # places; the digit is left out where none is free
            at = [rng.integers(c.size - n + 1) for n in image.shape]
            box = ink + np.array([at[0], at[1], at[0], at[1]], np.float32)
            if all(_covered(box, other) <= c.overlap for other, _ in placed):
                patch = canvas[at[0] : at[0] + image.shape[0], at[1] : at[1] + image.shape[1]]
                patch += bright * image
                placed.append((box, digit))
                break
    canvas += rng.normal(0, c.noise, canvas.shape).astype(np.float32)
    return (canvas - 0.2) * 2.0, placed


def _covered(a: np.ndarray, b: np.ndarray) -> float:
    """Greatest share of either box that the other one covers."""
    side = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    least = min(np.prod(x[2:] - x[:2]) for x in (a, b))
    return float(np.prod(side) / least)
