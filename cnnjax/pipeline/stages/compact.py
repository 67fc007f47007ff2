"""Compact feature maps as a stage: layers emit circulant codes, their readers decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cnnjax import factorization, graph, training
from cnnjax.pipeline.context import Context
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.factorize import accuracy_of, example_image, training_images


@stage("compact_maps")
@dataclasses.dataclass(frozen=True)
class CompactMaps:
    """Fewer feature maps by circulant codes (Wang et al., ICML 2017); fine-tune behind it.

    Attributes:
      widths: ``{path glob: channels that are left}``, counts or shares; the first match counts.
      images: training images on which codes and decoders are learned.
      steps: of learning a code.
    """

    widths: Mapping[str, int | float] = dataclasses.field(default_factory=lambda: {"**": 0.5})
    images: int = 1000
    steps: int = 300
    restructures = True

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("widths is empty: name at least one glob, e.g. {'conv1': 0.5}")
        if self.images < 1 or self.steps < 1:
            raise ValueError(
                f"images is {self.images} and steps {self.steps}; expected positive numbers"
            )

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is not None:
            raise ValueError("maps are compacted before weights: put this stage before masks")
        image = example_image(context)
        model = training.set_mode(network.model, train=False)
        small, layers = factorization.compact_maps(
            model,
            dict(self.widths),
            training_images(context, self.images),
            example=image,
            steps=self.steps,
            key=context.key("codes"),
        )
        old, new = graph.profile(model, image), graph.profile(small, image)
        metrics = {
            "accuracy_before": accuracy_of(model, context),
            "accuracy_after_coding": accuracy_of(small, context),
            "macs_share": new.macs / old.macs,
            "params_share": new.params / old.params,
            "layers": [dataclasses.asdict(layer) for layer in layers],
        }
        return Outcome(dataclasses.replace(network, model=small), metrics)
