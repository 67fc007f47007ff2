"""Distillation as a stage: a student learns from networks that earlier stages trained."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import data, distillation, models, pruning, training, tree
from cnnjax.distillation import DistillConfig
from cnnjax.errors import did_you_mean
from cnnjax.pipeline.config import DataConfig, ModelSpec
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.fields import image_shape, model_fields
from cnnjax.pipeline.registry import Carry, Known, Outcome, stage
from cnnjax.pipeline.stages.distill_data import chosen_neurons, synthetic_stream
from cnnjax.pipeline.stages.masking import mask_averages, params_of

CACHES = ("none", "memory", "device", "disk")
SYNTHETIC = ("none", "munge", "marginals")
_NO_TEACHER = "the network has no teacher; put keep_teacher where it is whole, or name a student"


@stage("keep_teacher")
@dataclasses.dataclass(frozen=True)
class KeepTeacher:
    """Hands the network on as a teacher of later stages; the network itself goes on unchanged.

    Attributes:
      add: join the teachers that are there already (an ensemble), instead of replacing them.
    """

    add: bool = False
    restructures = True  # it is run again after an interruption: a teacher is not on the disk

    def foresee(self, known: Known, data_config: DataConfig, described: Any) -> Known:
        """See `cnnjax.pipeline.registry`."""
        return Known(known.model, (*(known.teachers if self.add else ()), known.model))

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        known = network.extras.get("teachers", ()) if self.add else ()
        teachers = (*known, training.set_mode(network.model, train=False))
        extras = {**network.extras, "teachers": teachers}
        return Outcome(dataclasses.replace(network, extras=extras), {"teachers": len(teachers)})


@stage("recall_teacher")
@dataclasses.dataclass(frozen=True)
class RecallTeacher:
    """The kept teacher becomes the network again, e.g. to be compressed after several students.

    Attributes:
      index: which one, in the order in which they were kept.
    """

    index: int = 0
    restructures = True

    def foresee(self, known: Known, data_config: DataConfig, described: Any) -> Known:
        """See `cnnjax.pipeline.registry`."""
        inside = 0 <= self.index < len(known.teachers)
        return Known(known.teachers[self.index] if inside else None, known.teachers)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`.

        Raises:
          ValueError: no such teacher.
        """
        teachers = network.extras.get("teachers", ())
        if not 0 <= self.index < len(teachers):
            raise ValueError(
                f"stage {context.name!r}: no teacher {self.index}, {len(teachers)} were kept; put "
                "a keep_teacher stage where the network is still whole"
            )
        return Outcome(Carry(teachers[self.index], None, network.extras))


@stage("distill")
@dataclasses.dataclass(frozen=True)
class Distill:
    """Trains a student with a teacher's help.

    The teachers are those that `KeepTeacher` stages kept. Without any, the network that comes in is
    the teacher, and stays it for later stages; then a ``student`` must be named.

    Attributes:
      recipe: how the student is trained.
      loss: what it learns from.
      student: a fresh network; None: the network that comes in, e.g. a pruned one (a mask that it
        brings is kept).
      first: None, or how a first stage is trained with hints and FSP alone, as in FitNets and in
        Yim et al.; optimizer, schedule and adapters start anew for the second, which has the other
        terms.
      cache: ``"none"``: the teacher runs in every step; else once, ahead, over the very batches of
        the run, augmented as they will be, and its targets stay in the host's ``"memory"``, on the
        ``"device"`` or on the ``"disk"``.
      combine: how several teachers are averaged, ``"geometric"`` or ``"arithmetic"``.
      split: training images of the student if not those of the run, e.g. ``"train[:200]"``: a
        teacher that saw more than the student does.
      order: name of the order of the batches; stages that give the same one see the same batches
        (and with ``cache="disk"`` and equal taps share the targets); empty: the stage's own name.
      synthetic: train on made-up images that only the teacher labels (Bucila et al.):
        ``"munge"``, ``"marginals"`` (the baseline) or ``"none"``; needs ``hard=0``.
      multiplier: synthetic images for every real one.
      swap: MUNGE's probability of an exchange.
      spread: MUNGE's variance parameter s.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    loss: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    student: ModelSpec | None = None
    first: Recipe | None = None
    cache: str = "none"
    combine: str = "geometric"
    split: str = ""
    order: str = ""
    synthetic: str = "none"
    multiplier: int = 4
    swap: float = 0.3
    spread: float = 4.0

    def __post_init__(self) -> None:
        if self.synthetic not in SYNTHETIC:
            raise ValueError(
                f"unknown synthetic {self.synthetic!r}.{did_you_mean(self.synthetic, SYNTHETIC)}"
            )
        if self.synthetic != "none" and (self.loss.hard or self.loss.gradient_beta):
            raise ValueError(
                f"synthetic images have no labels: hard is {self.loss.hard} and gradient_beta "
                f"{self.loss.gradient_beta}; set both to 0"
            )
        if self.synthetic != "none" and self.loss.soft == "dkd":
            raise ValueError("dkd needs labels, which synthetic images don't have")
        if self.synthetic != "none" and self.cache != "none":
            raise ValueError("synthetic images take cache='none'")
        if self.cache not in CACHES:
            raise ValueError(f"cache is {self.cache!r}; expected one of {CACHES}")
        if self.combine not in ("geometric", "arithmetic"):
            raise ValueError(f"combine is {self.combine!r}; 'geometric' or 'arithmetic'")
        if self.first is not None:
            self.loss.stage_one()  # refuses a loss without hints and FSP

    @property
    def restructures(self) -> bool:
        """Whether the network that goes on is another one."""
        return self.student is not None

    def foresee(self, known: Known, data_config: DataConfig, described: Any) -> Known:
        """See `cnnjax.pipeline.registry`: layers and classes of both networks, where known.

        Raises:
          ValueError: class counts that differ, taps that match nothing, maps without an adapter.
        """
        model, teachers = known.model, known.teachers
        if self.student is not None:
            teachers = teachers or (model,)
            fields = model_fields(self.student, data_config, described)
            model = models.abstract(self.student.name, **fields)
        if self.loss.taught and not teachers:
            raise ValueError(_NO_TEACHER)
        if self.loss.taught and all(m is not None for m in (model, *teachers)):
            example = jax.ShapeDtypeStruct((1, *image_shape(data_config, described)), np.float32)
            distillation.compare_classes(model, teachers, example)
            if self.loss.features:
                plan = distillation.plan_distillation(self.loss, model, teachers[0], example)
                jax.eval_shape(lambda: nnx.state(nnx.Dict(plan.adapters(nnx.Rngs(0)))))
        return Known(model, teachers)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`.

        Raises:
          ValueError: no teacher, class counts that differ, taps that match nothing.
        """
        if self.split:
            context = copy.copy(context)
            context.data = dataclasses.replace(context.data, train=self.split)
        if self.order:
            context = copy.copy(context)
            context.order = self.order
        teachers = network.extras.get("teachers", ())
        if not teachers and self.student is not None:
            teachers = (training.set_mode(network.model, train=False),)
        if not teachers and self.loss.taught:
            raise ValueError(f"stage {context.name!r}: {_NO_TEACHER}")
        described = data.info(context.data.name, context.data.data_dir or None)
        shape = (1, *image_shape(context.data, described))
        example = jax.ShapeDtypeStruct(shape, np.float32)
        model, mask = network.model, network.mask
        if self.student is not None:
            fields = model_fields(self.student, context.data, described)
            model, mask = (
                models.create(self.student.name, rngs=nnx.Rngs(context.seed), **fields),
                None,
            )
        guide = None
        if self.loss.taught:
            guide = distillation.Teacher(
                teachers, mode=self.combine, temperature=self.loss.temperature
            )
            distillation.check_classes(model, guide, example)
        phases = [("train", self.recipe, self.loss)]
        if self.first is not None:
            phases = [
                ("first", self.first, self.loss.stage_one()),
                ("train", self.recipe, self.loss.stage_two()),
            ]
        metrics: dict[str, Any] = {}
        for name, recipe, config in phases:
            phase = _Phase(name, recipe, config, guide, self, example)
            model, found = phase.train(model, mask, teachers, context)
            if name == "first":
                found = {"first_images_per_second": found["images_per_second"]}
            metrics |= found
        if teachers:
            metrics["agreement"] = _agreement(model, teachers[0], context)
        extras = {**network.extras, "teachers": teachers}
        return Outcome(Carry(model, mask, extras), metrics)


@dataclasses.dataclass(frozen=True)
class _Phase:
    name: str
    recipe: Recipe
    config: DistillConfig
    guide: Any
    stage: Distill
    example: Any

    def train(
        self, model: Any, mask: Any, teachers: tuple[Any, ...], context: Context
    ) -> tuple[Any, dict[str, Any]]:
        """The trained student without its adapters, and what the last evaluation said."""
        config = self.config
        if self.recipe.label_smoothing:
            config = dataclasses.replace(config, label_smoothing=self.recipe.label_smoothing)
        guide = self.guide if config.taught else None
        plan = distillation.Plan(config)
        if guide is not None:
            plan = distillation.plan_distillation(config, model, teachers[0], self.example)
            guide = guide.with_taps(plan.teacher_taps)
            if plan.neurons:
                plan = chosen_neurons(plan, guide, context)
        adapters = plan.adapters(nnx.Rngs(context.seed))
        student = distillation.WithAdapters(model, adapters) if adapters else model
        loader = context.train_loader()
        steps = max(1, round(self.recipe.epochs * loader.steps_per_epoch))
        loader.close()
        stream = None
        cached = guide is not None and self.stage.cache != "none"
        if cached:
            stream = self.stream(guide, steps, context)
        elif self.stage.synthetic != "none":
            stream = synthetic_stream(self.stage, context)
        loss = distillation.distillation_loss(plan, None if cached else guide, total_steps=steps)
        hooks, wrap = training.Hooks(loss=loss), None
        if mask is not None:
            whole = mask
            if adapters:
                free = tree.map_with_path(lambda _, w: jnp.ones(w.shape, bool), params_of(student))
                whole = {**free, "student": mask}
            hooks = dataclasses.replace(mask_averages(self.recipe), loss=loss)
            wrap = lambda optimizer: pruning.masked(optimizer, whole)  # noqa: E731
        trained = context.train(
            student,
            self.recipe,
            name=self.name,
            steps=steps,
            hooks=hooks,
            wrap=wrap,
            constants=None if guide is None or cached else {"teacher": guide.constants},
            stream=stream,
        )
        last = trained.fit.last("eval")
        out = trained.model()
        return out.student if adapters else out, {
            "steps": last["step"],
            "loss": last["loss"],
            "images_per_second": trained.fit.last("train")["images_per_second"],
        }

    def stream(self, guide: Any, steps: int, context: Context) -> Any:
        """``loader -> batches with targets``; the targets are made when they are first asked."""
        folder = context.folder / f"targets_{self.name}"
        if self.stage.order:  # shared by stages of this order, one folder for each set of taps
            what = zlib.crc32("/".join((*guide.taps, str(steps), guide.fingerprint())).encode())
            folder = context.folder.parent / f"targets_{self.stage.order}_{what:08x}"

        def attach(loader: Any) -> Any:
            if self.stage.cache == "disk":
                if not (folder / "cache.json").exists():
                    distillation.cache_stream(guide, loader, steps).save(folder)
                cache = distillation.load_cache(folder)
            else:
                cache = distillation.cache_stream(guide, loader, steps)
                cache = cache.on_device() if self.stage.cache == "device" else cache
            return distillation.CachedStream(loader, cache, teacher=guide)

        return attach


def _agreement(student: Any, teacher: Any, context: Context) -> float:
    """Share of the test images on which both name the same class."""
    networks, arrays = [], []
    for model in (student, teacher):
        network, params, stats = training.split_network(model)
        networks.append(network)
        arrays.append((params, stats))

    @jax.jit
    def same(arrays: Any, images: Any) -> Any:
        a, b = (
            jnp.argmax(n.model(params, stats)(images), axis=-1)
            for n, (params, stats) in zip(networks, arrays, strict=True)
        )
        return a == b

    hits = count = 0.0
    for batch in context.test_batches():
        weight = np.asarray(batch.get("weight", np.ones(len(batch["label"]))))
        hits += float((np.asarray(same(arrays, batch["image"])) * weight).sum())
        count += float(weight.sum())
    return hits / count
