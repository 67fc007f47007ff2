"""Object detection with anchors: boxes, matching, suppression, average precision, training.

Pure functions and no networks: a detector is `cnnjax.models.Detector` on any backbone of the
registry, learning from another one is `cnnjax.distillation.detection_distillation_loss`. Boxes are
``(y0, x0, y1, x1)`` in pixels, classes count from 1, 0 is the background or padding.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cnnjax.detection.anchors import anchor_grid, split_output
from cnnjax.detection.average_precision import (
    Evaluation,
    average_precision,
    coco_average_precision,
    mean_average_precision,
)
from cnnjax.detection.boxes import box_area, box_iou, clip_boxes, decode_boxes, encode_boxes
from cnnjax.detection.matching import (
    MatchConfig,
    Targets,
    assign_targets,
    background_score,
    match_one,
    sample_negatives,
)
from cnnjax.detection.nms import Detections, NmsConfig, detections_of, suppress

if TYPE_CHECKING:
    from cnnjax.detection.task import (
        AnchorBatch,
        anchor_batch,
        detection_loss,
        evaluate,
        label_scenes,
        make_detect_step,
    )

__all__ = [
    "AnchorBatch",
    "Detections",
    "Evaluation",
    "MatchConfig",
    "NmsConfig",
    "Targets",
    "anchor_batch",
    "anchor_grid",
    "assign_targets",
    "average_precision",
    "background_score",
    "box_area",
    "box_iou",
    "clip_boxes",
    "coco_average_precision",
    "decode_boxes",
    "detection_loss",
    "detections_of",
    "encode_boxes",
    "evaluate",
    "label_scenes",
    "make_detect_step",
    "match_one",
    "mean_average_precision",
    "sample_negatives",
    "split_output",
    "suppress",
]

# these train: what only describes boxes must not import the trainer
_TASK = (
    "AnchorBatch",
    "anchor_batch",
    "detection_loss",
    "evaluate",
    "label_scenes",
    "make_detect_step",
)


def __getattr__(name: str) -> Any:
    if name in _TASK:
        return getattr(importlib.import_module("cnnjax.detection.task"), name)
    raise AttributeError(f"module 'cnnjax.detection' has no attribute {name!r}")
