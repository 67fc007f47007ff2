"""Trained weights from a file, in place of training."""

from __future__ import annotations

import dataclasses
import pathlib

from flax import nnx

from cnnjax import data, models
from cnnjax.pipeline.config import DataConfig, ModelSpec
from cnnjax.pipeline.context import Context
from cnnjax.pipeline.fields import model_fields
from cnnjax.pipeline.registry import Carry, Known, Outcome, stage


@stage("pretrained")
@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network of the registry with weights from a file; the network that comes in is dropped.

    Attributes:
      weights: file as for `cnnjax.models.load_pretrained`.
      model: which network.
      skip: globs of paths that stay freshly initialised.
    """

    weights: str = ""
    model: ModelSpec = dataclasses.field(default_factory=ModelSpec)
    skip: tuple[str, ...] = ()
    restructures = True

    def foresee(self, known: Known, data_config: DataConfig, described: Any) -> Known:
        """See `cnnjax.pipeline.registry`."""
        fields = model_fields(self.model, data_config, described)
        return Known(models.abstract(self.model.name, **fields), known.teachers)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`.

        Raises:
          ValueError: no such file, or weights that don't fit.
        """
        if not pathlib.Path(self.weights).is_file():
            raise ValueError(
                f"stage {context.name!r}: no weights at {self.weights!r}; give the file with "
                f"--config.stages.{context.name}.weights=FILE"
            )
        described = data.info(context.data.name, context.data.data_dir or None)
        fields = model_fields(self.model, context.data, described)
        model = models.load_pretrained(
            self.model.name,
            self.weights,
            rngs=nnx.Rngs(context.seed),
            skip=self.skip,
            **fields,
        )
        return Outcome(Carry(model, None, network.extras))
