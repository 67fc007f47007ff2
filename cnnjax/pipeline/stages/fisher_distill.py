"""Fisher pruning with distillation as a stage: maps go while the network is taught."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax import data, distillation, graph, pruning, training
from cnnjax.distillation import DistillConfig
from cnnjax.pipeline.config import DataConfig
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.fields import image_shape
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.masking import cut_state, mask_averages, params_of

_KD = DistillConfig(hard=0.1, soft="kd", soft_weight=0.9, temperature=4.0)


@stage("fisher_distill")
@dataclasses.dataclass(frozen=True)
class FisherDistill:
    """Removes feature maps by Fisher information and price while the network learns.

    Theis et al. 2018, arXiv 1801.05787: train some steps with the teacher's help, remove the map of
    the smallest ``Delta L + beta Delta C``, repeat to a budget, fine-tune, compact. The teachers
    are those of `KeepTeacher`, or else the network as it comes in.

    Attributes:
      recipe: of the pruning phase; its epochs are divided into ``rounds`` of equal length.
      finish: of the fine-tuning of the compacted network.
      loss: what it learns from, without terms of features.
      macs: share of the multiply-accumulates that is left.
      rounds: removals; each takes an equal share of the channels that have to go.
      beta: price of a million multiply-accumulates; -1: none is needed, the smallest
        ``-Delta L / Delta C`` goes.
      examples: training images for the scores of a round.
      split: training images if not those of the run.
    """

    recipe: Recipe = dataclasses.field(default_factory=lambda: Recipe(epochs=2.0))
    finish: Recipe = dataclasses.field(default_factory=lambda: Recipe(epochs=2.0))
    loss: DistillConfig = _KD
    macs: float = 0.5
    rounds: int = 10
    beta: float = -1.0
    examples: int = 256
    split: str = ""
    restructures = True

    def __post_init__(self) -> None:
        if not 0 < self.macs < 1:
            raise ValueError(f"macs is {self.macs}; expected a share in (0, 1)")
        if self.rounds < 1 or self.examples < 1:
            raise ValueError(f"rounds is {self.rounds}, examples {self.examples}; at least 1")
        if self.beta < 0 and self.beta != -1:
            raise ValueError(f"beta is {self.beta}; a price, or -1 for none")
        if self.loss.features:
            raise ValueError("terms of features name layers, whose widths change here; leave out")

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`.

        Raises:
          ValueError: a mask of weights, class counts that differ, a budget out of reach.
        """
        if network.mask is not None:
            raise ValueError("channels are removed before weights: put this stage before masks")
        if self.split:
            context = copy.copy(context)
            context.data = dataclasses.replace(context.data, train=self.split)
        model = training.set_mode(network.model, train=False)
        teachers = network.extras.get("teachers", ()) or (model,)
        guide = distillation.Teacher(teachers, temperature=self.loss.temperature)
        example = _example(context.data)
        distillation.check_classes(model, guide, example)
        found = graph.trace(model, example)
        loader = context.train_loader()
        length = max(1, round(self.recipe.epochs * loader.steps_per_epoch / self.rounds))
        loader.close()
        hooks = dataclasses.replace(
            mask_averages(self.recipe), loss=distillation.distillation_loss(self.loss, guide)
        )
        whole = pruning.channel_mask(params_of(model), found, found.alive())
        trained = context.train(
            training.set_mode(model, train=True),
            self.recipe,
            name="prune",
            steps=length * self.rounds,
            hooks=hooks,
            wrap=lambda optimizer: pruning.masked(optimizer, whole),
            callbacks=lambda net: [(length, self._cut(net, found, guide, context, length))],
            constants={"teacher": guide.constants},
        )
        curve = [context.recorded(f"round_{i:03d}") for i in range(1, self.rounds + 1)]
        curve = [r for r in curve if r is not None]
        alive = np.asarray(curve[-1]["alive"], bool)
        masked = training.set_mode(trained.model(), train=False)
        keep = pruning.Keep.of(found, alive)
        small = pruning.shrink(masked, found, keep)
        metrics = {
            "accuracy_masked": _accuracy(masked, context),
            "accuracy_compacted": _accuracy(small, context),
            "macs_share": graph.profile(small, example).macs / graph.profile(model, example).macs,
            "widths": {name: int(m.sum()) for name, m in keep.groups},
        }
        done = context.train(
            training.set_mode(small, train=True),
            self.finish,
            name="finish",
            hooks=training.Hooks(loss=distillation.distillation_loss(self.loss, guide)),
            constants={"teacher": guide.constants},
        )
        metrics |= {
            "steps": length * self.rounds + done.fit.last("eval")["step"],
            "first_images_per_second": trained.fit.last("train")["images_per_second"],
            "images_per_second": done.fit.last("train")["images_per_second"],
        }
        extras = {**network.extras, "teachers": teachers}
        points = [{k: v for k, v in r.items() if k != "alive"} for r in curve]
        return Outcome(Carry(done.model(), None, extras), metrics, points)

    def _cut(self, net: Any, found: Any, guide: Any, context: Context, length: int) -> Any:
        """``(state, step) -> state``: scores on fresh images, removal, what was learnt so far."""
        targets = jax.jit(lambda constants, x: guide(constants, x).logits)
        loss = self.loss
        sums: dict[str, Any] = {}

        def cut(state: Any, step: int) -> Any:
            number = step // length
            stats = state.stats

            def one(params: Any, example: Any) -> Any:
                logits = net.model(params, example["stats"])(example["image"][None])
                return _example_loss(loss, logits, example)

            def add(params: Any, batch: Any) -> Any:
                if "fn" not in sums:  # one program for all rounds: statistics are arguments
                    tied = jax.jit(
                        lambda p, s, b: pruning.fisher_sums(
                            found, lambda q, e: one(q, {**e, "stats": s}), chunk=16
                        )(p, b)
                    )
                    sums["fn"] = tied
                return sums["fn"](params, stats, batch)

            total, count, batches = np.zeros(found.num_atoms), 0, context.train_loader()
            index = number * 10_000
            while count < self.examples:
                batch = batches[index]
                index += 1
                images = jnp.asarray(batch["image"])
                part = {
                    "image": images,
                    "label": jnp.asarray(batch["label"]),
                    "teacher": targets(guide.constants, images),
                }
                total += np.asarray(add(state.params, part), np.float64)
                count += len(images)
            batches.close()
            before = context.recorded(f"round_{number - 1:03d}")
            alive = found.alive() if before is None else np.asarray(before["alive"], bool)
            cost = pruning.CostModel(found)
            full, now = cost.macs(found.alive()), cost.macs(alive)
            left = self.rounds - number
            goal = self.macs * full + (now - self.macs * full) * left / (left + 1)
            beta = "auto" if self.beta < 0 else self.beta * 1e-6
            alive, order = pruning.fisher_select(
                found, 0.5 * total / count, beta=beta, alive=alive, macs=goal
            )
            record = {
                "round": number,
                "removed": len(order),
                "macs_share": cost.macs(alive) / full,
                "alive": [int(a) for a in alive],
            }
            context.record(f"round_{number:03d}", record)
            return cut_state(state, pruning.channel_mask(state.params, found, alive))

        return cut


def _example_loss(loss: DistillConfig, logits: Any, example: Any) -> Any:
    value = jnp.zeros((), jnp.float32)
    if loss.hard:
        value += loss.hard * distillation.cross_entropy(logits, example["label"][None])
    if loss.soft == "logits":
        value += loss.soft_weight * distillation.logit_regression(logits, example["teacher"][None])
    elif loss.soft != "none":
        value += loss.soft_weight * distillation.soft_targets(
            logits, example["teacher"][None], loss.temperature
        )
    return value


def _example(config: DataConfig) -> Any:
    described = data.info(config.name, config.data_dir or None)
    return jax.ShapeDtypeStruct((1, *image_shape(config, described)), np.float32)


def _accuracy(model: Any, context: Context) -> float:
    network, state = training.create_state(model, optax.set_to_zero(), seed=context.seed)
    return context.evaluate(network, state)["top1"]
