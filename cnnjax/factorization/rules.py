"""Rules: what to do with a layer and with which rank, as frozen data.

``rank`` of every rule is one of: an int; a float in (0, 1], the share of the full rank;
`Energy` (share of the squared singular values kept); `MacsRatio` (largest rank whose chain costs
at most this share of the layer's MACs); `EVBMF` or ``"evbmf"``. A rule maps a group's kernel
(kh, kw, i, o) to factor arrays; `cnnjax.factorization.factorize` puts them into a network.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from cnnjax.factorization import chain as chains
from cnnjax.factorization.chain import Chain, ConvSpec, join_groups, split_groups
from cnnjax.factorization.cp import balance, best_of, cp_als, cp_tpm
from cnnjax.factorization.cp_nls import cp_nls
from cnnjax.factorization.matrix import filter_basis
from cnnjax.factorization.spatial import jaderberg_scheme1, spatial_svd, spatial_unfolding
from cnnjax.factorization.tucker import tucker2, unfold
from cnnjax.typing import AnyArray

Kernel = Float[AnyArray, "kh kw i o"]
Ranks = tuple[int, ...]
Stages = list[tuple[tuple[int, ...], ConvSpec]]


@dataclasses.dataclass(frozen=True)
class Energy:
    """The smallest rank that keeps this share of the squared singular values."""

    share: float


@dataclasses.dataclass(frozen=True)
class MacsRatio:
    """The largest rank whose chain costs at most this share of the layer's MACs."""

    ratio: float


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

Rank = int | float | str | Energy | MacsRatio | EVBMF | tuple


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

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """Kernel shapes and geometries of the chain, without building it.

        Args:
          shape: (kh, kw, i/groups, o) of the whole kernel.
          ranks: per group.
          spec: geometry.
        """
        raise NotImplementedError

    def retained(self, key: Array, blocks: Any, ranks: Ranks) -> float:
        """Share of the energy that a fit keeps, measured; for rules that are not ``spectral``.

        Args:
          key: for random starts.
          blocks: (g, kh, kw, i, o), the kernel of every group.
          ranks: of the fit.
        """
        raise NotImplementedError

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


@dataclasses.dataclass(frozen=True)
class CP(Rule):
    """CP: ``1x1``, depthwise spatial, ``1x1``.

    Attributes:
      solver: ``"als"``, ``"nls"`` (Levenberg-Marquardt) or ``"tpm"`` (greedy power method).
      separable: True keeps ``kh x 1`` and ``1 x kw`` apart (four stages); False decomposes with the
        spatial modes merged (three stages, always so for ``"tpm"``).
      restarts: random starts, the best is kept.
      iterations: sweeps or steps, at most.
    """

    solver: str = "als"
    separable: bool = True
    restarts: int = 2
    iterations: int = 100

    spectral: ClassVar[bool] = False

    @property
    def merged(self) -> bool:
        """Whether the spatial modes are one."""
        return not self.separable or self.solver == "tpm"

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """The larger of the channel unfoldings (a lower bound of the CP rank)."""
        mode = 2 if kernel.shape[2] >= kernel.shape[3] else 3
        return [np.asarray(unfold(kernel, mode))]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """A rank at which every kernel of this shape is exact."""
        modes = (shape[0] * shape[1], *shape[2:]) if self.merged else shape
        return (math.prod(sorted(modes)[:-1]),)

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        kh, kw, i, o = shape
        (r,) = ranks
        n = spec.groups * r
        inner: Stages = [((kh, kw, 1, n), spec.with_groups(n))]
        if not self.merged:
            inner = [((kh, 1, 1, n), spec.vertical(n)), ((1, kw, 1, n), spec.horizontal(n))]
        return [((1, 1, i, n), spec.pointwise()), *inner, ((1, 1, r, o), spec.pointwise())]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """1x1, depthwise (one or two stages), 1x1."""
        kh, kw, i, _ = kernel.shape
        merged = self.merged

        def factors(key: Array, block: Array) -> tuple[Array, ...]:
            tensor = block.reshape(kh * kw, i, -1) if merged else block
            return tuple(f.T for f in self._fit(key, tensor, ranks[0]))

        *spatial, fi, fo = _per_group_cp(factors, key, kernel, spec.groups)
        groups = spec.groups
        rank = groups * ranks[0]
        outer = spec.pointwise()
        stages: list[tuple[Array, ConvSpec]] = [(fi[None, None], outer)]
        if merged:
            stages.append((spatial[0].reshape(kh, kw, 1, rank), spec.with_groups(rank)))
        else:
            stages.append((spatial[0][:, None, None], spec.vertical(rank)))
            stages.append((spatial[1][None, :, None], spec.horizontal(rank)))
        # the last 1x1 is (r, o) per group, group-major along o
        last = fo.reshape(groups, -1, ranks[0]).transpose(2, 0, 1).reshape(ranks[0], -1)
        stages.append((last[None, None], outer))
        kernels, specs = zip(*stages)
        return Chain(tuple(kernels), tuple(specs), bias)

    def retained(self, key: Array, blocks: Any, ranks: Ranks) -> float:
        """See `Rule.retained`; a short fit, the same for all groups."""
        g, kh, kw, i, o = blocks.shape
        tensors = blocks.reshape(g, kh * kw, i, o) if self.merged else blocks
        errors = _cp_errors(key, tensors, ranks[0])
        squares = (np.asarray(blocks, np.float64) ** 2).reshape(g, -1).sum(1)
        return 1 - float((np.asarray(errors) ** 2 * squares).sum() / max(squares.sum(), 1e-30))

    def _fit(self, key: Array, tensor: Array, rank: int) -> list[Array]:
        if self.solver == "tpm":
            return balance(cp_tpm(key, tensor, rank)[0])
        solvers = {"als": _als, "nls": _nls}
        if self.solver not in solvers:
            raise ValueError(f"solver is {self.solver!r}; expected 'als', 'nls' or 'tpm'")
        run = jax.vmap(lambda k: solvers[self.solver](k, tensor, rank, self.iterations))
        return best_of(run(jax.random.split(key, self.restarts)))[0]


@functools.partial(jax.jit, static_argnums=2)
def _cp_errors(key: Array, tensors: Any, rank: int) -> Array:
    """Relative error of a short CP fit of each tensor."""
    keys = jax.random.split(key, tensors.shape[0])
    fit = jax.vmap(lambda k, t: cp_als(k, t, rank, sweeps=25)[1].relative_error)
    return fit(keys, tensors)


def _als(key: Array, tensor: Array, rank: int, iterations: int):
    return cp_als(key, tensor, rank, sweeps=iterations)


def _nls(key: Array, tensor: Array, rank: int, iterations: int):
    return cp_nls(key, tensor, rank, steps=iterations)


def _per_group_cp(fn, key: Array, kernel: Array, groups: int) -> list[Array]:
    """Factors of all groups: (mode, g*R), the output factor (g*o, R)."""
    parts = jax.vmap(fn)(jax.random.split(key, groups), split_groups(kernel, groups))
    *inner, last = parts  # each (g, R, mode)
    out = [p.transpose(2, 0, 1).reshape(p.shape[2], -1) for p in inner]
    return [*out, last.transpose(0, 2, 1).reshape(-1, last.shape[1])]


@dataclasses.dataclass(frozen=True)
class Scheme1(Rule):
    """A separable basis per input channel (Jaderberg's scheme 1); ungrouped layers only."""

    restarts: int = 4
    sweeps: int = 200
    spectral: ClassVar[bool] = False

    def retained(self, key: Array, blocks: Any, ranks: Ranks) -> float:
        """See `Rule.retained`; the CP error of every input channel's (kh, kw, o)."""
        channels = np.moveaxis(np.asarray(blocks[0]), 2, 0)
        squares = (channels.astype(np.float64) ** 2).reshape(len(channels), -1).sum(1)
        errors = np.asarray(_cp_errors(key, channels, ranks[0]), np.float64)
        return 1 - float((errors**2 * squares).sum() / max(squares.sum(), 1e-30))

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """(kh*kw, i*o)."""
        return [kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """kh*kw."""
        return (shape[0] * shape[1],)

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        kh, kw, i, o = shape
        n = i * ranks[0]
        return [
            ((kh, 1, 1, n), spec.vertical(i)),
            ((1, kw, 1, n), spec.horizontal(n)),
            ((1, 1, n, o), spec.with_groups(1).pointwise()),
        ]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """Depthwise kh x 1, depthwise 1 x kw, 1x1."""
        if spec.groups != 1:
            raise ValueError(
                f"Scheme1 takes ungrouped convolutions, this one has {spec.groups} groups; use "
                "Spatial, Tucker2 or CP"
            )
        parts = jaderberg_scheme1(key, kernel, ranks[0], restarts=self.restarts, sweeps=self.sweeps)
        return chains.scheme1_chain(*parts, spec=spec, bias=bias)
