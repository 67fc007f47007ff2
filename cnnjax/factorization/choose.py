"""Concrete ranks of a layer: given, a share, by energy, by EVBMF, or by a budget of MACs."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from cnnjax.factorization.chain import ConvSpec, conv_cost, split_groups, stages_cost
from cnnjax.factorization.matrix import energy_rank
from cnnjax.factorization.rules import EVBMF, KINDS, Energy, MacsRatio, Rank, Ranks, Rule
from cnnjax.factorization.vbmf import evbmf_rank
from cnnjax.typing import AnyArray

Kernel = Float[AnyArray, "kh kw i o"]


def choose_ranks(
    rule: Rule,
    kernel: Kernel,
    spec: ConvSpec,
    size: tuple[int, int] | None,
) -> Ranks:
    """Concrete ranks of a layer under a rule; at least 1, at most full.

    Args:
      rule: with its ``rank``.
      kernel: (kh, kw, i/groups, o) in whole.
      spec: geometry.
      size: input (height, width); needed by `MacsRatio`.

    Raises:
      ValueError: for a rank of 0 or above the maximum (named), an unknown rank kind, or a missing
        size.
    """
    blocks = np.asarray(split_groups(np.asarray(kernel), spec.groups), np.float64)
    full = rule.full(blocks.shape[1:])
    rank = rule.rank
    if isinstance(rank, np.integer | np.floating):
        rank = rank.item()
    name = type(rule).__name__
    if isinstance(rank, tuple):
        if len(rank) != len(full):
            raise ValueError(f"{name} has {len(full)} ranks, {len(rank)} given: {rank}")
        out = tuple(_single(rule, blocks, r, k, full[k], name) for k, r in enumerate(rank))
    elif isinstance(rank, MacsRatio):
        if size is None:
            raise ValueError("a MacsRatio rank needs example= (the input sizes of the layers)")
        out = _by_macs(rule, tuple(np.shape(kernel)), full, rank.ratio, spec, size)
    else:
        out = tuple(_single(rule, blocks, rank, k, full[k], name) for k in range(len(full)))
    return rule.admissible(blocks.shape[1:], out)


def _single(rule: Rule, blocks: np.ndarray, rank: Rank, k: int, full: int, name: str) -> int:
    if rank == "evbmf":
        rank = EVBMF()
    if isinstance(rank, bool) or not isinstance(rank, int | float | EVBMF | Energy):
        raise ValueError(f"{name} rank is {rank!r}; {KINDS}")
    if isinstance(rank, int):
        if not 1 <= rank <= full:
            raise ValueError(f"{name} rank is {rank}; expected 1 to {full}")
        return rank
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(f"{name} rank is the share {rank}; expected one in (0, 1]")
        return max(1, round(rank * full))
    # groups share one rank: the largest that any of them asks for
    found = []
    for block in blocks:
        matrix = rule.matrices(block)[k]
        if isinstance(rank, Energy):
            values = np.linalg.svd(matrix, compute_uv=False)
            found.append(energy_rank(values, rank.share))
        else:
            found.append(max(1, evbmf_rank(matrix, search=rank.search).rank))
    least = min(full, max(found))
    if isinstance(rank, EVBMF):
        least += math.floor(rank.weaken * (full - least))
    return least


def _by_macs(
    rule: Rule,
    shape: tuple[int, ...],
    full: Ranks,
    ratio: float,
    spec: ConvSpec,
    size: tuple[int, int],
) -> Ranks:
    budget = ratio * conv_cost(shape, spec, size)[1]
    # all of a rule's ranks grow together, as equal shares of full rank
    low, high, top = 0, max(full), max(full)

    def at(step: int) -> Ranks:
        return tuple(max(1, math.floor(f * step / top)) for f in full)

    while low < high:
        middle = (low + high + 1) // 2
        if stages_cost(rule.stages(shape, at(middle), spec), size)[1] <= budget:
            low = middle
        else:
            high = middle - 1
    return at(max(low, 1))
