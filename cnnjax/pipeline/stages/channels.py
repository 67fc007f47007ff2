"""Structured pruning as a stage: score, select, shrink with proof, fine-tune, measure the speed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnnjax import graph, pruning, training
from cnnjax.errors import did_you_mean
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.factorize import recalibrated
from cnnjax.pipeline.stages.speed import measured_speed

_SCORES = ("l1", "l2", "bn_scale", "random")
_SCOPES = ("layer", "global", "isomorphic")


@stage("channels")
@dataclasses.dataclass(frozen=True)
class Channels:
    """Removes whole channels to a budget, proves the result, and fine-tunes the smaller network.

    Attributes:
      recipe: of the fine-tuning.
      macs: share of the MACs that may be left; 0: use ``ratio``.
      ratio: share of the channels to remove (when ``macs`` is 0).
      score: ``l1``, ``l2``, ``bn_scale`` (network slimming) or ``random`` (the baseline).
      scope: ``layer``, ``global`` or ``isomorphic``, see `cnnjax.pruning.select_channels`.
      normalize: of each group's scores before groups compete.
      round_to: widths become multiples of this, or stay whole.
      min_width: no group becomes narrower; 0: no limit beyond one channel.
      exclude: globs of variables or groups that stay whole.
      recalibrate: training images whose BatchNorm statistics the shrunk network takes over before
        it is fine-tuned; 0: keeps the original's, which belong to wider layers.
      speed_batch: images per call when the speed-up is measured; 0: don't measure.
    """

    recipe: Recipe = dataclasses.field(default_factory=lambda: Recipe(epochs=5.0))
    macs: float = 0.5
    ratio: float = 0.0
    score: str = "l1"
    scope: str = "global"
    normalize: str = "mean"
    round_to: int = 1
    min_width: int = 0
    exclude: tuple[str, ...] = ()
    recalibrate: int = 0
    speed_batch: int = 32
    restructures = True

    def __post_init__(self) -> None:
        for field, options in (("score", _SCORES), ("scope", _SCOPES)):
            value = getattr(self, field)
            if value not in options:
                raise ValueError(f"unknown {field} {value!r}.{did_you_mean(value, options)}")
        for field in ("macs", "ratio"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected a share in [0, 1)")
        if self.recalibrate < 0:
            raise ValueError(f"recalibrate is {self.recalibrate}; expected a number of images")
        if (self.macs == 0) == (self.ratio == 0):
            raise ValueError(f"give one of macs and ratio, not {self.macs} and {self.ratio}")

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is not None:
            raise ValueError("channels are removed before weights: put this stage before masks")
        batches = context.test_batches()
        image = np.asarray(next(iter(batches))["image"][:1])
        batches.close()
        model = training.set_mode(network.model, train=False)
        found = graph.trace(model, jnp.asarray(image))
        keep = self._select(model, found, context)
        small = pruning.shrink(model, found, keep)
        accuracy = {
            "accuracy_before": _accuracy(model, context),
            "accuracy_after_shrinking": _accuracy(small, context),
        }
        if self.recalibrate:
            small = training.set_mode(recalibrated(small, context, self.recalibrate), train=False)
            accuracy["accuracy_after_recalibration"] = _accuracy(small, context)
        costs = {
            "macs_share": graph.profile(small, image).macs / graph.profile(model, image).macs,
            "params_share": graph.profile(small, image).params / graph.profile(model, image).params,
        }
        trained = context.train(training.set_mode(small, train=True), self.recipe)
        final = trained.model()
        speed = context.recorded("speed") or measured_speed(model, small, image, self.speed_batch)
        context.record("speed", speed)
        last = trained.fit.last("eval")
        metrics = {
            **accuracy,
            **costs,
            **speed,
            "accuracy_after_fine_tuning": last["top1"],
            "steps": last["step"],
            "widths": {name: int(m.sum()) for name, m in keep.groups},
        }
        return Outcome(dataclasses.replace(network, model=final), metrics)

    def _select(self, model: Any, found: graph.Graph, context: Context) -> Any:
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        score = pruning.importance.get(self.score)
        scores = score(params, context.key("scores")) if self.score == "random" else score(params)
        budget: dict[str, Any] = {"macs": self.macs} if self.macs else {"ratio": self.ratio}
        return pruning.select_channels(
            found,
            scores,
            scope=self.scope,
            normalize=self.normalize,
            round_to=self.round_to,
            min_width=self.min_width or None,
            exclude=self.exclude,
            **budget,
        )


def _accuracy(model: Any, context: Context) -> float:
    network, state = training.create_state(model, optax.set_to_zero(), seed=context.seed)
    return context.evaluate(network, state)["top1"]
