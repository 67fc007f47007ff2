"""A detector in training and evaluation: the loss hook and the evaluation that `training` takes.

Usage::

    network, state = training.create_state(detector, optimizer)
    step = training.make_train_step(
        network, optimizer, hooks=training.Hooks(loss=detection.detection_loss()))
    find = detection.make_detect_step(network)
    result = training.fit(step, state, batches, training.FitConfig(steps),
        evaluate=lambda s: detection.evaluate(find, s, test_batches, classes=10))

Batches are dicts: ``image`` (n, h, w, c), ``boxes`` (n, m, 4) in pixels, ``label`` (n, m) with the
classes from 1 and 0 for padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax import training
from cnnjax.detection.anchors import split_output
from cnnjax.detection.average_precision import mean_average_precision
from cnnjax.detection.matching import (
    MatchConfig,
    assign_targets,
    background_score,
    sample_negatives,
)
from cnnjax.detection.nms import Detections, NmsConfig, detections_of

_MATCH, _NMS = MatchConfig(), NmsConfig()


@dataclasses.dataclass(frozen=True)
class AnchorBatch:
    """Everything that a detection loss compares, of all anchors of a batch in one row.

    Attributes:
      logits: (b, 1 + classes) of the network, background first.
      deltas: (b, 4) of the network.
      labels: (b,) int32, 0 where the anchor takes no part.
      target: (b, 4) coded boxes.
      counted: (b,) bool, in the classification loss.
      positive: (b,) bool, in the regression loss.
    """

    logits: Any
    deltas: Any
    labels: Any
    target: Any
    counted: Any
    positive: Any


def anchor_batch(
    raw: Any, anchors: Any, batch: Mapping[str, Any], config: MatchConfig, key: Any = None
) -> AnchorBatch:
    """Matches a network's raw output with a batch's objects and samples the background.

    Args:
      raw: (n, a, 1 + classes + 4).
      anchors: (a, 4).
      batch: with ``boxes`` and ``label``.
      config: see `MatchConfig`.
      key: random key, where the background is sampled at random.

    Raises:
      ValueError: the anchors are not those of the output.
    """
    if raw.shape[1] != len(anchors):
        raise ValueError(f"an output for {raw.shape[1]} anchors, but there are {len(anchors)}")
    logits, deltas = split_output(raw)
    targets = assign_targets(anchors, batch["boxes"], batch["label"], config)
    score = background_score(logits, key, config.hard)
    counted = sample_negatives(score, targets.labels, config.negatives)
    flat = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
    return AnchorBatch(
        flat(logits),
        flat(deltas),
        jnp.maximum(flat(targets.labels), 0),
        flat(targets.deltas),
        flat(counted),
        flat(targets.positive),
    )


def detection_loss(
    match: MatchConfig = _MATCH, *, regression: float | int = 1.0, image: str = "image"
) -> Any:
    """The loss hook of plain training: cross-entropy plus smooth L1.

    Args:
      match: how anchors are labelled and sampled.
      regression: weight of the smooth L1 loss (sum over the four deltas, mean over the positive
        anchors of the batch) beside the cross-entropy (mean over the sampled anchors).
      image: the batch's key of the images.

    Returns:
      ``loss(model, batch, context) -> (scalar, metrics)`` for `cnnjax.training.Hooks`; the model
      has ``anchors(image_size)`` (`cnnjax.models.Detector`). Metrics: ``classification``,
      ``regression``, ``positives`` (an image).
    """

    def loss(model: Any, batch: Mapping[str, Any], context: Any) -> tuple[Any, dict[str, Any]]:
        images = batch[image]
        anchors = model.anchors(images.shape[1:3])
        b = anchor_batch(model(images), anchors, batch, match, context.key)
        each = training.softmax_cross_entropy(b.logits, b.labels)
        classification = training.weighted_mean(each, b.counted)
        huber = jnp.sum(optax.losses.huber_loss(b.deltas, b.target), axis=-1)
        location = training.weighted_mean(huber, b.positive)
        metrics = {
            "classification": classification,
            "regression": location,
            "positives": jnp.sum(b.positive) / len(images),
        }
        return classification + regression * location, metrics

    return loss


def make_detect_step(
    network: training.Network, config: NmsConfig = _NMS
) -> Callable[[training.TrainState, Any], Detections]:
    """``detect(state, images) -> Detections``, jitted: network, decoding and suppression in one.

    Args:
      network: static side of a detector, from `cnnjax.training.create_state`.
      config: see `NmsConfig`.
    """

    @jax.jit
    def run(params: Any, stats: Any, images: Any) -> Detections:
        model: Any = network.model(params, stats)
        size = tuple(images.shape[1:3])
        return detections_of(model(images), model.anchors(size), size, config)

    return lambda state, images: run(state.params, state.stats, images)


def label_scenes(
    detect: Callable[[Any, Any], Detections],
    state: Any,
    images: Any,
    *,
    threshold: float = 0.5,
    most: int = 4,
    batch_size: int = 250,
) -> dict[str, np.ndarray]:
    """Scenes without labels, labelled by a trained detector: what a student can learn from.

    Args:
      detect: from `make_detect_step`, of the detector that labels.
      state: its training state.
      images: (n, h, w, c).
      threshold: least score of a detection that counts as an object.
      most: objects in a scene, the best ones.
      batch_size: images at a time.

    Returns:
      ``image``, ``boxes`` (n, most, 4) and ``label`` (n, most), 0 for padding.

    Raises:
      ValueError: no images, or a threshold outside of (0, 1).
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}; a score between 0 and 1")
    if not len(images):
        raise ValueError("nothing to label: no images")
    parts = [
        jax.device_get(detect(state, images[i : i + batch_size]))
        for i in range(0, len(images), batch_size)
    ]
    found = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    boxes = np.zeros((len(images), most, 4), np.float32)
    labels = np.zeros((len(images), most), np.int32)
    count = min(most, found.scores.shape[1])  # the best come first
    sure = found.scores[:, :count] >= threshold
    boxes[:, :count] = np.where(sure[..., None], found.boxes[:, :count], 0.0)
    labels[:, :count] = np.where(sure, found.labels[:, :count], 0)
    return {"image": np.asarray(images), "boxes": boxes, "label": labels}


def evaluate(
    detect: Callable[[Any, Any], Detections],
    state: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    classes: int,
    iou: float = 0.5,
    interpolation: str = "all",
) -> dict[str, float]:
    """mAP over a test set.

    Args:
      detect: from `make_detect_step`.
      state: the training state.
      batches: see the module's docstring; equal sizes compile once.
      classes: number of classes.
      iou: see `mean_average_precision`.
      interpolation: see `mean_average_precision`.

    Returns:
      ``{"map", "count"}``; the mean average precision in 0..1, and the number of images.

    Raises:
      ValueError: no batches.
    """
    found, truth = [], []
    for batch in batches:
        found.append(detect(state, batch["image"]))
        truth.append((np.asarray(batch["boxes"]), np.asarray(batch["label"])))
    if not found:
        raise ValueError("nothing to evaluate: no batches")
    detections = jax.tree.map(lambda *a: np.concatenate(a), *jax.device_get(found))
    boxes, labels = (np.concatenate(a) for a in zip(*truth))
    result = mean_average_precision(
        detections, boxes, labels, classes=classes, iou=iou, interpolation=interpolation
    )
    return {"map": result.mean, "count": float(len(boxes))}
