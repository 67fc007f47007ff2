"""From a detector's raw output to detections: batched non-maximum suppression, static shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cnnjax.detection.anchors import split_output
from cnnjax.detection.boxes import box_iou, clip_boxes, decode_boxes
from cnnjax.typing import AnyArray


@dataclasses.dataclass(frozen=True)
class NmsConfig:
    """How detections are chosen.

    Attributes:
      score: probability from which a class of an anchor is a candidate.
      iou: a candidate that overlaps a better one of its class by more goes.
      candidates: the best so many of an image are looked at.
      detections: at most so many remain of an image.
    """

    score: float = 0.05
    iou: float = 0.45
    candidates: int = 100
    detections: int = 20

    def __post_init__(self) -> None:
        if not (0 <= self.score < 1 and 0 <= self.iou <= 1):
            raise ValueError(f"score and iou lie in 0..1, got {self.score} and {self.iou}")
        if not 1 <= self.detections <= self.candidates:
            raise ValueError(
                "expected 1 <= detections <= candidates, got "
                f"{self.detections} and {self.candidates}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found, the best first; the rest of the rows is padding with label and score 0.

    Attributes:
      boxes: (n, d, 4) in pixels.
      scores: (n, d) probabilities.
      labels: (n, d) int32 classes from 1.
    """

    boxes: Any
    scores: Any
    labels: Any


def suppress(
    boxes: Float[AnyArray, "k 4"],
    labels: Int[AnyArray, " k"],
    valid: Bool[AnyArray, " k"],
    iou: float | Array = 0.45,
) -> Bool[Array, " k"]:
    """Greedy non-maximum suppression within classes; boxes come sorted, the best first.

    A box stays unless a better one of its class that stays overlaps it by more than ``iou``. That
    recursion has one solution, which is iterated to: every round settles at least one more box,
    and few rounds are needed in practice, all of them products of a (k, k) matrix.

    Args:
      boxes: (k, 4).
      labels: (k,).
      valid: (k,) which rows are boxes at all.
      iou: threshold.
    """
    labels, valid = jnp.asarray(labels), jnp.asarray(valid)
    better = jnp.triu(jnp.ones((len(labels),) * 2, bool), 1)  # row before column
    clash = better & (box_iou(boxes, boxes) > iou) & (labels[:, None] == labels[None, :])

    def again(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        keep, _ = carry
        new = valid & ~jnp.any(clash & keep[:, None], axis=0)
        return new, jnp.any(new != keep)

    keep, _ = jax.lax.while_loop(lambda carry: carry[1], again, (valid, jnp.any(valid)))
    return keep


def detections_of(
    raw: Float[AnyArray, "n a out"],
    anchors: Float[AnyArray, "a 4"],
    image_size: tuple[int, int],
    config: NmsConfig = NmsConfig(),
) -> Detections:
    """Detections of a batch; to be used inside jit.

    Args:
      raw: (n, a, 1 + classes + 4), see `split_output`.
      anchors: (a, 4).
      image_size: (height, width), boxes are clipped to it.
      config: see `NmsConfig`.

    Returns:
      `Detections` with ``config.detections`` rows an image.
    """
    logits, deltas = split_output(raw)
    probabilities = jax.nn.softmax(logits)[..., 1:]
    boxes = clip_boxes(decode_boxes(deltas, anchors), *image_size)
    classes = probabilities.shape[-1]
    candidates = min(config.candidates, probabilities.shape[1] * classes)

    def one(p: Array, b: Array) -> Detections:
        score, at = jax.lax.top_k(p.reshape(-1), candidates)
        box, label = b[at // classes], (at % classes + 1).astype(jnp.int32)
        keep = suppress(box, label, score > config.score, config.iou)
        # stable: what remains keeps its order
        first = jnp.argsort(~keep, stable=True)[: config.detections]
        there = keep[first]
        return Detections(
            jnp.where(there[:, None], box[first], 0.0),
            jnp.where(there, score[first], 0.0),
            jnp.where(there, label[first], 0),
        )

    found = jax.vmap(one)(probabilities, boxes)
    missing = config.detections - found.scores.shape[1]
    if missing > 0:  # fewer candidates than rows
        pad = lambda a: jnp.pad(a, ((0, 0), (0, missing)) + ((0, 0),) * (a.ndim - 2))  # noqa: E731
        found = jax.tree.map(pad, found)
    return found
