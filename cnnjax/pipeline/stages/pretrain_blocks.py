"""Supervised pre-training of a NiN, one mlpconv block after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax
from flax import nnx

from cnnjax import tree
from cnnjax.models import mpnin
from cnnjax.models.nin import NiN
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.registry import Carry, Outcome, stage


@stage("pretrain_blocks")
@dataclasses.dataclass(frozen=True)
class PretrainBlocks:
    """MPNIN's initialisation (Han, Dai, Applied Intelligence 48(1), 2018); train end to end behind.

    Each block is trained under a temporary classifier while the blocks before it stay as they are,
    batch statistics included. The curve has each block's test accuracy under its classifier.

    Attributes:
      recipe: of every block; its optimizer starts afresh each time.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)

    def check(self, params: Mapping[str, Any]) -> None:
        """Raises ValueError for a network without mlpconv blocks, before any work."""
        if "mlps" not in params:
            raise ValueError(
                "pretrain_blocks needs the mlpconv blocks of a NiN (nin_*, cic, mpnin); this "
                f"network has {', '.join(map(str, params))}"
            )

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`.

        Raises:
          ValueError: the network is no NiN, or an earlier stage removed weights.
        """
        model = network.model
        if not isinstance(model, NiN):
            raise ValueError(f"pretrain_blocks takes a NiN, got {type(model).__name__}")
        if network.mask is not None:
            raise ValueError("pretrain_blocks comes before stages that remove weights")
        model, curve = nnx.clone(model), []
        for index in range(len(model.mlps)):
            rngs = nnx.Rngs(params=context.key(f"head{index}"))
            block = mpnin.BlockStage(model, index, rngs=rngs)

            def only_this(
                optimizer: optax.GradientTransformation, block: Any = block
            ) -> optax.GradientTransformation:
                def label(path: str, leaf: Any) -> str:
                    return "learns" if block.holds(path) else "stays"

                params = nnx.to_pure_dict(nnx.state(block, nnx.Param))
                rules: Any = {"learns": optimizer, "stays": optax.set_to_zero()}
                return optax.partition(rules, tree.map_with_path(label, params))

            trained = context.train(block, self.recipe, name=f"block{index}", wrap=only_this)
            last = trained.fit.last("eval")
            curve.append({"block": index, "accuracy": last["top1"], "loss": last["loss"]})
            model = trained.model().model
        metrics = {f"accuracy_block{p['block']}": p["accuracy"] for p in curve}
        return Outcome(dataclasses.replace(network, model=model), metrics, curve)
