"""Low rank under a measured metric as a rule: of the inputs' second moment, or of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from cnnjax.factorization import chain as chains
from cnnjax.factorization.chain import Chain, ConvSpec, join_groups, split_groups
from cnnjax.factorization.matrix import weighted_svd
from cnnjax.factorization.modules import _linear
from cnnjax.factorization.rules import Basis, Ranks
from cnnjax.factorization.survey import Plan
from cnnjax.factorization.weighted import entrywise_low_rank, input_moments, loss_weights


@dataclasses.dataclass(frozen=True)
class Weighted(Basis):
    """`Basis` whose error counts under a metric that `with_metrics` measures on images.

    Attributes:
      metric: ``"inputs"``: the mean squared error of the layer's answers; ``"loss"``: every entry
        of the kernel as the loss of the wrong classes depends on it.
      rounds: of the alternation for ``"loss"``.
      measured: put in by `with_metrics`: (g, n, n) second moments, or weights of the kernel's
        shape.
    """

    metric: str = "inputs"
    rounds: int = 200
    measured: Any = dataclasses.field(default=None, compare=False, repr=False)

    compiled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.metric not in ("inputs", "loss"):
            raise ValueError(f"metric is {self.metric!r}; expected 'inputs' or 'loss'")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; expected at least 1")

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """k x k then 1x1."""
        kh, kw, i, _ = kernel.shape
        first, last = [], []
        for g, block in enumerate(split_groups(kernel, spec.groups)):
            left, right = self._factors(block.reshape(kh * kw * i, -1), g, spec.groups, ranks[0])
            first.append(left.reshape(kh, kw, i, -1))
            last.append(right[None, None])
        parts = (join_groups(jnp.stack(p)) for p in (first, last))
        return chains.basis_chain(*parts, spec=spec, bias=bias)

    def module(self, layer: Any, ranks: Ranks, key: Array) -> Any:
        """See `Rule.module`: a dense layer's two."""
        if not isinstance(layer, nnx.Linear):
            return None
        left, right = self._factors(layer.kernel[...], 0, 1, ranks[0])
        bias = None if layer.bias is None else layer.bias[...]
        return nnx.Sequential(_linear(layer, left, None), _linear(layer, right, bias))

    def _factors(self, matrix: Array, group: int, groups: int, rank: int) -> tuple[Array, Array]:
        if self.measured is None:
            raise ValueError(
                "a Weighted rule needs its metric measured: with_metrics(model, plan, batches)"
            )
        if self.metric == "inputs":
            return weighted_svd(matrix, jnp.asarray(self.measured[group]), rank)
        weights = np.asarray(self.measured)
        if weights.ndim == 4:
            weights = np.asarray(split_groups(weights, groups))[group]
        return entrywise_low_rank(matrix, weights.reshape(matrix.shape), rank, self.rounds)


def with_metrics(model: nnx.Module, decided: Plan, batches: Sequence[Any]) -> Plan:
    """The plan with the metrics that its `Weighted` rules ask for, measured on batches.

    Args:
      model: the network, run in evaluation mode.
      decided: from `plan`; returned as it is where no rule asks.
      batches: training inputs; with labels where a rule's metric is ``"loss"``.

    Raises:
      ValueError: no batches, or none with labels where they are needed.
    """
    asking = {
        metric: [
            p.path
            for p in decided.layers
            if isinstance(p.rule, Weighted) and p.rule.metric == metric and p.ranks
        ]
        for metric in ("inputs", "loss")
    }
    measured: dict[str, Any] = {}
    if asking["inputs"]:
        measured |= input_moments(model, asking["inputs"], batches)
    if asking["loss"]:
        measured |= loss_weights(model, asking["loss"], batches)
    if not measured:
        return decided
    layers = []
    for entry in decided.layers:
        if entry.path in measured:
            values = np.asarray(measured[entry.path])
            entry = dataclasses.replace(
                entry, rule=dataclasses.replace(entry.rule, measured=values)
            )
        layers.append(entry)
    return Plan(tuple(layers))
