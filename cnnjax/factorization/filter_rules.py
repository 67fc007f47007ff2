"""Rules that factorize the spatial axes with filters shared by all channels.

General Tucker over all four axes, a given separable transform (DCT, Haar), and separable filters
learned from the kernel's own slices.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.factorization.chain import Chain, ConvSpec, split_groups
from cnnjax.factorization.matrix import einsum
from cnnjax.factorization.rules import EVBMF, Energy, Rank, Ranks, Rule, Stages, per_group
from cnnjax.factorization.transforms import dct_matrix, haar_matrix, learn_separable_filters
from cnnjax.factorization.tucker import tucker_hooi, unfold


@dataclasses.dataclass(frozen=True)
class Tucker(Rule):
    """Tucker over all modes, ranks (vertical, horizontal, input, output).

    ``1x1`` to the input rank, depthwise ``kh x 1`` and ``1 x kw`` with the spatial ranks as
    multipliers, the core as a ``1x1``, ``1x1`` to the outputs. A single ``rank`` (a share or a
    budget) cuts the spatial modes too; where those stay whole `Tucker2` is the cheaper form.

    Attributes:
      sweeps: of higher-order orthogonal iteration.
    """

    sweeps: int = 20

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """The four unfoldings."""
        return [np.asarray(unfold(kernel, mode)) for mode in range(4)]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """(kh, kw, i, o)."""
        return tuple(shape)

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        kh, kw, i, o = shape
        p, q, r, s = ranks
        g = spec.groups
        return [
            ((1, 1, i, g * r), spec.pointwise()),
            ((kh, 1, 1, g * r * p), spec.vertical(g * r)),
            ((1, kw, 1, g * r * p * q), spec.horizontal(g * r * p)),
            ((1, 1, r * p * q, g * s), spec.pointwise()),
            ((1, 1, s, o), spec.pointwise()),
        ]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """1x1, depthwise kh x 1, depthwise 1 x kw, 1x1, 1x1."""
        p, q, r, s = ranks

        def factors(block: Array) -> tuple[Array, ...]:
            core, (fh, fw, fi, fo) = tucker_hooi(block, ranks, sweeps=self.sweeps)
            return (
                fi[None, None],
                jnp.tile(fh, (1, r))[:, None, None],  # channel (r, p)
                jnp.tile(fw, (1, r * p))[None, :, None],  # channel (r, p, q)
                core.transpose(2, 0, 1, 3).reshape(1, 1, r * p * q, s),
                fo.T[None, None],
            )

        parts = per_group(factors, kernel, spec.groups)
        specs = tuple(stage for _, stage in self.stages(kernel.shape, ranks, spec))
        return Chain(tuple(parts), specs, bias)


def _shared_stages(
    shape: tuple[int, ...], vertical: int, horizontal: int, spec: ConvSpec
) -> Stages:
    """Depthwise with ``vertical``, then ``horizontal`` filters for each of those, then 1x1."""
    kh, kw, i, o = shape
    n = i * spec.groups
    return [
        ((kh, 1, 1, n * vertical), spec.vertical(n)),
        ((1, kw, 1, n * vertical * horizontal), spec.horizontal(n * vertical)),
        ((1, 1, i * vertical * horizontal, o), spec.pointwise()),
    ]


@dataclasses.dataclass(frozen=True)
class SeparableTransform(Rule):
    """A fixed separable transform of every window, then a learned mix of its first coefficients.

    Depthwise ``kh x 1`` and ``1 x kw`` with the rows of the transform (not trained), ``1x1``.
    ``rank``: how many of the lowest (vertical, horizontal) frequencies are kept; all: exact.

    Attributes:
      transform: ``"dct"``, or ``"haar"`` (even kernel sizes: averages first, then differences).
    """

    rank: Rank = 2
    transform: str = "dct"

    spectral: ClassVar[bool] = False
    fixed_stages: ClassVar[tuple[int, ...]] = (0, 1)

    def __post_init__(self) -> None:
        if self.transform not in ("dct", "haar"):
            raise ValueError(f"transform is {self.transform!r}; expected 'dct' or 'haar'")
        if self.rank == "evbmf" or isinstance(self.rank, EVBMF | Energy):
            raise ValueError(
                f"SeparableTransform rank is {self.rank!r}: its coefficients have no spectrum; "
                "give numbers, a share or MacsRatio"
            )

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """(kh, kw)."""
        return (shape[0], shape[1])

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        return _shared_stages(shape, ranks[0], ranks[1], spec)

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """Depthwise kh x 1, depthwise 1 x kw, 1x1."""
        kh, kw, i, o = kernel.shape
        p, q = ranks
        n = i * spec.groups
        rows, columns = (jnp.asarray(self._matrix(k), kernel.dtype) for k in (kh, kw))
        rows, columns = rows[:p], columns[:q]
        # orthonormal rows: the coefficients of the kernel are those that its answers need
        mix = einsum("pa,qb,abio->ipqo", rows, columns, kernel).reshape(1, 1, i * p * q, o)
        kernels = (
            jnp.tile(rows.T, (1, n))[:, None, None],
            jnp.tile(columns.T, (1, n * p))[None, :, None],
            mix,
        )
        return Chain(kernels, tuple(s for _, s in self.stages(kernel.shape, ranks, spec)), bias)

    def _matrix(self, n: int) -> Float[np.ndarray, "n n"]:
        if n == 1:
            return np.ones((1, 1))
        return dct_matrix(n) if self.transform == "dct" else haar_matrix(n)


@dataclasses.dataclass(frozen=True)
class SeparableFilters(Rule):
    """``rank`` separable filters learned from all slices of the kernel, mixed by a ``1x1``.

    Rigamonti's dictionary: unlike `Scheme1` every input channel has the same filters.

    Attributes:
      steps: of the dictionary learning.
      penalty: see `learn_separable_filters`.
    """

    rank: Rank = 4
    steps: int = 300
    penalty: float = 1e-2

    spectral: ClassVar[bool] = False

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """(kh*kw, i*o): a lower bound of what separable filters need."""
        return [kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """(kh*kw,)."""
        return (shape[0] * shape[1],)

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        return _shared_stages(shape, ranks[0], 1, spec)

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """Depthwise kh x 1, depthwise 1 x kw, 1x1."""
        groups, inputs = spec.groups, kernel.shape[2]
        keys = jax.random.split(key, groups)
        fit = functools.partial(_filters, rank=ranks[0], steps=self.steps, penalty=self.penalty)
        v, h, mix = jax.vmap(fit)(keys, split_groups(kernel, groups))

        def depthwise(filters: Array) -> Array:
            # (g, m, taps) -> (taps, g*i*m): every input of a group has the group's filters
            each = jnp.repeat(filters[:, None], inputs, axis=1)
            return each.reshape(-1, filters.shape[-1]).T

        kernels = (
            depthwise(v)[:, None, None],
            depthwise(h)[None, :, None],
            jnp.moveaxis(mix, 0, 1).reshape(1, 1, mix.shape[1], -1),
        )
        return Chain(kernels, tuple(s for _, s in self.stages(kernel.shape, ranks, spec)), bias)


def _filters(
    key: Array, block: Array, *, rank: int, steps: int, penalty: float
) -> tuple[Array, Array, Array]:
    """(m, kh), (m, kw) and (i*m, o) of one group's kernel."""
    kh, kw, i, o = block.shape
    if rank == kh * kw:  # the taps themselves
        rows, columns = jnp.divmod(jnp.arange(rank), kw)
        v, h = jax.nn.one_hot(rows, kh), jax.nn.one_hot(columns, kw)
        v, h = v.astype(block.dtype), h.astype(block.dtype)
    else:
        # the slices' Gram matrix is all that the filters depend on: its triangular root has as
        # many rows as a filter has taps, whatever the number of channels
        slices = block.reshape(kh * kw, i * o).T
        root = jnp.linalg.qr(slices, mode="r")
        v, h, _ = learn_separable_filters(
            key, root.reshape(-1, kh, kw), rank, steps=steps, penalty=penalty
        )
    basis = einsum("ma,mb->abm", v, h).reshape(kh * kw, rank)
    weights = jnp.linalg.lstsq(basis, block.reshape(kh * kw, i * o))[0]
    return v, h, weights.reshape(rank, i, o).transpose(1, 0, 2).reshape(i * rank, o)
