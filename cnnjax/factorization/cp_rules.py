"""Rules whose factors are fitted, not read off singular values: CP, and Jaderberg's scheme 1."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array

from cnnjax.factorization import chain as chains
from cnnjax.factorization.chain import Chain, ConvSpec, split_groups
from cnnjax.factorization.cp import cp_als, cp_als_together
from cnnjax.factorization.cp_factors import balance, best_of
from cnnjax.factorization.cp_nls import cp_nls
from cnnjax.factorization.cp_tpm import cp_tpm
from cnnjax.factorization.rules import Ranks, Rule, Stages
from cnnjax.factorization.spatial import jaderberg_scheme1
from cnnjax.factorization.tucker import unfold


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

    def side_by_side(self, shape: tuple[int, ...], spec: ConvSpec) -> bool:
        """Alternating least squares of up to 64 channels: 1.2 to 2 times faster on a CPU; of more
        channels one by one is."""
        return self.solver == "als" and spec.groups == 1 and max(shape[2:]) <= 64

    def chains(self, keys: Array, kernels: Array, ranks: Ranks, spec: ConvSpec) -> list[Chain]:
        """See `Rule.chains`."""
        count, kh, kw, i, o = kernels.shape
        merged = self.merged
        tensors = kernels.reshape(count, kh * kw, i, o) if merged else kernels
        # the draws of `chain`, which first splits by groups
        draw = jax.vmap(lambda k: jax.random.split(jax.random.split(k, 1)[0], self.restarts))
        starts = draw(keys).reshape(-1)
        tensors = jax.numpy.repeat(tensors, self.restarts, axis=0)
        fits = cp_als_together(starts, tensors, ranks[0], sweeps=self.iterations)
        grouped = jax.tree.map(lambda x: x.reshape(count, self.restarts, *x.shape[1:]), fits)
        out = []
        for n in range(count):
            *spatial, fi, fo = best_of(jax.tree.map(lambda x, n=n: x[n], grouped))[0]
            if merged:
                out.append(chains.cp3_chain((spatial[0], fi, fo), (kh, kw), spec))
            else:
                out.append(chains.cp4_chain((*spatial, fi, fo), spec))
        return out

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
        if self.solver not in ("als", "nls"):
            raise ValueError(f"solver is {self.solver!r}; expected 'als', 'nls' or 'tpm'")
        keys = jax.random.split(key, self.restarts)
        if self.solver == "als":
            if self.restarts == 1:
                return cp_als(keys[0], tensor, rank, sweeps=self.iterations)[0]
            tensors = jax.numpy.broadcast_to(tensor, (self.restarts, *tensor.shape))
            return best_of(cp_als_together(keys, tensors, rank, sweeps=self.iterations))[0]
        return best_of(jax.vmap(lambda k: cp_nls(k, tensor, rank, steps=self.iterations))(keys))[0]


@functools.partial(jax.jit, static_argnums=2)
def _cp_errors(key: Array, tensors: Any, rank: int) -> Array:
    """Relative error of a short CP fit of each tensor."""
    keys = jax.random.split(key, tensors.shape[0])
    return cp_als_together(keys, tensors, rank, sweeps=25)[1].relative_error


def _per_group_cp(fn, key: Array, kernel: Array, groups: int) -> list[Array]:
    """Factors of all groups: (mode, g*R), the output factor (g*o, R)."""
    keys, blocks = jax.random.split(key, groups), split_groups(kernel, groups)
    if groups == 1:  # what is inside may branch: under vmap both sides would be computed
        parts = [part[None] for part in fn(keys[0], blocks[0])]
    else:
        parts = jax.vmap(fn)(keys, blocks)
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
