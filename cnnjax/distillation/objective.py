"""The training loss of a student, assembled from a small record; plugs into `training.Hooks`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax import training
from cnnjax.distillation import taps as taplib
from cnnjax.distillation.logits import check_temperature, dkd, logit_regression, soft_targets
from cnnjax.distillation.maps import attention_transfer, fsp, hint
from cnnjax.distillation.teachers import Targets, Teacher
from cnnjax.errors import did_you_mean

SOFT = ("none", "kd", "dkd", "logits")
_ACTIVATIONS = {"relu": jax.nn.relu, "none": None}


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """What the student learns from; the loss is the sum of the weighted terms.

    Attributes:
      hard: weight of the cross-entropy with the labels (1 - alpha in Hinton's form); 0: no labels.
      soft: ``"kd"`` (Hinton: T^2 KL), ``"dkd"``, ``"logits"`` (Ba & Caruana), ``"none"``.
      soft_weight: weight of it at the start (alpha).
      soft_weight_end: weight at the last step, linear in between (FitNets: from 4 to 1); None:
        constant.
      temperature: T > 0.
      dkd_alpha: weight of the target class within ``"dkd"``.
      dkd_beta: weight of the others.
      hint_weight: weight of the hint loss (mean over examples of half the squared distance, summed
        over positions and channels).
      hints: (student glob, teacher glob) pairs.
      hint_activation: of the regressors: ``"relu"`` or ``"none"``.
      attention_beta: the authors' beta; 1e3 for ``attention_form="code"``.
      attention: (student glob, teacher glob) pairs.
      attention_form: ``"code"`` or ``"paper"``.
      fsp_weight: weight of the FSP loss.
      fsp: (student first, student last, teacher first, teacher last) globs for each section.
      label_smoothing: of the hard term.
    """

    hard: float = 0.1
    soft: str = "kd"
    soft_weight: float = 0.9
    soft_weight_end: float | None = None
    temperature: float = 4.0
    dkd_alpha: float = 1.0
    dkd_beta: float = 8.0
    hint_weight: float = 0.0
    hints: tuple[tuple[str, str], ...] = ()
    hint_activation: str = "relu"
    attention_beta: float = 0.0
    attention: tuple[tuple[str, str], ...] = ()
    attention_form: str = "code"
    fsp_weight: float = 0.0
    fsp: tuple[tuple[str, ...], ...] = ()
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hints", "attention", "fsp"):  # config files hold lists
            value = tuple(tuple(v) for v in getattr(self, name))
            object.__setattr__(self, name, value)
        check_temperature(self.temperature)
        if self.soft not in SOFT:
            raise ValueError(f"unknown soft loss {self.soft!r}.{did_you_mean(self.soft, SOFT)}")
        if self.hint_activation not in _ACTIVATIONS:
            raise ValueError(f"hint_activation is {self.hint_activation!r}; 'relu' or 'none'")
        if self.attention_form not in ("code", "paper"):
            raise ValueError(f"attention_form is {self.attention_form!r}; 'code' or 'paper'")
        for weight in ("hard", "soft_weight", "hint_weight", "attention_beta", "fsp_weight"):
            if not getattr(self, weight) >= 0:
                raise ValueError(f"{weight} is {getattr(self, weight)}; weights are not negative")
        for weight, pairs, size in (
            ("hint_weight", "hints", 2),
            ("attention_beta", "attention", 2),
            ("fsp_weight", "fsp", 4),
        ):
            given = getattr(self, pairs)
            if bool(getattr(self, weight)) != bool(given):
                raise ValueError(
                    f"{weight} = {getattr(self, weight)} and {pairs} = {given}: give both or none"
                )
            if any(len(p) != size for p in given):
                raise ValueError(f"each entry of {pairs} names {size} layers, got {given}")
        if not (self.hard or (self.soft != "none" and self.soft_weight) or self.features):
            raise ValueError("all weights are 0: there is nothing to learn from")

    @property
    def features(self) -> bool:
        """Whether any term compares features."""
        return bool(self.hint_weight or self.attention_beta or self.fsp_weight)

    @property
    def taught(self) -> bool:
        """Whether any term needs a teacher."""
        return self.features or (self.soft != "none" and self.soft_weight > 0)

    def stage_one(self) -> DistillConfig:
        """Hints and FSP alone, for the first of two stages (FitNets, Yim et al.).

        Raises:
          ValueError: there is neither.
        """
        if not (self.hint_weight or self.fsp_weight):
            raise ValueError("a first stage needs hints or fsp layers")
        return dataclasses.replace(self, hard=0.0, soft="none", attention_beta=0.0, attention=())

    def stage_two(self) -> DistillConfig:
        """Everything but hints and FSP, for the second of two stages."""
        return dataclasses.replace(self, hint_weight=0.0, hints=(), fsp_weight=0.0, fsp=())


@dataclasses.dataclass(frozen=True)
class Plan:
    """A `DistillConfig` whose globs are resolved on two networks.

    Attributes:
      config: the record.
      hints: (student path, teacher path).
      attention: likewise.
      fsp: (student first, last), (teacher first, last).
      pairs: of `hints` and of the layers of `fsp`, with shapes.
    """

    config: DistillConfig
    hints: tuple[tuple[str, str], ...] = ()
    attention: tuple[tuple[str, str], ...] = ()
    fsp: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = ()
    pairs: tuple[taplib.Pair, ...] = ()

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Paths of the student's layers, each once."""
        paths = [s for s, _ in (*self.hints, *self.attention)]
        paths += [p for ours, _ in self.fsp for p in ours]
        return tuple(dict.fromkeys(paths))

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Paths of the teacher's layers, each once."""
        paths = [t for _, t in (*self.hints, *self.attention)]
        paths += [p for _, theirs in self.fsp for p in theirs]
        return tuple(dict.fromkeys(paths))

    def adapters(self, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Fresh adapters for the pairs of hints and FSP layers that need one.

        Hint layers always get a regressor where shapes differ; FSP layers a 1x1 convolution where
        channel counts differ.
        """
        out: dict[str, nnx.Module] = {}
        for pair in self.pairs:
            name = taplib.adapter_name(pair.student, pair.teacher)
            if (pair.student, pair.teacher) in self.hints:
                if not pair.equal:
                    act = _ACTIVATIONS[self.config.hint_activation]
                    out[name] = taplib.make_adapter(pair, activation=act, rngs=rngs)
            elif pair.student_shape[-1] != pair.teacher_shape[-1] and name not in out:
                out[name] = taplib.fsp_adapter(pair, rngs=rngs)
        return out


def plan_distillation(
    config: DistillConfig, student: nnx.Module, teacher: nnx.Module, *example: Any
) -> Plan:
    """Resolves the globs of a record; nothing is computed.

    Args:
      config: the record.
      student: NNX module, abstract is enough.
      teacher: NNX module, abstract is enough.
      *example: inputs or ``jax.ShapeDtypeStruct`` s.

    Raises:
      ValueError: a glob that matches nothing or several layers.
    """

    ends = [((f, tf), (e, te)) for f, e, tf, te in config.fsp]
    wanted = [*config.hints, *config.attention, *(end for both in ends for end in both)]
    found = taplib.pair_features(student, teacher, wanted, *example)
    split, rest = len(config.hints), len(config.hints) + len(config.attention)
    hints, attention, fsp_pairs = found[:split], found[split:rest], found[rest:]
    sections = tuple(
        ((a.student, b.student), (a.teacher, b.teacher))
        for a, b in zip(fsp_pairs[::2], fsp_pairs[1::2], strict=True)
    )
    return Plan(
        config,
        tuple((p.student, p.teacher) for p in hints),
        tuple((p.student, p.teacher) for p in attention),
        sections,
        (*hints, *fsp_pairs),
    )


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
      total_steps: needed for ``soft_weight_end``.
      image: the batch's key of the images.
      label: the batch's key of the class numbers.

    Returns:
      ``loss(model, batch, context) -> (scalar, metrics)``; metrics: ``accuracy``, ``hard``,
      ``soft``, ``hint``, ``attention``, ``fsp`` (unweighted terms that are on). ``model`` is the
      student, or `WithAdapters` around it. ``batch["weight"]`` weighs examples in the hard and the
      soft term, not in terms of features.

    Raises:
      ValueError: feature terms without a resolved plan, ``soft_weight_end`` without
        ``total_steps``. When it is traced: no teacher and no targets, class counts that differ,
        shapes that need an adapter.
    """
    if isinstance(plan, DistillConfig):
        if plan.features:
            raise ValueError("features are compared: resolve the layers with plan_distillation")
        plan = Plan(plan)
    c = plan.config
    if c.soft_weight_end is not None and not total_steps:
        raise ValueError("soft_weight_end needs total_steps, at which it is reached")
    if teacher is not None:
        teacher = teacher.with_taps(plan.teacher_taps)

    def loss(model: Any, batch: Mapping[str, Any], context: Any) -> tuple[Any, dict[str, Any]]:
        student, adapters = model, None
        if isinstance(model, taplib.WithAdapters):
            student, adapters = model.student, model.adapters
        weight = batch.get("weight")
        if weight is not None and c.features:
            raise ValueError(
                "terms of features count every example; use a loader with drop_remainder, whose "
                "batches hold no padding (no 'weight')"
            )
        logits, ours = taplib.features_of(student, plan.student_taps)(batch[image])
        logits = jnp.asarray(logits, jnp.float32)
        total, metrics = jnp.zeros((), jnp.float32), {}
        if c.hard:
            target = batch.get("soft_label", batch[label])
            each = training.softmax_cross_entropy(logits, target, label_smoothing=c.label_smoothing)
            metrics["hard"] = training.weighted_mean(each, weight)
            total += c.hard * metrics["hard"]
        if c.taught:
            targets = _targets(teacher, plan, batch, context, image)
            if c.soft != "none" and c.soft_weight:
                metrics["soft"] = _soft(c, logits, targets.logits, batch.get(label), weight)
                total += _soft_weight(c, context.step, total_steps) * metrics["soft"]
            terms = _feature_terms(plan, ours, targets.features, adapters)
            for name, (factor, value) in terms.items():
                metrics[name] = value
                total += factor * value
        if label in batch:
            hit = training.label_rank(jax.lax.stop_gradient(logits), batch[label]) < 1
            metrics["accuracy"] = training.weighted_mean(hit, weight)
        return total, metrics

    return loss


def _targets(
    teacher: Teacher | None, plan: Plan, batch: Mapping[str, Any], context: Any, image: str
) -> Targets:
    if "teacher_logits" in batch:
        names = {path: f"teacher_feature/{path}" for path in plan.teacher_taps}
        for path, name in names.items():
            if name not in batch:
                raise ValueError(f"the cached targets hold no features of {path!r}; cache them")
        found = {path: batch[name] for path, name in names.items()}
        return jax.lax.stop_gradient(Targets(batch["teacher_logits"], found))
    constants = context.constants
    if teacher is None or not isinstance(constants, Mapping) or "teacher" not in constants:
        raise ValueError(
            "no teacher: give distillation_loss a Teacher and the step "
            "constants={'teacher': teacher.constants}, or batches with cached targets"
        )
    return teacher(constants["teacher"], batch[image])


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
    if c.soft_weight_end is None or not total_steps:
        return c.soft_weight
    done = jnp.clip(step / max(total_steps - 1, 1), 0.0, 1.0)
    return c.soft_weight + (c.soft_weight_end - c.soft_weight) * done


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
    return out
