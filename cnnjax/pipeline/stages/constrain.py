"""Separable layers trained from scratch as a stage: put a ``train`` stage behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from cnnjax import data, factorization, graph, models, training
from cnnjax.pipeline.config import ModelSpec
from cnnjax.pipeline.context import Context
from cnnjax.pipeline.fields import model_fields
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.factorize import LayerRule, example_image


@stage("constrain")
@dataclasses.dataclass(frozen=True)
class Constrain:
    """Convolutions become ``kh x 1``, BatchNorm, ``1 x kw``, BatchNorm (Tai et al., 1511.06067).

    Attributes:
      rules: ``{path glob: what to do}`` with method ``spatial`` or ``keep``, first match.
      start: ``he``, ``svd`` (of a random kernel) or ``weights`` (of the network's own).
      norm: whether BatchNorm stands between the halves.
      model: a fresh network to start from; None: the network that comes in.
    """

    rules: Mapping[str, LayerRule] = dataclasses.field(
        default_factory=lambda: {"**": LayerRule("spatial")}
    )
    start: str = "he"
    norm: bool = True
    model: ModelSpec | None = None
    restructures = True

    def __post_init__(self) -> None:
        if self.start not in ("he", "svd", "weights"):
            raise ValueError(f"start is {self.start!r}; expected 'he', 'svd' or 'weights'")
        for glob, layer in self.rules.items():
            if layer.method not in ("spatial", "keep"):
                raise ValueError(f"rules.{glob}: method {layer.method!r}; 'spatial' or 'keep'")
        if not self.rules:
            raise ValueError("rules is empty: name at least one glob, e.g. {'**': {...}}")

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is not None:
            raise ValueError("layers are factorized before weights: put this stage before masks")
        image = example_image(context)
        model = network.model
        if self.model is not None:
            described = data.info(context.data.name, context.data.data_dir or None)
            fields = model_fields(self.model, context.data, described)
            model = models.create(self.model.name, rngs=nnx.Rngs(context.seed), **fields)
        model = training.set_mode(model, train=False)
        rules: Any = {glob: layer.rule() for glob, layer in self.rules.items()}
        decided = factorization.plan(model, rules, image)
        small = factorization.constrain_low_rank(
            model,
            decided,
            example=image,
            start=self.start,
            norm=self.norm,
            key=context.key("start"),
        )
        old, new = graph.profile(model, image), graph.profile(small, image)
        metrics = {
            "macs_share": new.macs / old.macs,
            "params_share": new.params / old.params,
            "layers": factorization.report(decided),
        }
        return Outcome(dataclasses.replace(network, model=small), metrics)
