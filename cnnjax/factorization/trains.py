"""Rules beyond the survey's: the dual filter basis, and the tensor train as four convolutions."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Array

from cnnjax.factorization import chain as chains
from cnnjax.factorization.chain import Chain, ConvSpec
from cnnjax.factorization.matrix import dual_filter_basis
from cnnjax.factorization.rules import Ranks, Rule, Stages, per_group
from cnnjax.factorization.tensor_train import tensor_train
from cnnjax.factorization.tucker import unfold


@dataclasses.dataclass(frozen=True)
class DualBasis(Rule):
    """``1x1, I -> r`` then ``k x k, r -> O``: cheaper than `Basis` where inputs are many."""

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """(i, kh*kw*o)."""
        return [np.asarray(unfold(kernel, 2))]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """min(i, kh*kw*o)."""
        return (min(shape[2], shape[0] * shape[1] * shape[3]),)

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        kh, kw, i, o = shape
        (r,) = ranks
        return [((1, 1, i, spec.groups * r), spec.pointwise()), ((kh, kw, r, o), spec)]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """1x1 then k x k."""
        parts = per_group(lambda k: dual_filter_basis(k, ranks[0]), kernel, spec.groups)
        return chains.dual_basis_chain(*parts, spec=spec, bias=bias)


@dataclasses.dataclass(frozen=True)
class TensorTrain(Rule):
    """``1x1``, ``kh x 1``, ``1 x kw``, ``1x1``: the tensor train over (i, kh, kw, o).

    Three ranks, one per bond; a rank beyond what the bond before it lets through is cut there.

    Reference:
      Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33(5), 2011.
    """

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """(i, kh*kw*o), (i*kh, kw*o), (i*kh*kw, o)."""
        kh, kw, i, o = kernel.shape
        train = np.transpose(np.asarray(kernel), (2, 0, 1, 3))
        return [train.reshape(n, -1) for n in (i, i * kh, i * kh * kw)]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """The smaller side of each unfolding."""
        kh, kw, i, o = shape
        return (min(i, kh * kw * o), min(i * kh, kw * o), min(i * kh * kw, o))

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        kh, kw, i, o = shape
        p, q, r = _bonds(kh, kw, ranks)
        g = spec.groups
        return [
            ((1, 1, i, g * p), spec.pointwise()),
            ((kh, 1, p, g * q), spec.vertical()),
            ((1, kw, q, g * r), spec.horizontal()),
            ((1, 1, r, o), spec.pointwise()),
        ]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """1x1, kh x 1, 1 x kw, 1x1."""
        bonds = _bonds(kernel.shape[0], kernel.shape[1], ranks)

        def factors(block: Array) -> tuple[Array, ...]:
            first, vertical, horizontal, last = tensor_train(block.transpose(2, 0, 1, 3), bonds)
            return (
                first[0][None, None],
                vertical.transpose(1, 0, 2)[:, None],
                horizontal.transpose(1, 0, 2)[None],
                last[..., 0][None, None],
            )

        parts = per_group(factors, kernel, spec.groups)
        outer = spec.pointwise()
        specs = (outer, spec.vertical(), spec.horizontal(), outer)
        return Chain(tuple(parts), specs, bias)


def _bonds(kh: int, kw: int, ranks: Ranks) -> tuple[int, int, int]:
    p, q, r = ranks
    q = min(q, p * kh)
    return p, q, min(r, q * kw)
