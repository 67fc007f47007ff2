"""Tensor factorization as a stage: decide the ranks, replace the layers, recalibrate BatchNorm."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from cnnjax import factorization, graph, training
from cnnjax.pipeline.context import Context
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.speed import measured_speed


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """What to do with the layers of one glob.

    Attributes:
      method: of `cnnjax.factorization.rule_names`, or ``keep``.
      rank: a number, a share of full rank, or words: ``"macs 0.5"``, ``"energy 0.9"``,
        ``"evbmf 0.3"``; see `cnnjax.factorization.parse_rank`.
      options: further attributes of the rule.
    """

    method: str = "tucker2"
    rank: int | float | str | tuple[int, ...] = "macs 0.5"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rule()

    def rule(self) -> factorization.Rule | None:
        """The rule; None for ``keep``."""
        if self.method == "keep":
            return None
        return factorization.make_rule(self.method, self.rank, **self.options)


@stage("factorize")
@dataclasses.dataclass(frozen=True)
class Factorize:
    """Replaces layers by factors of their weights; fine-tune by a ``train`` stage behind it.

    Attributes:
      rules: ``{path glob: what to do}``, the first match counts; layers of no glob stay.
      macs: share of the whole network's MACs that may be left, shared out over the layers in place
        of the rules' own ranks; 0: the rules choose.
      params: the same for parameters.
      allocation: of such a budget: ``optimal`` or ``greedy``.
      recalibrate: training images whose BatchNorm statistics the new network takes over; 0: keep
        the old statistics.
      keep_faster: leave layers as they are whose factors are not faster on this device, at
        ``speed_batch`` images per call; the report says which and how fast both were. The network
        is then never slower than the one that came in.
      speed_batch: images per call when speed is measured; 0: don't measure the speed-up.
    """

    rules: Mapping[str, LayerRule] = dataclasses.field(default_factory=lambda: {"**": LayerRule()})
    macs: float = 0.0
    params: float = 0.0
    allocation: str = "optimal"
    recalibrate: int = 2000
    keep_faster: bool = False
    speed_batch: int = 0
    restructures = True

    def __post_init__(self) -> None:
        if self.recalibrate < 0:
            raise ValueError(f"recalibrate is {self.recalibrate}; expected a number of images")
        for name in ("macs", "params"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1]")
        if self.macs and self.params:
            raise ValueError(f"give one budget, macs or params; got {self.macs} and {self.params}")
        if self.keep_faster and self.speed_batch < 1:
            raise ValueError(
                f"keep_faster needs speed_batch, the images per call; it is {self.speed_batch}"
            )
        if self.allocation not in ("optimal", "greedy"):
            raise ValueError(f"allocation is {self.allocation!r}; expected 'optimal' or 'greedy'")
        if not self.rules:
            raise ValueError("rules is empty: name at least one glob, e.g. {'**': {...}}")

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is not None:
            raise ValueError("layers are factorized before weights: put this stage before masks")
        image = example_image(context)
        model = training.set_mode(network.model, train=False)
        decided = factorization.plan(
            model,
            self._rules(),
            image,
            macs=self.macs or None,
            params=self.params or None,
            allocation=self.allocation,
            key=context.key("plan"),
        )
        decided = self._measured(model, decided, image, context)
        small = factorization.factorize(model, decided, key=context.key("factors"))
        accuracy = {
            "accuracy_before": accuracy_of(model, context),
            "accuracy_after_factorizing": accuracy_of(small, context),
        }
        if self.recalibrate:
            small = recalibrated(small, context, self.recalibrate)
            accuracy["accuracy_after_recalibration"] = accuracy_of(small, context)
        old, new = graph.profile(model, image), graph.profile(small, image)
        speed = context.recorded("speed") or measured_speed(model, small, image, self.speed_batch)
        context.record("speed", speed)
        metrics = {
            **accuracy,
            "layers_kept": sum(p.kept is not None for p in decided.layers),
            "macs_share": new.macs / old.macs,
            "params_share": new.params / old.params,
            **speed,
            "layers": factorization.report(decided),
        }
        return Outcome(dataclasses.replace(network, model=small), metrics)

    def _measured(
        self, model: Any, decided: factorization.Plan, image: np.ndarray, context: Context
    ) -> factorization.Plan:
        """The plan after what it has to ask the data and the clock."""
        if any(getattr(p.rule, "kernel", None) == "covariance" for p in decided.layers):
            count = self.recalibrate or 2000
            decided = factorization.with_input_covariances(
                model, decided, training_images(context, count)
            )
        asking = [p.rule for p in decided.layers if isinstance(p.rule, factorization.Weighted)]
        if asking:
            # one Jacobian per image and class: fewer images where the loss is asked
            count = 512 if any(r.metric == "loss" for r in asking) else self.recalibrate or 2000
            decided = factorization.with_metrics(model, decided, training_batches(context, count))
        if not self.keep_faster:
            return decided
        # the clock is asked once: a run that goes on after an interruption must decide the same
        kept = context.recorded("kept")
        if kept is None:
            found = factorization.keep_faster(
                model, decided, image, batch=self.speed_batch, key=context.key("factors")
            )
            kept = {
                p.path: {"why": p.kept, "seconds": p.seconds}
                for p in found.plan.layers
                if p.seconds
            }
            context.record("kept", kept)
        layers = []
        for entry in decided.layers:
            told = kept.get(entry.path)
            if told:
                entry = dataclasses.replace(entry, seconds=tuple(told["seconds"]))
                entry = entry.kept_for(told["why"]) if told["why"] else entry
            layers.append(entry)
        return factorization.Plan(tuple(layers))

    def _rules(self) -> dict[str, factorization.Rule | None]:
        return {glob: layer.rule() for glob, layer in self.rules.items()}


def example_image(context: Context) -> np.ndarray:
    """One image of the test split, (1, h, w, c)."""
    batches = context.test_batches()
    try:
        return np.asarray(next(iter(batches))["image"][:1])
    finally:
        batches.close()


def training_images(context: Context, count: int) -> list[Any]:
    """About ``count`` images of the training stream, in batches; the same at each call."""
    return [b["image"] for b in training_batches(context, count)]


def training_batches(context: Context, count: int) -> list[Any]:
    """The same images with their labels."""
    loader = context.train_loader()
    try:
        batches = max(1, round(count / context.data.batch_size))
        return list(itertools.islice(iter(loader), batches))
    finally:
        loader.close()


def accuracy_of(model: Any, context: Context) -> float:
    """Top-1 on the test split."""
    network, state = training.create_state(model, optax.set_to_zero(), seed=context.seed)
    return context.evaluate(network, state)["top1"]


def recalibrated(model: Any, context: Context, images: int) -> Any:
    """The model with BatchNorm statistics of about this many training images."""
    network, state = training.create_state(model, optax.set_to_zero(), seed=context.seed)
    if not state.stats:
        return model
    batches = context.train_loader()
    try:
        count = max(1, round(images / context.data.batch_size))
        stats = training.recalibrate_batchnorm(
            network, state.params, state.stats, itertools.islice(iter(batches), count)
        )
    finally:
        batches.close()
    return training.state_to_model(network, state.replace(stats=stats))
