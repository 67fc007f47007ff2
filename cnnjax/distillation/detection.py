"""Training a student detector with a teacher's help; plugs into `cnnjax.training.Hooks`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax import detection
from cnnjax.distillation import taps as taplib
from cnnjax.distillation.adapters import ChannelAdapter
from cnnjax.distillation.detection_losses import (
    bounded_regression,
    detection_classification,
    smooth_l1,
)
from cnnjax.distillation.teachers import Teacher, teaching

_FORMS = ("l2", "l1")
_MATCH = detection.MatchConfig()


@dataclasses.dataclass(frozen=True)
class DetectionDistillConfig:
    """What a student detector learns from.

    ``mu CE + (1 - mu) L_soft + regression (smooth L1 + nu L_b) + hint_weight L_hint``: means over
    the sampled anchors, the positive anchors, and the elements of the features.

    Attributes:
      mu: share of the labels in the classification; 1: no soft targets.
      background_weight: weight of the background in the soft term.
      regression: lambda, weight of both regression terms.
      nu: weight of the teacher-bounded regression; 0: off.
      margin: m, by which the student must be better than the teacher for the bound to let go.
      hint_weight: gamma; 0: no hints.
      hints: (student glob, teacher glob) pairs of layers that give maps.
      hint_form: ``"l2"`` (mean square) or ``"l1"``.
      match: how anchors are labelled and sampled.

    Reference:
      Chen et al., "Learning efficient object detection models with knowledge distillation",
      NIPS 2017. A single-stage detector has one classification and one regression where the
      paper's has those of its proposals and of its second stage. mu, gamma and m are not given
      there; nu = 0.5 and the background's weight of 1.5 are.
    """

    mu: float = 0.5
    background_weight: float = 1.5
    regression: float = 1.0
    nu: float = 0.5
    margin: float = 0.0
    hint_weight: float = 0.0
    hints: tuple[tuple[str, str], ...] = ()
    hint_form: str = "l2"
    match: detection.MatchConfig = _MATCH

    def __post_init__(self) -> None:
        object.__setattr__(self, "hints", tuple(tuple(pair) for pair in self.hints))
        if not 0 <= self.mu <= 1:
            raise ValueError(f"mu is {self.mu}; it is the labels' share, in 0..1")
        for name in ("background_weight", "regression", "nu", "margin", "hint_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if bool(self.hint_weight) != bool(self.hints):
            raise ValueError(
                f"hint_weight = {self.hint_weight} and hints = {self.hints}: give both or none"
            )
        if self.hint_form not in _FORMS:
            raise ValueError(f"hint_form is {self.hint_form!r}; expected one of {_FORMS}")

    @property
    def taught(self) -> bool:
        """Whether any term needs a teacher."""
        return self.mu < 1 or self.nu > 0 or self.hint_weight > 0


@dataclasses.dataclass(frozen=True)
class DetectionPlan:
    """A config whose globs are resolved on two detectors, see `plan_detection`.

    Attributes:
      config: the record.
      pairs: the layers of the hints, with shapes.
    """

    config: DetectionDistillConfig
    pairs: tuple[taplib.Pair, ...] = ()

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Paths of the student's layers, each once."""
        return tuple(dict.fromkeys(p.student for p in self.pairs))

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Paths of the teacher's layers, each once."""
        return tuple(dict.fromkeys(p.teacher for p in self.pairs))

    def adapters(self, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """A fresh 1x1 convolution for every pair, also where the shapes agree (the paper's way).

        Train ``WithAdapters(student, adapters)``, and keep its ``student``.
        """
        return {
            taplib.adapter_name(p.student, p.teacher): ChannelAdapter(
                p.student_shape[-1], p.teacher_shape[-1], rngs=rngs
            )
            for p in self.pairs
        }


def plan_detection(
    config: DetectionDistillConfig, student: nnx.Module, teacher: nnx.Module, *example: Any
) -> DetectionPlan:
    """Resolves the globs of a record and checks that two detectors fit; nothing is computed.

    Args:
      config: the record.
      student: detector, abstract is enough.
      teacher: detector, abstract is enough.
      *example: images or their ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: other classes or anchors, a glob that matches nothing or several layers, maps
        whose height and width differ.
    """
    shapes = []
    for model in (student, teacher):
        graphdef, state = nnx.split(taplib.evaluation_mode(model))
        out = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s, copy=True)(x), state, *example)  # noqa: B023
        shapes.append(tuple(out.shape))
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the student's output {shapes[0]} and the teacher's {shapes[1]} differ: both must "
            "give (images, anchors, 1 + classes + 4) over the same classes and the same anchors"
        )
    size = tuple(example[0].shape[1:3])
    ours, theirs = (m.anchors(size) for m in (student, teacher))  # type: ignore[operator]
    if (ours != theirs).any():
        raise ValueError(
            "the student's anchors are others than the teacher's: give both the same stride, sizes "
            "and ratios"
        )
    pairs = taplib.pair_features(student, teacher, config.hints, *example)
    for p in pairs:
        if p.student_shape[:-1] != p.teacher_shape[:-1] or len(p.student_shape) != 4:
            raise ValueError(
                f"hint from {p.teacher!r} {p.teacher_shape} to {p.student!r} {p.student_shape}: a "
                "1x1 convolution needs maps (n, h, w, c) of one height and width"
            )
    return DetectionPlan(config, pairs)


def detection_distillation_loss(
    plan: DetectionPlan | DetectionDistillConfig,
    teacher: Teacher | None = None,
    *,
    image: str = "image",
) -> Any:
    """A loss for `cnnjax.training.Hooks`.

    The teacher runs inside the step, on the student's very images and anchors, with its arrays in
    ``context.constants["teacher"]``; or its targets come in the batch
    (`cnnjax.distillation.CachedStream`), then it doesn't run at all.

    Args:
      plan: from `plan_detection`, or a config without hints.
      teacher: detectors as a `Teacher`; None where every batch brings targets, or none is needed.
      image: the batch's key of the images; the others are ``boxes`` and ``label``.

    Returns:
      ``loss(model, batch, context) -> (scalar, metrics)``; ``model`` is the student, or
      `WithAdapters` around it. Metrics, unweighted: ``classification`` (with the soft term),
      ``regression``, ``bound``, ``bound_active`` (share of the positive anchors that the bound
      holds), ``hint``.

    Raises:
      ValueError: hints without a resolved plan; when it is traced: no teacher and no targets,
        outputs that differ, an adapter that is missing.
    """
    if isinstance(plan, DetectionDistillConfig):
        if plan.hints:
            raise ValueError("features are compared: resolve the layers with plan_detection")
        plan = DetectionPlan(plan)
    c = plan.config
    if teacher is not None:
        teacher = teacher.with_taps(plan.teacher_taps)

    def loss(model: Any, batch: Mapping[str, Any], context: Any) -> tuple[Any, dict[str, Any]]:
        student, adapters = model, None
        if isinstance(model, taplib.WithAdapters):
            student, adapters = model.student, model.adapters
        raw, ours = taplib.features_of(student, plan.student_taps)(batch[image])
        anchors = student.anchors(batch[image].shape[1:3])
        b = detection.anchor_batch(raw, anchors, batch, c.match, context.key)
        location = smooth_l1(b.deltas, b.target, b.positive)
        metrics = {"regression": location}
        if not c.taught:
            each = detection_classification(b.logits, b.logits, b.labels, 1.0, 1.0, b.counted)
            return each + c.regression * location, {"classification": each, **metrics}
        targets = teaching(teacher, plan.teacher_taps, batch, context, batch[image])
        if targets.logits.shape != raw.shape:
            raise ValueError(
                f"the student's output {raw.shape} and the teacher's {targets.logits.shape} "
                "differ: both must be over the same classes and anchors"
            )
        logits, deltas = detection.split_output(targets.logits)
        logits, deltas = logits.reshape(b.logits.shape), deltas.reshape(b.deltas.shape)
        metrics["classification"] = detection_classification(
            b.logits, logits, b.labels, c.mu, c.background_weight, b.counted
        )
        total = metrics["classification"]
        if c.nu:
            metrics["bound"] = bounded_regression(b.deltas, deltas, b.target, c.margin, b.positive)
            metrics["bound_active"] = _active(b, deltas, c.margin)
            location = location + c.nu * metrics["bound"]
        total += c.regression * location
        if c.hint_weight:
            metrics["hint"] = _hints(plan, ours, targets.features, adapters)
            total += c.hint_weight * metrics["hint"]
        return total, metrics

    return loss


def _active(b: detection.AnchorBatch, teacher: Any, margin: float) -> Any:
    ours, theirs = (jnp.sum((x - b.target) ** 2, axis=-1) for x in (b.deltas, teacher))
    active = b.positive & (ours + margin > theirs)
    return jnp.sum(active) / jnp.maximum(jnp.sum(b.positive), 1)


def _hints(plan: DetectionPlan, ours: Any, theirs: Any, adapters: Any) -> Any:
    """Mean over the elements of the adapted features' distance; the teacher's carry no gradient."""
    total = jnp.zeros((), jnp.float32)
    for p in plan.pairs:
        target = jnp.asarray(theirs[p.teacher], jnp.float32)
        x = taplib.adapted((p.student, p.teacher), ours[p.student], target.shape, adapters)
        difference = jnp.asarray(x, jnp.float32) - jax.lax.stop_gradient(target)
        if plan.config.hint_form == "l1":
            total += jnp.mean(jnp.abs(difference))
        else:
            total += jnp.mean(difference**2)
    return total
