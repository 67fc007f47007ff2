"""Layer-by-layer factorization as a stage: after each layer the whole network is fine-tuned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cnnjax import factorization, graph, training
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.factorize import LayerRule, example_image


@stage("layerwise")
@dataclasses.dataclass(frozen=True)
class Layerwise:
    """Replaces one layer, fine-tunes, and goes on to the next (Astrid & Lee 2017, 1701.07148).

    Attributes:
      rules: ``{path glob: what to do}``, the first match counts; layers of no glob stay.
      recipe: of the fine-tuning after each layer; its learning rate starts anew each time.
      order: ``forward`` from the input, or ``backward``.
    """

    rules: Mapping[str, LayerRule] = dataclasses.field(
        default_factory=lambda: {"**": LayerRule("cp")}
    )
    recipe: Recipe = dataclasses.field(default_factory=lambda: Recipe(epochs=1.0))
    order: str = "forward"
    restructures = True

    def __post_init__(self) -> None:
        if self.order not in ("forward", "backward"):
            raise ValueError(f"order is {self.order!r}; expected 'forward' or 'backward'")
        if not self.rules:
            raise ValueError("rules is empty: name at least one glob, e.g. {'**': {...}}")

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is not None:
            raise ValueError("layers are factorized before weights: put this stage before masks")
        image = example_image(context)
        model = training.set_mode(network.model, train=False)
        rules: Any = {glob: layer.rule() for glob, layer in self.rules.items()}
        decided = factorization.plan(model, rules, image)
        curve: list[dict[str, Any]] = []

        def fine_tune(small: Any, number: int, entry: Any) -> Any:
            trained = context.train(
                training.set_mode(small, train=True), self.recipe, name=f"layer{number:03d}"
            )
            last = trained.fit.last("eval")
            curve.append({"layer": number, "path": entry.path, "accuracy": last["top1"]})
            return trained.model()

        small, steps = factorization.factorize_layerwise(
            model,
            decided,
            fine_tune,
            example=image,
            order=self.order,
            key=context.key("factors"),
        )
        old, new = graph.profile(model, image), graph.profile(small, image)
        metrics = {
            "macs_share": new.macs / old.macs,
            "params_share": new.params / old.params,
            "fine_tunings": len(steps),
            "layers": factorization.report(decided),
        }
        return Outcome(dataclasses.replace(network, model=small), metrics, curve)
