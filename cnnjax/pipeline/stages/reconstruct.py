"""Factorization with data as a stage: ranks from responses, factors fitted layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cnnjax import factorization, graph, training
from cnnjax.pipeline.context import Context
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.factorize import (
    LayerRule,
    accuracy_of,
    example_image,
    recalibrated,
    training_images,
)


@stage("reconstruct")
@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """Replaces layers by factors that answer like the original network on training images.

    Zhang et al. 2016 (1505.06798) with ``basis`` or ``asymmetric_3d`` rules and ``macs``; Jaderberg
    et al. 2014 (1405.3866) with the others. Fine-tune by a ``train`` stage behind it.

    Attributes:
      rules: ``{path glob: what to do}``, the first match counts; layers of no glob stay.
      macs: share of the MACs of the rules' layers to reach by ranks from PCA energy over the whole
        network; 0: every rule's own rank.
      images: training images whose responses are fitted.
      fit: how, see `cnnjax.factorization.Reconstruction`.
      recalibrate: training images whose BatchNorm statistics the new network takes over; 0: keeps
        those of the fitted responses.
    """

    rules: Mapping[str, LayerRule] = dataclasses.field(
        default_factory=lambda: {"**": LayerRule("asymmetric_3d")}
    )
    macs: float = 0.5
    images: int = 1000
    fit: factorization.Reconstruction = dataclasses.field(
        default_factory=factorization.Reconstruction
    )
    recalibrate: int = 0
    restructures = True

    def __post_init__(self) -> None:
        if not 0 <= self.macs < 1:
            raise ValueError(f"macs is {self.macs}; expected a share in [0, 1)")
        if self.images < 1 or self.recalibrate < 0:
            raise ValueError(
                f"images is {self.images} and recalibrate {self.recalibrate}; expected numbers of "
                "images"
            )
        if not self.rules:
            raise ValueError("rules is empty: name at least one glob, e.g. {'**': {...}}")

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is not None:
            raise ValueError("layers are factorized before weights: put this stage before masks")
        image = example_image(context)
        model = training.set_mode(network.model, train=False)
        rules: Any = {glob: layer.rule() for glob, layer in self.rules.items()}
        batches = training_images(context, self.images)
        if self.macs:
            decided = factorization.pca_plan(model, rules, batches, self.macs, example=image)
        else:
            decided = factorization.plan(model, rules, image)
        small, fits = factorization.reconstruct(
            model, decided, batches, example=image, options=self.fit, key=context.key("factors")
        )
        accuracy = {
            "accuracy_before": accuracy_of(model, context),
            "accuracy_after_reconstruction": accuracy_of(small, context),
        }
        if self.recalibrate:
            small = recalibrated(small, context, self.recalibrate)
            accuracy["accuracy_after_recalibration"] = accuracy_of(small, context)
        old, new = graph.profile(model, image), graph.profile(small, image)
        metrics = {
            **accuracy,
            "macs_share": new.macs / old.macs,
            "params_share": new.params / old.params,
            "layers": factorization.report(decided),
            "fits": [dataclasses.asdict(fit) for fit in fits],
        }
        return Outcome(dataclasses.replace(network, model=small), metrics)
