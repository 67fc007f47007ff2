"""Plain training; under a mask where one came along."""

from __future__ import annotations

import dataclasses

from cnnjax import pruning
from cnnjax.errors import did_you_mean
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.masking import mask_averages
from cnnjax.pruning import noise


@stage("train")
@dataclasses.dataclass(frozen=True)
class Train:
    """Trains the network; the weights that an earlier stage removed stay exactly zero.

    Attributes:
      recipe: how.
      dropout: the network's own layers drop units by coin flips (``plain``) or by counts drawn
        where the batch's activations are large (``evolutional``; Li, Gong, Yang, NIPS 2016).
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    dropout: str = "plain"

    def __post_init__(self) -> None:
        if self.dropout not in noise.KINDS:
            known = did_you_mean(self.dropout, noise.KINDS)
            raise ValueError(f"unknown dropout {self.dropout!r}.{known}")

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        plain = self.dropout == "plain"
        model = network.model if plain else noise.with_dropout(network.model, self.dropout)
        if network.mask is None:
            trained = context.train(model, self.recipe)
        else:
            trained = context.train(
                model,
                self.recipe,
                wrap=lambda optimizer: pruning.masked(optimizer, network.mask),
                hooks=mask_averages(self.recipe),
            )
        last = trained.fit.last("eval")
        metrics = {"steps": last["step"], "loss": last["loss"]}
        model = trained.model() if plain else noise.with_dropout(trained.model(), "plain")
        return Outcome(dataclasses.replace(network, model=model), metrics)
