"""Mean average precision: VOC (all points, 11 points) and COCO-like (101 points, ten thresholds).

On the host in numpy: the detections of a whole test set are ranked together, once a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

INTERPOLATIONS = ("all", "11", "101")
COCO_THRESHOLDS = tuple(np.round(np.arange(0.5, 1.0, 0.05), 2).tolist())


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of `mean_average_precision`.

    Attributes:
      mean: over the classes that occur in the truth.
      classes: AP by class number; NaN for a class that does not occur.
      objects: number of objects by class number.
    """

    mean: float
    classes: dict[int, float]
    objects: dict[int, int]


def average_precision(
    hits: Bool[np.ndarray, " k"], objects: int, interpolation: str = "all"
) -> float:
    """Area under the precision-recall curve of ranked detections.

    Args:
      hits: (k,) whether each detection is right, the most confident first.
      objects: number of objects to be found.
      interpolation: ``"all"``: precision made monotone, summed over every step of the recall
        (VOC 2010 on); ``"11"``: mean of the best precision at recall >= 0, 0.1, .. 1 (VOC 2007);
        ``"101"``: the same at 0, 0.01, .. 1 (COCO).

    Returns:
      A number in 0..1; NaN if there are no objects.

    Raises:
      ValueError: an unknown interpolation.

    Reference:
      Everingham et al., "The PASCAL visual object classes challenge: a retrospective", IJCV 2015.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation is {interpolation!r}; expected one of {INTERPOLATIONS}")
    if not objects:
        return float("nan")
    right = np.cumsum(np.asarray(hits, bool))
    recall = right / objects
    precision = right / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or any greater one
    if interpolation == "all":
        return float(np.sum(np.diff(recall, prepend=0.0) * best))
    points = int(interpolation)
    # recall and grid are both quotients: compare as integers, so that 3 / 10 is reached by 0.3
    needed = -(-np.arange(points) * objects // (points - 1))
    at = np.searchsorted(right, needed, side="left")
    padded = np.append(best, 0.0)
    return float(np.mean(padded[np.minimum(at, len(best))]))


def _iou(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    side = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    common = np.prod(np.maximum(side, 0), axis=-1)
    area_a, area_b = (np.prod(np.maximum(x[:, 2:] - x[:, :2], 0), axis=-1) for x in (a, b))
    union = area_a[:, None] + area_b[None, :] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _hits(overlap: np.ndarray, iou: float, rule: str) -> np.ndarray:
    """Which detections of one class in one image are right; rows come the best first."""
    hits, free = np.zeros(len(overlap), bool), np.ones(overlap.shape[1], bool)
    if not overlap.shape[1]:
        return hits
    for i, row in enumerate(overlap):
        # VOC: the object that it overlaps most, taken or not; COCO: the best that is still free
        j = int(np.argmax(row if rule == "voc" else np.where(free, row, -1.0)))
        if row[j] >= iou and free[j]:
            hits[i], free[j] = True, False
    return hits


def mean_average_precision(
    detections: Any,
    boxes: Float[np.ndarray, "n m 4"],
    labels: Shaped[np.ndarray, "n m"],
    *,
    classes: int,
    iou: float = 0.5,
    interpolation: str = "all",
    rule: str = "voc",
) -> Evaluation:
    """AP of every class over a test set, and their mean.

    Args:
      detections: `cnnjax.detection.Detections` of the n images (arrays of the host or the device).
      boxes: (n, m, 4) the objects, padded.
      labels: (n, m) their classes from 1; 0 is padding.
      classes: number of classes.
      iou: overlap from which a detection is right; one more for the same object is wrong.
      interpolation: see `average_precision`.
      rule: ``"voc"``: a detection belongs to the object that it overlaps most; ``"coco"``: to the
        one among those not found yet. Equal scores rank in the order of the images.

    Raises:
      ValueError: an unknown rule, numbers of images that differ, or a label above ``classes``.
    """
    if rule not in ("voc", "coco"):
        raise ValueError(f"rule is {rule!r}; 'voc' or 'coco'")
    found = [np.asarray(a) for a in (detections.boxes, detections.scores, detections.labels)]
    boxes, labels = np.asarray(boxes), np.asarray(labels)
    if len(found[0]) != len(boxes):
        raise ValueError(f"detections of {len(found[0])} images, objects of {len(boxes)}")
    if max(labels.max(initial=0), found[2].max(initial=0)) > classes:
        raise ValueError(f"a label is above the number of classes, {classes}")
    out, objects = {}, {}
    for c in range(1, classes + 1):
        scores, hits = [], []
        objects[c] = int(np.sum(labels == c))
        for box, score, label, true, kind in zip(*found, boxes, labels, strict=True):
            mine = np.flatnonzero(label == c)
            mine = mine[np.argsort(-score[mine], kind="stable")]
            overlap = _iou(box[mine], true[kind == c])
            scores.append(score[mine])
            hits.append(_hits(overlap, iou, rule))
        order = np.argsort(-np.concatenate(scores), kind="stable")
        out[c] = average_precision(np.concatenate(hits)[order], objects[c], interpolation)
    known = [v for v in out.values() if not np.isnan(v)]
    return Evaluation(float(np.mean(known)) if known else float("nan"), out, objects)


def coco_average_precision(
    detections: Any,
    boxes: Float[np.ndarray, "n m 4"],
    labels: Shaped[np.ndarray, "n m"],
    *,
    classes: int,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
) -> float:
    """COCO's headline figure: mean over ten IoU thresholds of the 101-point mAP.

    Without its area ranges and crowd regions, and with all the detections of an image.

    Args:
      detections: see `mean_average_precision`.
      boxes: (n, m, 4).
      labels: (n, m).
      classes: number of classes.
      thresholds: 0.5, 0.55, .. 0.95.
    """
    each = [
        mean_average_precision(
            detections, boxes, labels, classes=classes, iou=t, interpolation="101", rule="coco"
        ).mean
        for t in thresholds
    ]
    return float(np.mean(each))
