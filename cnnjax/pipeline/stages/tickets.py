"""Lottery tickets: train, cut, go back to early weights, again; then the ticket is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax import pruning
from cnnjax.pipeline.context import Context, Recipe, Trained
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.masking import mask_averages, params_of, with_params

PyTree = Any


@stage("tickets")
@dataclasses.dataclass(frozen=True)
class Tickets:
    """Iterative magnitude pruning with rewinding (Frankle & Carbin, ICLR 2019, 1803.03635).

    Every round trains the early weights under the mask so far, with optimizer and schedule anew,
    and cuts the smallest of what came out; the last mask is trained once more. Put it first: the
    weights that it gets are the early ones.

    Attributes:
      recipe: training of each round, and of the ticket.
      sparsity: final fraction of the prunable weights (or groups) that is removed.
      rounds: number of cuts.
      shape: how the cuts approach the sparsity, see `cnnjax.pruning.schedules.steps`.
      rewind_epochs: epochs of training before the weights that it goes back to (Frankle et al.,
        ICML 2020, 1912.05671); 0: those that came in.
      granularity: what is removed as a whole.
      scope: ``global`` or ``layer``.
      include: globs of what may be pruned.
      exclude: globs of what may not; biases and normalization are exempt anyway.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    sparsity: float = 0.8
    rounds: int = 4
    shape: str = "geometric"
    rewind_epochs: float = 0.0
    granularity: str = "weight"
    scope: str = "global"
    include: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pruning.schedules.steps(self.sparsity, self.rounds, shape=self.shape)
        pruning.granularity.canonical(self.granularity)
        if self.rewind_epochs < 0:
            raise ValueError(f"rewind_epochs is {self.rewind_epochs}; expected 0 or more")

    def check(self, params: PyTree) -> None:
        """Refuses globs that match nothing before any work."""
        pruning.masks.candidates(params, self.include, self.exclude)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is not None:
            raise ValueError("tickets are drawn from a dense network, but a mask came along")
        model = network.model
        if self.rewind_epochs:
            first = dataclasses.replace(self.recipe, epochs=self.rewind_epochs)
            model = context.train(model, first, name="early").model()
        points: list[dict[str, Any]] = []

        def fit(params: PyTree, mask: PyTree, name: str) -> Trained:
            trained = context.train(
                with_params(model, params),
                self.recipe,
                name=name,
                wrap=lambda optimizer: pruning.masked(optimizer, mask),
                hooks=mask_averages(self.recipe),
            )
            left = [int(jnp.count_nonzero(w)) for w in jax.tree.leaves(trained.state.params)]
            accuracy = trained.fit.last("eval")["top1"]
            points.append({"cut": len(points), "nonzeros": sum(left), "accuracy": accuracy})
            return trained

        def train(params: PyTree, mask: PyTree, number: int) -> PyTree:
            return params_of(fit(params, mask, f"round_{number}").model())

        sparsities = pruning.schedules.steps(self.sparsity, self.rounds, shape=self.shape)
        ticket, mask = pruning.lottery_ticket(
            params_of(model), train, sparsities, granularity=self.granularity, scope=self.scope,
            include=self.include, exclude=self.exclude,
        )  # fmt: skip
        trained = fit(ticket, mask, "ticket")
        last = trained.fit.last("eval")
        curve = [p | {"sparsity": s} for p, s in zip(points, [0.0, *sparsities])]
        out = dataclasses.replace(network, model=trained.model(), mask=jax.device_get(mask))
        return Outcome(out, {"steps": last["step"], "loss": last["loss"]}, curve)
