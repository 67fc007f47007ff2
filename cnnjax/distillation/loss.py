"""The training loss of a student, assembled from a plan; plugs into `training.Hooks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax import training
from cnnjax.distillation import taps as taplib
from cnnjax.distillation.contrastive import contrastive, hierarchical_context
from cnnjax.distillation.gradients import gradient_attention
from cnnjax.distillation.logits import dkd, logit_regression, soft_targets
from cnnjax.distillation.maps import attention_transfer, fsp, hint
from cnnjax.distillation.neurons import neuron_mimic
from cnnjax.distillation.objective import DistillConfig
from cnnjax.distillation.planning import Plan
from cnnjax.distillation.teachers import Teacher, teaching


def distillation_loss(
    plan: Plan | DistillConfig,
    teacher: Teacher | None = None,
    *,
    total_steps: int | None = None,
    image: str = "image",
    label: str = "label",
) -> Any:
    """A loss for `cnnjax.training.Hooks`.

    The teacher runs inside the step, on the very images that the student sees, with the arrays in
    ``context.constants["teacher"]``; or its targets come in the batch
    (`cnnjax.distillation.CachedStream`), then it doesn't run at all.

    Args:
      plan: from `plan_distillation`, or a `DistillConfig` without feature terms.
      teacher: None where every batch brings its targets, or nothing needs a teacher.
      total_steps: needed for ``soft_weight_end`` and ``soft_warmup``.
      image: the batch's key of the images.
      label: the batch's key of the class numbers.

    Returns:
      ``loss(model, batch, context) -> (scalar, metrics)``; metrics: ``accuracy``, ``hard``,
      ``soft``, ``hint``, ``attention``, ``fsp``, ``gradient``, ``contrastive``, ``review``,
      ``neurons`` (unweighted terms that are on). ``model`` is the student, or `WithAdapters`
      around it. ``batch["weight"]`` weighs examples in the hard and the soft term, not in terms of
      features.

    Raises:
      ValueError: feature terms without a resolved plan, ``soft_weight_end`` or ``soft_warmup``
        without ``total_steps``. When it is traced: no teacher and no targets, class counts that
        differ, shapes that need an adapter.
    """
    if isinstance(plan, DistillConfig):
        if plan.features:
            raise ValueError("features are compared: resolve the layers with plan_distillation")
        plan = Plan(plan)
    c = plan.config
    if c.soft_weight_end is not None and not total_steps:
        raise ValueError("soft_weight_end needs total_steps, at which it is reached")
    if c.soft_warmup and not total_steps:
        raise ValueError("soft_warmup needs total_steps, of which it is a share")
    if teacher is not None:
        teacher = teacher.with_taps(plan.teacher_taps)

    def loss(model: Any, batch: Mapping[str, Any], context: Any) -> tuple[Any, dict[str, Any]]:
        student, adapters = model, None
        if isinstance(model, taplib.WithAdapters):
            student, adapters = model.student, model.adapters
        weight = batch.get("weight")
        if weight is not None and (c.features or c.gradient_beta):
            raise ValueError(
                "terms of features count every example; use a loader with drop_remainder, whose "
                "batches hold no padding (no 'weight')"
            )
        # the running statistics as they were: those that this step updates depend on its batch
        still = training.set_mode(nnx.clone(student), train=False) if c.gradient_beta else None
        logits, ours = taplib.features_of(student, plan.student_taps)(batch[image])
        logits = jnp.asarray(logits, jnp.float32)
        total, metrics = jnp.zeros((), jnp.float32), {}
        if c.hard:
            target = batch.get("soft_label", batch[label])
            each = training.softmax_cross_entropy(logits, target, label_smoothing=c.label_smoothing)
            metrics["hard"] = training.weighted_mean(each, weight)
            total += c.hard * metrics["hard"]
        if c.taught:
            targets = teaching(teacher, plan.teacher_taps, batch, context, batch[image])
            if c.soft != "none" and c.soft_weight:
                metrics["soft"] = _soft(c, logits, targets.logits, batch.get(label), weight)
                total += _soft_weight(c, context.step, total_steps) * metrics["soft"]
            terms = _feature_terms(plan, ours, targets.features, adapters)
            if c.gradient_beta:
                terms["gradient"] = (
                    c.gradient_beta,
                    _gradient_term(still, teacher, context, batch[image], batch[label]),
                )
            for name, (factor, value) in terms.items():
                metrics[name] = value
                total += factor * value
        if label in batch:
            hit = training.label_rank(jax.lax.stop_gradient(logits), batch[label]) < 1
            metrics["accuracy"] = training.weighted_mean(hit, weight)
        return total, metrics

    return loss


def _soft(c: DistillConfig, logits: Any, teacher: Any, labels: Any, weight: Any) -> Any:
    if logits.shape != teacher.shape:
        raise ValueError(
            f"the student's logits {logits.shape} and the teacher's {teacher.shape} differ: both "
            "must be (examples, classes) over the same classes in the same order"
        )
    if c.soft == "kd":
        return soft_targets(logits, teacher, c.temperature, weight)
    if c.soft == "logits":
        return logit_regression(logits, teacher, mask=weight)
    if weight is not None:
        raise ValueError("dkd counts every example; use batches without padding (no 'weight')")
    return dkd(
        logits, teacher, labels, temperature=c.temperature, alpha=c.dkd_alpha, beta=c.dkd_beta
    )


def _soft_weight(c: DistillConfig, step: Any, total_steps: int | None) -> Any:
    value: Any = c.soft_weight
    if c.soft_weight_end is not None and total_steps:
        done = jnp.clip(step / max(total_steps - 1, 1), 0.0, 1.0)
        value = c.soft_weight + (c.soft_weight_end - c.soft_weight) * done
    if c.soft_warmup and total_steps:
        value *= jnp.clip(step / (c.soft_warmup * total_steps), 0.0, 1.0)
    return value


def _feature_terms(
    plan: Plan, ours: Mapping[str, Any], theirs: Mapping[str, Any], adapters: Any
) -> dict[str, tuple[float, Any]]:
    c, out = plan.config, {}
    if c.hint_weight:
        pairs = [
            (taplib.adapted((s, t), ours[s], theirs[t].shape, adapters), theirs[t])
            for s, t in plan.hints
        ]
        value = sum((hint(a, b) for a, b in pairs), jnp.zeros((), jnp.float32))
        out["hint"] = c.hint_weight, value
    if c.attention_beta:
        maps = [(ours[s], theirs[t]) for s, t in plan.attention]
        value = attention_transfer(maps, beta=1.0, form=c.attention_form)
        out["attention"] = c.attention_beta, value
    if c.fsp_weight:

        def one(student: str, teacher: str) -> Any:
            x, channels = ours[student], theirs[teacher].shape[-1]
            shape = (*x.shape[:-1], channels)
            return taplib.adapted((student, teacher), x, shape, adapters)

        student = [(one(a, ta), one(b, tb)) for (a, b), (ta, tb) in plan.fsp]
        teacher = [(theirs[ta], theirs[tb]) for _, (ta, tb) in plan.fsp]
        out["fsp"] = c.fsp_weight, fsp(student, teacher)
    if c.contrastive_weight:
        ((s, t),) = plan.contrastive
        mine, other = (x.mean((1, 2)) if x.ndim == 4 else x for x in (ours[s], theirs[t]))
        if mine.shape != other.shape:
            mine = _need(adapters, "contrastive", plan)(mine)
        value = contrastive(mine, other, temperature=c.contrastive_temperature)
        out["contrastive"] = c.contrastive_weight, value
    if c.review_weight:
        fused = _need(adapters, "review", plan)([ours[s] for s, _ in plan.review])
        value = hierarchical_context(fused, [theirs[t] for _, t in plan.review])
        out["review"] = c.review_weight, value
    if c.neuron_weight:
        ((s, t),) = plan.neurons
        if not plan.selected:
            raise ValueError("no neurons are selected: give the plan with_neurons(...)")
        mine = _need(adapters, "neurons", plan)(ours[s])
        chosen, scale = jnp.asarray(plan.selected), jnp.asarray(plan.scale, jnp.float32)
        out["neurons"] = c.neuron_weight, neuron_mimic(mine, theirs[t], chosen, scale)
    return out


def _need(adapters: Any, name: str, plan: Plan) -> Any:
    if adapters is None or name not in adapters:
        raise ValueError(
            f"the term {name!r} needs its adapter: train WithAdapters(student, plan.adapters(rngs))"
        )
    return adapters[name]


def _gradient_term(still: Any, teacher: Any, context: Any, images: Any, labels: Any) -> Any:
    """Half the mean squared difference of input gradients, both networks in evaluation mode."""
    constants = context.constants
    if teacher is None or not isinstance(constants, Mapping) or "teacher" not in constants:
        raise ValueError(
            "gradient_beta compares gradients at the input: the teacher must run in the step "
            "(constants={'teacher': teacher.constants}), cached targets don't hold them"
        )
    plain = teacher.with_taps(())
    return gradient_attention(
        lambda x: jnp.asarray(still(x), jnp.float32),
        lambda x: plain.differentiable(constants["teacher"], x),
        images,
        labels,
    )
