"""Network slimming: training under an l1 penalty on BatchNorm's scales, then channels by scale."""

from __future__ import annotations

import dataclasses
from typing import Any

from cnnjax import training
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.select import Select
from cnnjax.pruning import penalties

PyTree = Any


@stage("slimming")
@dataclasses.dataclass(frozen=True)
class Slimming(Select):
    """Liu, Li, Shen, Huang, Yan, Zhang, "Learning efficient convolutional networks through network
    slimming", ICCV 2017, 1708.06519.

    ``strength * sum |gamma|`` is added to the loss (by its subgradient, as in the paper); then the
    channels of the smallest scales of the whole network go, and training goes on behind it. The
    fields of `Select` apply; the scales are compared as they are (``normalize="none"``).

    Attributes:
      method: ``bn_scale``.
      normalize: see `Select`; the paper compares the scales themselves.
      recipe: of the training under the penalty.
      strength: lambda; 1e-4 and 1e-5 in the paper, over 160 epochs; 0 is the same training without.
      scales: globs of the penalized leaves.
    """

    method: str = "bn_scale"
    normalize: str = "none"
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    strength: float = 1e-4
    scales: tuple[str, ...] = ("**/scale",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "bn_scale":
            raise ValueError(f"slimming chooses by bn_scale, got the method {self.method!r}")
        if self.strength < 0:
            raise ValueError(f"strength is {self.strength}; expected a weight of 0 or more")

    def penalty(self, params: PyTree) -> Any:
        """The scalar that is added to the loss."""
        return penalties.sparsity(params, self.strength, include=self.scales, min_ndim=1)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is not None:
            raise ValueError("channels are removed before weights: put this stage before masks")
        hooks = training.Hooks(
            loss=training.classification_loss(self.recipe.label_smoothing),
            penalty=lambda params, context: self.penalty(params),
        )
        trained = context.train(network.model, self.recipe, hooks=hooks)
        return super().run(dataclasses.replace(network, model=trained.model()), context)
