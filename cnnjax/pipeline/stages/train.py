"""Plain training; under a mask where one came along."""

from __future__ import annotations

import dataclasses

from cnnjax import pruning
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.masking import mask_averages


@stage("train")
@dataclasses.dataclass(frozen=True)
class Train:
    """Trains the network; the weights that an earlier stage removed stay exactly zero.

    Attributes:
      recipe: how.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is None:
            trained = context.train(network.model, self.recipe)
        else:
            trained = context.train(
                network.model,
                self.recipe,
                wrap=lambda optimizer: pruning.masked(optimizer, network.mask),
                hooks=mask_averages(self.recipe),
            )
        last = trained.fit.last("eval")
        metrics = {"steps": last["step"], "loss": last["loss"]}
        return Outcome(dataclasses.replace(network, model=trained.model()), metrics)
