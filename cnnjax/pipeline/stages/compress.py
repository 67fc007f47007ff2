"""Deep compression as a stage: share the survivors, tune the codebooks, write the file.

Han, Mao, Dally, ICLR 2016, arXiv 1510.00149. Put it after a pruning stage; the network that it
hands on, and that is evaluated, is the one read back from the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from cnnjax import coding, training, tree
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.masking import params_of, with_params

PyTree = Any


@stage("deep_compression")
@dataclasses.dataclass(frozen=True)
class DeepCompression:
    """Weight sharing, codebook tuning and the compressed file ``compressed.cnnz``.

    Attributes:
      recipe: training of the codebooks (and biases); of it the epochs, optimizer, schedule, label
        smoothing, steps per call and compute type are used.
      tune: whether to train the codebooks at all.
      bits: codebook bits, or ``{glob: bits}`` with the first match deciding.
      include: globs of the leaves to share.
      exclude: globs of the leaves not to share.
      init: start of k-means: ``linear`` or ``density``.
      centroid_dtype: type of the stored codebooks; empty keeps float32.
      other_dtype: type of the other stored floats (biases, normalization); empty keeps theirs.
      method: entropy coder, ``auto`` takes the smallest per stream.
    """

    recipe: Recipe = dataclasses.field(default_factory=lambda: Recipe(epochs=1.0))
    tune: bool = True
    bits: int | Mapping[str, int] = 5
    include: tuple[str, ...] = ("**/kernel",)
    exclude: tuple[str, ...] = ()
    init: str = "linear"
    centroid_dtype: str = "float16"
    other_dtype: str = ""
    method: str = "auto"

    def check(self, params: PyTree) -> None:
        """Refuses globs that match nothing, and leaves without bits, before any work."""
        chosen = tree.flatten(tree.select(params, self.include, self.exclude))
        if isinstance(self.bits, Mapping):
            tree.check_patterns(list(self.bits), [p for p, c in chosen.items() if c], what="bits")

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        params = jax.device_get(params_of(network.model))
        options = coding.DeepCompression(
            bits=self.bits if isinstance(self.bits, int) else tuple(self.bits.items()),
            include=self.include,
            exclude=self.exclude,
            init=self.init,
            centroid_dtype=self.centroid_dtype or None,
            other_dtype=self.other_dtype or None,
            method=self.method,
        )
        untuned: dict[str, float] = {}

        def finetune(coded: PyTree) -> PyTree:
            shared = with_params(network.model, coding.expand(coded))
            if self.tune:
                untuned["accuracy_untuned"] = _accuracy(shared, context)
                coded = self._tune(shared, coded, context)
            # the file holds everything that the network needs, running statistics too
            return coding.complete(coded, with_params(network.model, coding.expand(coded)))

        blob = coding.compress(
            params,
            options,
            finetune=finetune,
            metadata={"stage": context.name, "seed": context.seed},
        )
        if jax.process_index() == 0:
            coding.save(context.folder / "compressed.cnnz", blob)
        report = coding.report(blob)
        model = coding.restore(network.model, coding.decompress(blob))
        metrics = {"file_bytes": len(blob), "file_ratio": report.ratio, **untuned}
        return Outcome(
            dataclasses.replace(network, model=model), metrics | {"sizes": report.as_dict()}
        )

    def _tune(self, model: nnx.Module, coded: PyTree, context: Context) -> PyTree:
        recipe = self.recipe
        loader = context.train_loader()
        try:
            per_epoch, call = loader.steps_per_epoch, recipe.steps_per_call
            steps = max(1, round(recipe.epochs * per_epoch / call)) * call
            rate = training.build_schedule(
                recipe.schedule, total_steps=steps, steps_per_epoch=per_epoch
            )
            tuned = coding.finetune_codebooks(
                model,
                coded,
                loader,
                training.build_optimizer(recipe.optimizer, rate),
                steps=steps,
                hooks=training.Hooks(loss=training.classification_loss(recipe.label_smoothing)),
                config=recipe.step_config(),
                seed=context.seed,
            )
        finally:
            loader.close()
        return jax.tree.map(np.asarray, tuned)


def _accuracy(model: nnx.Module, context: Context) -> float:
    """Top-1 on the test split."""
    network, state = training.create_state(model, optax.set_to_zero())
    return float(context.evaluate(network, state)["top1"])
