"""A single-stage detector with a region-proposal head on any backbone of the registry.

The head is that of Faster R-CNN's proposal network (Ren et al., NIPS 2015, arXiv 1506.01497,
section 3.1): one 3x3 convolution, then two 1x1 convolutions for the classes and the boxes of every
anchor. Here the classes are the objects' own (as in SSD, arXiv 1512.02325), so there is no second
stage.

A detector is not in the registry, whose networks all give (N, classes): build it with
`make_detector`, and save it with
``cnnjax.save(path, model, factory=make_detector, kwargs={...})``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cnnjax.detection import anchor_grid
from cnnjax.models import blocks, init, registry


class Detector(nnx.Module):
    """``model(images)`` -> (n, anchors, 1 + classes + 4): logits, background first, and deltas.

    See `cnnjax.detection.split_output` and `cnnjax.detection.detections_of`.

    Args:
      backbone: a network whose call takes ``return_features``.
      feature: the map of it that the head looks at.
      channels: of that map.
      stride: pixels of the image for each of its cells.
      num_classes: of objects, the background not counted.
      sizes: of the anchors, in pixels.
      ratios: of the anchors, height over width.
      width: channels of the head's 3x3 convolution.
      rngs: initialisation.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        feature: str,
        channels: int,
        stride: int,
        num_classes: int,
        sizes: Sequence[float],
        ratios: Sequence[float],
        width: int,
        rngs: nnx.Rngs,
    ):
        self.feature, self.stride, self.num_classes = feature, stride, num_classes
        self.sizes, self.ratios = tuple(map(float, sizes)), tuple(map(float, ratios))
        each = len(self.sizes) * len(self.ratios)
        self.backbone = backbone
        self.conv = blocks.conv(channels, width, 3, use_bias=True, rngs=rngs)
        last: Any = {"use_bias": True, "kernel_init": init.normal(0.01), "rngs": rngs}
        self.classes = blocks.conv(width, each * (1 + num_classes), 1, **last)
        self.boxes = blocks.conv(width, each * 4, 1, **last)

    def anchors(self, image_size: Sequence[int]) -> Float[np.ndarray, "a 4"]:
        """The anchors of the rows of the output, for images of (height, width)."""
        return _anchors(tuple(image_size), self.stride, self.sizes, self.ratios)

    def __call__(self, x: Any) -> Float[Array, "n a out"]:
        """(N, H, W, C) -> (N, anchors, 1 + classes + 4).

        Raises:
          ValueError: an image whose size does not fit the stride's grid of anchors.
        """
        _, features = self.backbone(x, return_features=self.feature)
        y = jax.nn.relu(self.conv(features[self.feature]))
        rows = len(self.anchors(x.shape[1:3]))
        cells = y.shape[1] * y.shape[2] * len(self.sizes) * len(self.ratios)
        if cells != rows:
            raise ValueError(
                f"images {tuple(x.shape)} give a map {tuple(y.shape)}, which is not one cell for "
                f"every {self.stride} pixels: use sizes that are multiples of it"
            )
        n = x.shape[0]
        logits = self.classes(y).reshape(n, rows, 1 + self.num_classes)
        return jnp.concatenate([logits, self.boxes(y).reshape(n, rows, 4)], axis=-1)


@functools.lru_cache(maxsize=64)
def _anchors(
    size: tuple[int, ...], stride: int, sizes: tuple[float, ...], ratios: tuple[float, ...]
) -> np.ndarray:
    cells = (-(-size[0] // stride), -(-size[1] // stride))
    grid = anchor_grid((cells[0] * stride, cells[1] * stride), cells, sizes, ratios)
    grid.setflags(write=False)
    return grid


def make_detector(
    backbone: str,
    *,
    feature: str,
    image_size: Sequence[int],
    num_classes: int,
    sizes: Sequence[float],
    ratios: Sequence[float] = (1.0,),
    width: int | None = None,
    fields: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs,
) -> Detector:
    """A detector with fresh parameters.

    The backbone's own classifier is made with one class and takes no part: compilation drops it.

    Args:
      backbone: a registry name.
      feature: name of one of its maps, see ``cnnjax.models.blocks.Model``.
      image_size: (height, width) of typical images, from which the map's stride is read.
      num_classes: of objects.
      sizes: of the anchors, in pixels.
      ratios: of the anchors, height over width.
      width: channels of the head's 3x3 convolution; None: as many as the map has.
      fields: of the backbone, e.g. ``{"widths": (8, 16, 32), "in_channels": 1}``.
      rngs: initialisation.

    Raises:
      ValueError: an unknown backbone or feature, or a feature that is no map of the image.
    """
    fields = {"num_classes": 1, **dict(fields or {})}
    network = registry.create(backbone, rngs=rngs, **fields)
    graphdef, state = nnx.split(network)
    image = jax.ShapeDtypeStruct((1, *image_size, network.config.in_channels), jnp.float32)
    shape = jax.eval_shape(
        lambda s, x: nnx.merge(graphdef, s, copy=True)(x, return_features=feature)[1][feature],
        state,
        image,
    ).shape
    stride = image_size[0] // shape[1] if len(shape) == 4 else 0
    if not stride or (stride * shape[1], stride * shape[2]) != tuple(image_size):
        raise ValueError(
            f"feature {feature!r} of {backbone!r} is {shape} for images {tuple(image_size)}: an "
            "anchor head needs a map whose size divides the image's, by the same stride both ways"
        )
    return Detector(
        network,
        feature=feature,
        channels=shape[3],
        stride=stride,
        num_classes=num_classes,
        sizes=sizes,
        ratios=ratios,
        width=shape[3] if width is None else width,
        rngs=rngs,
    )
