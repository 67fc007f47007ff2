"""What happens to an image between the disk and the network, as a frozen record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


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

    size: int | Sequence[int] | None = None
    pad: int = 0
    pad_mode: str = "constant"
    pad_value: int = 0
    flip: bool = False
    random_resized_crop: Sequence[float] | None = None
    resize: int | None = None
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    lighting: float = 0.0
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
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
        size: Any = (height, width) if self.size is None else self.size
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
        _check(self.size is not None or self.resize is None, "resize needs an output size")
        random_resized = train and self.random_resized_crop is not None
        if not random_resized:
            if self.resize is not None:
                _check(max(size) <= self.resize, f"size {size} is larger than resize {self.resize}")
                height = width = self.resize
            assert height is not None  # checked above
            assert width is not None
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
