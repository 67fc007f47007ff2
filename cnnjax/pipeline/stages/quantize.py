"""Uniform quantization as a stage: trained through the rounding, then stored as integers.

Quantization-aware training with the straight-through estimator (Bengio et al. 2013, arXiv
1308.3432; Jacob et al. 2018, arXiv 1712.05877): the loss sees the rounded weights, the gradient
goes to the unrounded ones. The network that the stage hands on is the one read back from the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx

from cnnjax import coding, pruning, training, tree
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.masking import mask_averages, params_of, with_params

PyTree = Any


@stage("quantize")
@dataclasses.dataclass(frozen=True)
class Quantize:
    """Uniform codes of the chosen leaves, and the compressed file ``quantized.cnnz``.

    Attributes:
      recipe: of the training through the rounding.
      tune: whether to train at all; without, weights are only rounded.
      bits: 2 to 16, or ``{glob: bits}`` with the first match deciding.
      include: globs of the leaves to quantize.
      exclude: globs of the leaves not to quantize.
      symmetric: grid centred on zero, see `cnnjax.coding.uniform.grid`.
      per_channel: one scale per output channel; else one per tensor.
      method: entropy coder of the file, ``auto`` takes the smallest per stream.
    """

    recipe: Recipe = dataclasses.field(default_factory=lambda: Recipe(epochs=1.0))
    tune: bool = True
    bits: int | Mapping[str, int] = 8
    include: tuple[str, ...] = ("**/kernel",)
    exclude: tuple[str, ...] = ()
    symmetric: bool = True
    per_channel: bool = True
    method: str = "auto"

    def check(self, params: PyTree) -> None:
        """Refuses globs that match nothing and widths that do not exist, before any work."""
        chosen = tree.flatten(tree.select(params, self.include, self.exclude))
        widths = [self.bits] if isinstance(self.bits, int) else list(self.bits.values())
        for width in widths:
            coding.uniform.code_range(width, self.symmetric)
        if isinstance(self.bits, Mapping):
            tree.check_patterns(list(self.bits), [p for p, c in chosen.items() if c], what="bits")

    def _options(self) -> dict[str, Any]:
        return {
            "include": self.include,
            "exclude": self.exclude,
            "symmetric": self.symmetric,
            "axis": -1 if self.per_channel else None,
        }

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        bits: Any = self.bits
        model = network.model
        metrics: dict[str, Any] = {}
        if self.tune:
            rounded = coding.quantize_tree(params_of(model), bits, **self._options())
            metrics["accuracy_untrained"] = accuracy(
                with_params(model, coding.expand(rounded)), context
            )
            model = self._train(network, context)
        coded = coding.quantize_tree(params_of(model), bits, **self._options())
        coded = coding.complete(coded, model)
        blob = coding.pack(
            coded, metadata={"stage": context.name, "seed": context.seed}, method=self.method
        )
        if jax.process_index() == 0:
            coding.save(context.folder / "quantized.cnnz", blob)
        sizes = coding.report(blob)
        metrics |= {
            "file_bytes": len(blob),
            "file_ratio": sizes.ratio,
            "sizes": sizes.as_dict(),
        }
        loaded = coding.restore(model, coding.decompress(blob))
        return Outcome(dataclasses.replace(network, model=loaded), metrics)

    def _train(self, network: Carry, context: Context) -> nnx.Module:
        mask = network.mask
        hooks = training.Hooks(loss=training.classification_loss(self.recipe.label_smoothing))
        if mask is not None:
            hooks = mask_averages(self.recipe)
        bits: Any = self.bits
        options = self._options()

        def reparam(params: PyTree, step: Any) -> PyTree:
            del step
            return coding.fake_quantize_tree(params, bits, **options)

        trained = context.train(
            network.model,
            self.recipe,
            wrap=None if mask is None else lambda optimizer: pruning.masked(optimizer, mask),
            hooks=dataclasses.replace(hooks, reparam=reparam),
        )
        return trained.model()


def accuracy(model: nnx.Module, context: Context) -> float:
    """Top-1 of a network on the test split."""
    network, state = training.create_state(model, optax.set_to_zero())
    return float(context.evaluate(network, state)["top1"])
