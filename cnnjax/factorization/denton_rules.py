"""Denton's clustered decompositions as rules: shared colours, low rank in blocks of channels."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cnnjax.factorization.chain import Chain, ConvSpec
from cnnjax.factorization.denton import bicluster, monochromatic_conv
from cnnjax.factorization.rules import EVBMF, Energy, Rank, Ranks, Rule, Stages
from cnnjax.factorization.tucker import tucker2, unfold


def _ungrouped(spec: ConvSpec, name: str) -> None:
    if spec.groups != 1:
        raise ValueError(
            f"{name} takes ungrouped convolutions, this one has {spec.groups} groups; use "
            "Tucker2, Spatial or CP"
        )


@dataclasses.dataclass(frozen=True)
class Monochromatic(Rule):
    """Each output sees one colour: ``1x1`` to ``rank`` colours, then ``k x k`` of one input each.

    For first layers with few inputs: however many the colours, each output's kernel becomes of
    rank one, so no rank is exact. ``rank`` must divide the outputs (a share or a budget is rounded
    down to a divisor).

    Attributes:
      seed: of the clustering.
    """

    rank: Rank = 0.25
    seed: int = 0

    compiled: ClassVar[bool] = False
    spectral: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank == "evbmf" or isinstance(self.rank, EVBMF | Energy):
            raise ValueError(
                f"Monochromatic rank is {self.rank!r}: clusters have no spectrum; give a number, "
                "a share or MacsRatio"
            )

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """(o,)."""
        return (shape[3],)

    def admissible(self, shape: tuple[int, ...], ranks: Ranks) -> Ranks:
        """See `Rule.admissible`."""
        (colours,), outputs = ranks, shape[3]
        divisors = [d for d in range(1, outputs + 1) if outputs % d == 0]
        if isinstance(self.rank, int) and colours not in divisors:
            raise ValueError(
                f"{outputs} outputs do not divide into {colours} equal clusters of colours; "
                f"expected one of {divisors}"
            )
        return (max(d for d in divisors if d <= colours),)

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        _ungrouped(spec, "Monochromatic")
        kh, kw, i, o = shape
        return [
            ((1, 1, i, ranks[0]), spec.pointwise()),
            ((kh, kw, 1, o), spec.with_groups(ranks[0])),
        ]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """1x1, grouped k x k, outputs put back into order."""
        specs = tuple(s for _, s in self.stages(kernel.shape, ranks, spec))
        colour, spatial, order = monochromatic_conv(np.asarray(kernel), ranks[0], seed=self.seed)
        kernels = tuple(jnp.asarray(k, jnp.float32) for k in (colour, spatial))
        back = jnp.asarray(np.argsort(order))
        bias = None if bias is None else jnp.asarray(bias)[order]
        return Chain(kernels, specs, bias, (None, None, back))


@dataclasses.dataclass(frozen=True)
class Biclustered(Rule):
    """Tucker-2 in each block of similar inputs and outputs; ``rank`` may be a pair.

    Inputs are put into the order of their clusters; grouped ``1x1`` to every block's input rank,
    grouped ``k x k``, grouped ``1x1`` that also sums over the input clusters.

    Attributes:
      clusters: (of inputs, of outputs); they must divide the channels.
      sweeps: of higher-order orthogonal iteration.
      seed: of the clustering.
    """

    clusters: tuple[int, int] = (2, 2)
    sweeps: int = 10
    seed: int = 0

    compiled: ClassVar[bool] = False
    spectral: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "clusters", tuple(self.clusters))
        if len(self.clusters) != 2 or min(self.clusters) < 1:
            raise ValueError(f"clusters is {self.clusters}; expected two positive numbers")

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """The blocks' input unfoldings side by side, and their output unfoldings."""
        blocks = bicluster(kernel, *self.clusters, seed=self.seed).blocks
        return [
            np.concatenate([np.asarray(unfold(b, mode)) for row in blocks for b in row], axis=1)
            for mode in (2, 3)
        ]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """(i / input clusters, o / output clusters)."""
        for size, clusters, name in zip(shape[2:], self.clusters, ("input", "output")):
            if size % clusters:
                raise ValueError(f"{size} {name}s do not divide into {clusters} equal clusters")
        return shape[2] // self.clusters[0], shape[3] // self.clusters[1]

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        _ungrouped(spec, "Biclustered")
        kh, kw, i, o = shape
        (g, h), (p, q) = self.clusters, ranks
        outer = spec.pointwise()
        return [
            ((1, 1, i // g, g * h * p), outer.with_groups(g)),
            ((kh, kw, p, g * h * q), spec.with_groups(g * h)),
            ((1, 1, g * q, o), outer.with_groups(h)),
        ]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """Grouped 1x1, grouped k x k, grouped 1x1."""
        specs = tuple(s for _, s in self.stages(kernel.shape, ranks, spec))
        parts = bicluster(np.asarray(kernel), *self.clusters, seed=self.seed)
        (g, h), (p, q) = self.clusters, ranks
        blocks = jnp.asarray(parts.blocks, jnp.float32)
        fit = jax.vmap(jax.vmap(lambda b: tucker2(b, p, q, sweeps=self.sweeps)))
        first, core, last = fit(blocks)  # (g, h, i/g, p), (g, h, kh, kw, p, q), (g, h, o/h, q)
        kh, kw = kernel.shape[:2]
        kernels = (
            first.transpose(2, 0, 1, 3).reshape(1, 1, -1, g * h * p),
            core.transpose(2, 3, 4, 0, 1, 5).reshape(kh, kw, p, g * h * q),
            last.transpose(0, 3, 1, 2).reshape(1, 1, g * q, -1),
        )
        # from (g, h, q) to (h, g, q): the blocks of one output cluster side by side
        middle = jnp.arange(g * h * q).reshape(g, h, q).transpose(1, 0, 2).reshape(-1)
        back = jnp.asarray(np.argsort(parts.order_out))
        bias = None if bias is None else jnp.asarray(bias)[parts.order_out]
        return Chain(kernels, specs, bias, (jnp.asarray(parts.order_in), None, middle, back))
