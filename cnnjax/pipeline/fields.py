"""What a model's configuration takes over from the data."""

from __future__ import annotations

from typing import Any

from cnnjax import models
from cnnjax.pipeline.config import DataConfig, ModelSpec


def image_shape(config: DataConfig, described: Any) -> tuple[int, int, int]:
    """``(height, width, channels)`` of the images that a network sees in evaluation."""
    height, width = config.augment.out_size(described.image_shape, train=False)
    return height, width, described.image_shape[2]


def model_fields(spec: ModelSpec, config: DataConfig, described: Any) -> dict[str, Any]:
    """The model's fields, completed from the data.

    Args:
      spec: the model.
      config: the images.
      described: ``cnnjax.data.info`` of them.
    """
    height, width, channels = image_shape(config, described)
    known = vars(models.config(spec.name))
    fields: dict[str, Any] = {"num_classes": described.num_classes, "in_channels": channels}
    if "image_size" in known and height == width:
        fields["image_size"] = height
    return {k: v for k, v in fields.items() if k in known} | dict(spec.fields)
