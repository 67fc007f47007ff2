"""Rules: what to do with a layer and with which rank, as frozen data.

``rank`` of every rule is one of: an int; a float in (0, 1], the share of the full rank;
`Energy` (share of the squared singular values kept); `MacsRatio` (largest rank whose chain costs
at most this share of the layer's MACs); `EVBMF` or ``"evbmf"``. A rule maps a group's kernel
(kh, kw, i, o) to factor arrays; `cnnjax.factorization.factorize` puts them into a network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from cnnjax.factorization import chain as chains
from cnnjax.factorization.chain import (
    Chain,
    ConvSpec,
    join_groups,
    split_groups,
    stages_cost,
)
from cnnjax.factorization.compose import compose_chain
from cnnjax.factorization.matrix import filter_basis
from cnnjax.factorization.spatial import spatial_svd, spatial_unfolding
from cnnjax.factorization.tucker import tucker2, unfold
from cnnjax.typing import AnyArray

Kernel = Float[AnyArray, "kh kw i o"]
Ranks = tuple[int, ...]
Stages = list[tuple[tuple[int, ...], ConvSpec]]


def _check_share(value: float, what: str) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{what} is {value}; expected a share in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Energy:
    """The smallest rank that keeps this share of the squared singular values."""

    share: float

    def __post_init__(self) -> None:
        _check_share(self.share, "Energy share")


@dataclasses.dataclass(frozen=True)
class MacsRatio:
    """The largest rank whose chain costs at most this share of the layer's MACs."""

    ratio: float

    def __post_init__(self) -> None:
        _check_share(self.ratio, "MacsRatio ratio")


@dataclasses.dataclass(frozen=True)
class EVBMF:
    """The rank by empirical variational Bayes, weakened towards the full one.

    Attributes:
      weaken: w of ``rank + w * (full - rank)``: 0 takes the (often very low) rank as it is.
      search: ``"brent"`` or ``"global"``, see `cnnjax.factorization.evbmf_rank`.
    """

    weaken: float = 0.0
    search: str = "brent"

    def __post_init__(self) -> None:
        if not 0 <= self.weaken <= 1:
            raise ValueError(f"EVBMF weaken is {self.weaken}; expected a share in [0, 1]")


KINDS = "expected an int, a share (float), Energy, MacsRatio, EVBMF or 'evbmf'"

Rank = int | float | np.integer | np.floating | str | Energy | MacsRatio | EVBMF | tuple


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base of all rules.

    Attributes:
      rank: see the module's docstring; a pair where a rule has two ranks.
      depthwise: also factorize layers with one input channel per group.
      always: factorize even where the chain is not cheaper.
    """

    rank: Rank = MacsRatio(0.5)
    depthwise: bool = False
    always: bool = False
    # the factors come out of one compiled function; False for what runs on the host
    compiled: ClassVar[bool] = True
    # the singular values of `matrices` tell what a rank keeps
    spectral: ClassVar[bool] = True
    # takes dense layers too, as 1x1 convolutions of one position
    dense: ClassVar[bool] = False
    # what must become fewer for a replacement to be worth while: "macs" or "params"
    saves: ClassVar[str] = "macs"
    # stages whose kernels are given, not learned: training leaves them alone
    fixed_stages: ClassVar[tuple[int, ...]] = ()

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """The unfoldings whose singular values judge each rank."""
        raise NotImplementedError

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """The full rank(s) of a group's kernel shape."""
        raise NotImplementedError

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """The chain of a whole (grouped) kernel."""
        raise NotImplementedError

    def side_by_side(self, shape: tuple[int, ...], spec: ConvSpec) -> bool:
        """Whether layers of this shape are fitted faster together, by `chains`."""
        return False

    def chains(self, keys: Array, kernels: Array, ranks: Ranks, spec: ConvSpec) -> list[Chain]:
        """The chains of several kernels of one shape, without biases."""
        raise NotImplementedError

    def module(self, layer: Any, ranks: Ranks, key: Array) -> Any:
        """The replacement of a layer where it is not a chain of convolutions; None: it is."""
        return None

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """Kernel shapes and geometries of the chain, without building it.

        Args:
          shape: (kh, kw, i/groups, o) of the whole kernel.
          ranks: per group.
          spec: geometry.
        """
        raise NotImplementedError

    def cost(
        self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec, size: tuple[int, int]
    ) -> tuple[int, int]:
        """(weights that are trained, MACs) of the chain on an image of ``size``."""
        stages = self.stages(shape, ranks, spec)
        given = sum(math.prod(stages[k][0]) for k in self.fixed_stages)
        weights, macs = stages_cost(stages, size)
        return weights - given, macs

    def objection(self, kernel: np.ndarray, ranks: Ranks) -> str | None:
        """Why the layer had better be kept whatever the cost, or None."""
        return None

    def retained(self, key: Array, blocks: Any, ranks: Ranks) -> float:
        """Share of the energy that a fit keeps, measured; for rules that are not ``spectral``.

        Args:
          key: for random starts.
          blocks: (g, kh, kw, i, o), the kernel of every group.
          ranks: of the fit.
        """
        kernel = np.asarray(join_groups(blocks), np.float64)
        spec = ConvSpec(groups=blocks.shape[0])
        made = self.chain(key, jax.numpy.asarray(kernel, np.float32), ranks, spec, None)
        again = np.asarray(compose_chain(made, kernel.shape[:2], spec.groups), np.float64)
        return 1 - float(((kernel - again) ** 2).sum() / max((kernel**2).sum(), 1e-30))

    def admissible(self, shape: tuple[int, ...], ranks: Ranks) -> Ranks:
        """The nearest ranks below that this shape can have; raises for a given one it cannot."""
        return ranks

    def break_even(self, shape: tuple[int, ...]) -> int:
        """Largest common rank with fewer weights than a group's kernel of ``shape`` (0: none)."""
        full, size = self.full(shape), math.prod(shape)
        low, high = 0, max(full)
        while low < high:
            middle = (low + high + 1) // 2
            ranks = tuple(min(middle, f) for f in full)
            weights = sum(math.prod(s) for s, _ in self.stages(shape, ranks, ConvSpec()))
            low, high = (middle, high) if weights < size else (low, middle - 1)
        return low


def per_group(fn: Callable[..., tuple[Array, ...]], kernel: Array, groups: int) -> Any:
    """Runs a factorization on every group's block; outputs become group-major."""
    return [join_groups(part) for part in jax.vmap(fn)(split_groups(kernel, groups))]


@dataclasses.dataclass(frozen=True)
class Basis(Rule):
    """``k x k, I -> r`` then ``1x1, r -> O``; the plain SVD for dense and 1x1 layers."""

    dense: ClassVar[bool] = True

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """(kh*kw*i, o)."""
        return [kernel.reshape(-1, kernel.shape[-1])]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """min(kh*kw*i, o)."""
        return (min(math.prod(shape[:3]), shape[3]),)

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        kh, kw, i, o = shape
        (r,) = ranks
        return [((kh, kw, i, spec.groups * r), spec), ((1, 1, r, o), spec.pointwise())]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """k x k then 1x1."""
        parts = per_group(lambda k: filter_basis(k, ranks[0]), kernel, spec.groups)
        return chains.basis_chain(*parts, spec=spec, bias=bias)


@dataclasses.dataclass(frozen=True)
class Spatial(Rule):
    """``kh x 1`` then ``1 x kw`` (Tai's closed form, Jaderberg's scheme 2)."""

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """(i*kh, o*kw)."""
        return [np.asarray(spatial_unfolding(kernel))]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """min(i*kh, o*kw)."""
        return (min(shape[2] * shape[0], shape[3] * shape[1]),)

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        kh, kw, i, o = shape
        (r,) = ranks
        return [
            ((kh, 1, i, spec.groups * r), spec.vertical()),
            ((1, kw, r, o), spec.horizontal()),
        ]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """kh x 1 then 1 x kw."""
        parts = per_group(lambda k: spatial_svd(k, ranks[0]), kernel, spec.groups)
        return chains.spatial_chain(*parts, spec=spec, bias=bias)


@dataclasses.dataclass(frozen=True)
class Tucker2(Rule):
    """``1x1, k x k, 1x1``; ``rank`` may be a pair (input, output).

    Attributes:
      sweeps: of higher-order orthogonal iteration.
    """

    sweeps: int = 10

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """The input and the output unfolding."""
        return [np.asarray(unfold(kernel, 2)), np.asarray(unfold(kernel, 3))]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """(i, o)."""
        return (shape[2], shape[3])

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        kh, kw, i, o = shape
        p, q = ranks
        return [
            ((1, 1, i, spec.groups * p), spec.pointwise()),
            ((kh, kw, p, spec.groups * q), spec),
            ((1, 1, q, o), spec.pointwise()),
        ]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """1x1, k x k, 1x1."""

        def factors(k: Array) -> tuple[Array, ...]:
            t = tucker2(k, *ranks, sweeps=self.sweeps)
            return t.first[None, None], t.core, t.last.T[None, None]

        return chains.tucker2_chain(*per_group(factors, kernel, spec.groups), spec=spec, bias=bias)
