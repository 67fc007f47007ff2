"""The anchor grid of a feature map, and the layout of a detector's raw output."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.typing import AnyArray


def anchor_grid(
    image_size: tuple[int, int],
    map_size: tuple[int, int],
    sizes: Sequence[float],
    ratios: Sequence[float] = (1.0,),
) -> Float[np.ndarray, "a 4"]:
    """Anchors of every cell of a feature map: ``(y0, x0, y1, x1)`` in pixels, not clipped.

    An anchor of size s and ratio r is ``s sqrt(r)`` high and ``s / sqrt(r)`` wide, centred in its
    cell. The order is row, column, size, ratio, as a convolution's output reshapes.

    Args:
      image_size: (height, width) in pixels.
      map_size: (rows, columns) of the feature map.
      sizes: square roots of the areas, in pixels.
      ratios: height over width.

    Raises:
      ValueError: no sizes or ratios, or numbers that are not positive.
    """
    for name, values in (("sizes", sizes), ("ratios", ratios), ("map_size", map_size)):
        if not len(values) or not min(values) > 0:
            raise ValueError(f"{name} must be positive numbers, at least one, got {values!r}")
    centres = [
        (np.arange(n, dtype=np.float64) + 0.5) * (full / n)
        for full, n in zip(image_size, map_size, strict=True)
    ]
    shape = np.array([(s * np.sqrt(r), s / np.sqrt(r)) for s in sizes for r in ratios], np.float64)
    y, x = np.meshgrid(*centres, indexing="ij")
    centre = np.stack([y, x], -1)[:, :, None, :]
    boxes = np.concatenate([centre - shape / 2, centre + shape / 2], axis=-1)
    return boxes.reshape(-1, 4).astype(np.float32)


def split_output(
    raw: Float[AnyArray, "*n out"],
) -> tuple[Float[Array, "*n classes"], Float[Array, "*n 4"]]:
    """A detector's raw output as ``(class logits, box deltas)`` of every anchor, in float32.

    Args:
      raw: (..., 1 + classes + 4): logits with the background at index 0, then the four deltas. One
        array, so that whatever takes a network's logits (teachers, caches of their outputs, the
        graph's reader) takes a detector.

    Raises:
      ValueError: fewer than 6 numbers for each anchor.
    """
    if raw.shape[-1] < 6:
        raise ValueError(
            f"a detector gives background, classes and 4 deltas for each anchor, got {raw.shape}"
        )
    raw = jnp.asarray(raw, jnp.float32)
    return raw[..., :-4], raw[..., -4:]
