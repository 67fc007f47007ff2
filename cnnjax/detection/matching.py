"""Which anchor answers for which object, and which background anchors are looked at."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from cnnjax.detection.boxes import box_iou, encode_boxes
from cnnjax.typing import AnyArray

IGNORED = -1


@dataclasses.dataclass(frozen=True)
class MatchConfig:
    """How anchors are labelled and sampled.

    Attributes:
      positive: IoU from which an anchor answers for an object.
      negative: IoU below which it is background; what lies between takes no part.
      negatives: background anchors for each positive one (at least so many in an image without).
      hard: take the background anchors that the network gets most wrong (SSD) instead of random
        ones (Faster R-CNN).
    """

    positive: float = 0.5
    negative: float = 0.4
    negatives: int = 3
    hard: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.negative <= self.positive <= 1:
            raise ValueError(
                f"expected 0 < negative <= positive <= 1, got {self.negative} and {self.positive}"
            )
        if self.negatives < 1:
            raise ValueError(f"negatives must be at least 1, got {self.negatives}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What the anchors of a batch should say.

    Attributes:
      labels: (n, a) int32: 0 background, 1.. the class, -1 takes no part.
      deltas: (n, a, 4) coded boxes, finite everywhere, of use where ``labels > 0``.
    """

    labels: Any
    deltas: Any

    @property
    def positive(self) -> Array:
        """(n, a) bool."""
        return self.labels > 0


def match_one(
    anchors: Float[AnyArray, "a 4"],
    boxes: Float[AnyArray, "m 4"],
    labels: Int[AnyArray, " m"],
    positive: float | Array = 0.5,
    negative: float | Array = 0.4,
) -> tuple[Int[Array, " a"], Int[Array, " a"]]:
    """The object and the label of every anchor of one image.

    An anchor takes the object that it overlaps most (the first of equals). Each object moreover
    claims the anchor that overlaps it most, however little, if at all; an anchor that several
    claim goes to the one that it overlaps most.

    Args:
      anchors: (a, 4).
      boxes: (m, 4), padded.
      labels: (m,) classes from 1; 0 is padding.
      positive: see `MatchConfig`.
      negative: see `MatchConfig`.

    Returns:
      ``(index of the object (a,), label (a,))``; the index is only of use where the label is > 0.

    Reference:
      Ren et al., "Faster R-CNN", arXiv 1506.01497, section 3.1.2.
    """
    labels = jnp.asarray(labels, jnp.int32)
    real = labels > 0
    overlap = jnp.where(real[None, :], box_iou(anchors, boxes), -1.0)
    best, value = jnp.argmax(overlap, axis=1), jnp.max(overlap, axis=1)
    claims = jax.nn.one_hot(jnp.argmax(overlap, axis=0), overlap.shape[0], axis=0, dtype=bool)
    claimed = jnp.where(claims & (overlap > 0), overlap, -1.0)
    forced = jnp.max(claimed, axis=1) > 0
    best = jnp.where(forced, jnp.argmax(claimed, axis=1), best)
    label = jnp.where(value < negative, 0, IGNORED)
    label = jnp.where(forced | (value >= positive), labels[best], label)
    return best.astype(jnp.int32), label.astype(jnp.int32)


def assign_targets(
    anchors: Float[AnyArray, "a 4"],
    boxes: Float[AnyArray, "n m 4"],
    labels: Int[AnyArray, "n m"],
    config: MatchConfig = MatchConfig(),
) -> Targets:
    """Labels and coded boxes of every anchor of a batch; static shapes, to be used inside jit.

    Args:
      anchors: (a, 4).
      boxes: (n, m, 4), padded with anything.
      labels: (n, m), 0 for padding.
      config: thresholds.
    """

    def one(b: Array, c: Array) -> Targets:
        index, label = match_one(anchors, b, c, config.positive, config.negative)
        return Targets(label, encode_boxes(b[index], anchors))

    boxes = jnp.asarray(boxes, jnp.float32)
    return jax.lax.stop_gradient(jax.vmap(one)(boxes, jnp.asarray(labels)))


def sample_negatives(
    score: Float[AnyArray, "n a"], labels: Int[AnyArray, "n a"], negatives: int = 3
) -> Bool[Array, "n a"]:
    """Which anchors count in the classification loss: the positive ones and some background.

    Args:
      score: (n, a); the background anchors with the greatest are taken: random numbers sample
        them, losses mine the hard ones.
      labels: (n, a) as in `Targets`.
      negatives: for each positive anchor of the same image, at least so many in all.

    Reference:
      Liu et al., "SSD", ECCV 2016, arXiv 1512.02325, section 2.2 (3 to 1, hard ones).
    """
    labels = jnp.asarray(labels)
    background = labels == 0
    score = jnp.where(background, jax.lax.stop_gradient(jnp.asarray(score)), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
    wanted = negatives * jnp.maximum(jnp.sum(labels > 0, axis=1, keepdims=True), 1)
    return (labels > 0) | (background & (rank < wanted))


def background_score(
    logits: Float[AnyArray, "n a c"], key: Shaped[Array, "..."] | None, hard: bool
) -> Float[Array, "n a"]:
    """What `sample_negatives` ranks by: the loss of calling an anchor background, or chance.

    Args:
      logits: (n, a, c), background first.
      key: random key, needed unless ``hard``.
      hard: see `MatchConfig`.

    Raises:
      ValueError: random sampling without a key.
    """
    if hard:
        return -jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))[..., 0]
    if key is None:
        raise ValueError("random background anchors need a key (or MatchConfig(hard=True))")
    return jax.random.uniform(key, logits.shape[:-1])
