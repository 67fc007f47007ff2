"""Boxes ``(y0, x0, y1, x1)`` in pixels, half-open: overlap, and their coding against anchors."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.typing import AnyArray

Boxes = Float[AnyArray, "*n 4"]
Spread = Float[AnyArray, "*#n 4"]
SCALES = (0.1, 0.1, 0.2, 0.2)
# an untrained network must not overflow exp: no box grows by more than this factor
_MAX_LOG = 4.135166556742356  # log(1000 / 16), as in Faster R-CNN's code


def box_area(boxes: Boxes) -> Float[Array, "*n"]:
    """Areas in pixels squared; a box that ends before it begins has none."""
    size = jnp.maximum(jnp.asarray(boxes)[..., 2:] - jnp.asarray(boxes)[..., :2], 0.0)
    return size[..., 0] * size[..., 1]


@jax.jit
def box_iou(a: Float[AnyArray, "n 4"], b: Float[AnyArray, "m 4"]) -> Float[Array, "n m"]:
    """Intersection over union of every pair; 0 where both boxes are empty.

    Args:
      a: (n, 4).
      b: (m, 4).
    """
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    start = jnp.maximum(a[:, None, :2], b[None, :, :2])
    end = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    common = jnp.prod(jnp.maximum(end - start, 0.0), axis=-1)
    union = box_area(a)[:, None] + box_area(b)[None, :] - common
    return jnp.where(union > 0, common / jnp.where(union > 0, union, 1.0), 0.0)


def _centred(boxes: Array) -> tuple[Array, Array]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def encode_boxes(
    boxes: Spread, anchors: Spread, *, scales: Sequence[float] = SCALES
) -> Float[Array, "... 4"]:
    """What a detector regresses: centre offsets in anchor sizes and log size ratios.

    ``((cy - ay) / ah / s0, (cx - ax) / aw / s1, log(h / ah) / s2, log(w / aw) / s3)``. A box
    without extent (padding) is coded as if it were a thousandth of a pixel: finite, to be masked.

    Args:
      boxes: (..., 4).
      anchors: (..., 4), of positive size; one for each box, or so that they broadcast.
      scales: s, which bring the four numbers to about unit variance.

    Reference:
      Ren et al., "Faster R-CNN", NIPS 2015, arXiv 1506.01497, equation 2; the scales are SSD's
      "variances" (arXiv 1512.02325, authors' code).
    """
    centre, size = _centred(jnp.asarray(boxes, jnp.float32))
    anchor_centre, anchor_size = _centred(jnp.asarray(anchors, jnp.float32))
    offset = (centre - anchor_centre) / anchor_size
    ratio = jnp.log(jnp.maximum(size, 1e-3) / anchor_size)
    return jnp.concatenate([offset, ratio], axis=-1) / jnp.asarray(scales, jnp.float32)


def decode_boxes(
    deltas: Spread, anchors: Spread, *, scales: Sequence[float] = SCALES
) -> Float[Array, "... 4"]:
    """The inverse of `encode_boxes`; sizes are capped at 62.5 anchor sizes.

    Args:
      deltas: (..., 4).
      anchors: (..., 4), one for each, or so that they broadcast.
      scales: as in the coding.
    """
    deltas = jnp.asarray(deltas, jnp.float32) * jnp.asarray(scales, jnp.float32)
    anchor_centre, anchor_size = _centred(jnp.asarray(anchors, jnp.float32))
    centre = anchor_centre + deltas[..., :2] * anchor_size
    half = 0.5 * anchor_size * jnp.exp(jnp.minimum(deltas[..., 2:], _MAX_LOG))
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def clip_boxes(boxes: Boxes, height: float | int, width: float | int) -> Float[Array, "... 4"]:
    """Boxes cut at the image's edges."""
    end = jnp.asarray([height, width, height, width], jnp.float32)
    return jnp.clip(jnp.asarray(boxes, jnp.float32), 0.0, end)
