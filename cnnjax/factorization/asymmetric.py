"""Zhang's combined space and channel decomposition, and its ranks by PCA energy over a network.

A layer becomes ``kh x 1, I -> d''``, ``1 x kw, d'' -> d'``, ``1 x 1, d' -> O``. From weights alone
the three come of two truncated SVDs; with data `cnnjax.factorization.reconstruct` fits the second
split to the layer's responses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from cnnjax import surgery
from cnnjax.factorization import chain as chains
from cnnjax.factorization.chain import (
    Chain,
    ConvSpec,
    conv_cost,
    join_groups,
    split_groups,
    stages_cost,
)
from cnnjax.factorization.choose import choose_ranks
from cnnjax.factorization.matrix import check_finite, filter_basis
from cnnjax.factorization.network import plan
from cnnjax.factorization.ranks import allocate_ranks, frontier, pca_energy_ranks
from cnnjax.factorization.rules import Basis, MacsRatio, Ranks, Rule, Spatial, Stages
from cnnjax.factorization.sites import (
    Batches,
    Site,
    check_samples,
    find_sites,
    response_moments,
    spectra,
)
from cnnjax.factorization.spatial import spatial_svd, spatial_unfolding
from cnnjax.factorization.survey import Plan, as_rules, spec_of

# how many ranks of each part `pca_plan` looks at in a layer
LEVELS = 24


@dataclasses.dataclass(frozen=True)
class Asymmetric3D(Rule):
    """``kh x 1``, ``1 x kw``, ``1x1``; ``rank`` may be a pair (between the spatial two, before the
    1x1)."""

    def matrices(self, kernel: np.ndarray) -> list[np.ndarray]:
        """(i*kh, o*kw) and (kh*kw*i, o)."""
        return [np.asarray(spatial_unfolding(kernel)), kernel.reshape(-1, kernel.shape[-1])]

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """(min(i*kh, o*kw), o)."""
        kh, kw, i, o = shape
        return (min(i * kh, o * kw), min(kh * kw * i, o))

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        kh, kw, i, o = shape
        p, q = ranks
        return [
            ((kh, 1, i, spec.groups * p), spec.vertical()),
            ((1, kw, p, spec.groups * q), spec.horizontal()),
            ((1, 1, q, o), spec.pointwise()),
        ]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """Both splits by truncated SVD: no data."""

        def factors(block: Array) -> tuple[Array, ...]:
            vertical, horizontal = spatial_svd(block, ranks[0])
            return vertical, *filter_basis(horizontal, ranks[1])

        parts = map(join_groups, jax.vmap(factors)(split_groups(kernel, spec.groups)))
        return chains.spatial_mix_chain(*parts, spec=spec, bias=bias)

    def spatial_part(self, kernel: Array, rank: int, spec: ConvSpec, bias: Array | None) -> Chain:
        """The first two stages alone: ``kh x 1`` and ``1 x kw`` with all outputs."""
        parts = jax.vmap(lambda k: spatial_svd(k, rank))(split_groups(kernel, spec.groups))
        return chains.spatial_chain(*map(join_groups, parts), spec=spec, bias=bias)


def pca_plan(
    model: nnx.Module,
    rules: Mapping[str, Rule | None] | Rule,
    batches: Batches,
    macs: float,
    *,
    example: Any,
    split: float | None = None,
) -> Plan:
    """Ranks of a whole network by the PCA energy of its responses, to a budget of MACs.

    The greedy product of `pca_energy_ranks` over the layers' response spectra chooses d'. Between
    space and channels of `Asymmetric3D` every layer has a split of its own: (d'', d') of all layers
    are chosen together so that the product of the kernels' energy that the spatial parts keep and
    of the responses' energy that the channel ranks keep is largest (`allocate_ranks`). One split
    for all starves the channels of narrow layers, where the 1x1 is a large part of the cost. With
    ``split`` the spatial part comes first: it may use ``macs ** split`` of each layer's MACs (0.5:
    the square root of the speed-up each), and the greedy product shares out what is left.

    Args:
      model: any NNX network.
      rules: `Basis` and `Asymmetric3D` rules by path glob (None keeps a layer); their own ranks
        are not looked at.
      batches: inputs, arrays or mappings with ``"image"``, all positions of which count.
      macs: share of the rules' layers' MACs that is allowed.
      example: an input.
      split: see above; None: one for each layer.

    Returns:
      A plan with concrete ranks; layers whose chain would not be cheaper are kept.

    Raises:
      ValueError: for another rule, a share outside (0, 1), or a budget that is out of reach.

    Reference:
      Zhang et al., TPAMI 2016, arXiv 1505.06798, sections 2.4 and 2.5.
    """
    if not 0 < macs < 1:
        raise ValueError(f"macs is {macs}; expected a share in (0, 1)")
    rules = as_rules(rules)
    # any rank will do to see which layers the rules reach and what those cost
    reached = plan(model, {g: r and dataclasses.replace(r, rank=1) for g, r in rules.items()})
    skipped = ("depthwise", "dense: only Basis and Predicted apply")
    chosen_rules = {p.path: p.rule for p in reached.layers if p.kept not in skipped}
    for path, rule in chosen_rules.items():
        if not isinstance(rule, Basis | Asymmetric3D):
            raise ValueError(
                f"{path}: pca_plan takes Basis and Asymmetric3D rules, not {type(rule).__name__}"
            )
    sites = find_sites(model, list(chosen_rules), example)
    moments = response_moments(model, sites, batches)
    found = surgery.modules(model)
    for path, moment in moments.items():
        groups = getattr(found[path], "feature_group_count", 1)
        check_samples(path, int(moment.count), moment.yy.shape[0] // groups)
        check_finite(moment.yy, f"covariance of the responses of {path}")
    layers = [
        (
            chosen_rules[site.path],
            _Geometry.of(found[site.path], site),
            found[site.path].kernel[...],
        )
        for site in sites
    ]
    values = [spectra(moments[s.path], g.spec.groups) for s, (_, g, _) in zip(sites, layers)]
    three = any(isinstance(rule, Asymmetric3D) for rule, _, _ in layers)
    if three and split is None:
        spatial, chosen = _jointly(layers, values, macs)
    else:
        spatial, chosen = _ranks_at(layers, values, macs, 0.5 if split is None else split)
    ranked: dict[str, Rule | None] = {}
    for site, ranks, rank in zip(sites, spatial, chosen):
        value = (*ranks, rank) if ranks else rank
        ranked[site.path] = dataclasses.replace(chosen_rules[site.path], rank=value, always=False)
    return plan(model, ranked, example)


def _jointly(
    layers: list[tuple[Rule, _Geometry, Any]], values: list[np.ndarray], macs: float
) -> tuple[list[Ranks], list[int]]:
    """(spatial ranks, channel ranks) of the largest product of kept energies within the budget."""
    gains, costs, options, total = [], [], [], 0
    for (rule, layer, kernel), spectrum in zip(layers, values):
        total += layer.before
        channels = _log_shares(spectrum)
        space = layer.spatial_energies(kernel) if isinstance(rule, Asymmetric3D) else None
        found: list[tuple[Ranks, int]] = []
        kept: list[float] = []
        starts: list[tuple[Ranks, float]] = [((), 0.0)]
        if space is not None:
            starts = [((p,), float(space[p - 1])) for p in _levels(len(space))]
        for ranks, held in starts:
            for r in _levels(layer.most(ranks)):
                found.append((ranks, r))
                kept.append(held + channels[r - 1])
        spent = np.array([layer.macs(rule, (*ranks, r)) for ranks, r in found], float)
        front = frontier(np.array(kept), spent)
        options.append([found[k] for k in front])
        gains.append(np.array(kept)[front])
        costs.append(spent[front])
    picked = [o[k] for o, k in zip(options, allocate_ranks(gains, costs, macs * total, bins=1000))]
    return [ranks for ranks, _ in picked], [rank for _, rank in picked]


def _levels(most: int) -> list[int]:
    """At most `LEVELS` ranks from 1 to ``most``, evenly spread."""
    return sorted({int(r) for r in np.linspace(1, most, min(LEVELS, most)).round()})


def _log_shares(values: np.ndarray) -> np.ndarray:
    """Log of the share of the sum that the first 1, 2, ... values make up."""
    shares = np.cumsum(values) / max(values.sum(), 1e-30)
    return np.log(np.clip(shares, 1e-30, 1.0))


def _ranks_at(
    layers: list[tuple[Rule, _Geometry, Any]], values: list[np.ndarray], macs: float, split: float
) -> tuple[list[Ranks], list[int]]:
    """(spatial ranks, channel ranks) under one split for all."""
    total = fixed = 0.0
    costs, energies, spatial = [], [], []
    for (rule, layer, _), spectrum in zip(layers, values):
        ranks = layer.spatial_ranks(rule, macs**split)
        one, two = (layer.macs(rule, (*ranks, r)) for r in (1, 2))
        most = spectrum[: layer.most(ranks)]
        total, fixed = total + layer.before, fixed + 2 * one - two
        costs.append(float((two - one) * len(most)))
        energies.append(most)
        spatial.append(ranks)
    return spatial, pca_energy_ranks(energies, costs, macs * total - fixed)


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """What the cost of a layer's chain depends on; a dense layer counts as 1x1 on one position."""

    shape: tuple[int, ...]
    spec: ConvSpec
    size: tuple[int, int]

    @classmethod
    def of(cls, layer: Any, site: Site) -> _Geometry:
        if isinstance(layer, nnx.Linear):
            return cls((1, 1, *layer.kernel.shape), ConvSpec(padding="VALID"), (1, 1))
        return cls(layer.kernel.shape, spec_of(layer, site.path), site.size)

    @property
    def before(self) -> int:
        return conv_cost(self.shape, self.spec, self.size)[1]

    def macs(self, rule: Rule, ranks: Ranks) -> int:
        return stages_cost(rule.stages(self.shape, ranks, self.spec), self.size)[1]

    def spatial_ranks(self, rule: Rule, share: float) -> Ranks:
        if isinstance(rule, Basis):
            return ()
        kernel = np.zeros(self.shape, np.float32)
        return choose_ranks(Spatial(MacsRatio(share)), kernel, self.spec, self.size)

    def spatial_energies(self, kernel: Any) -> np.ndarray:
        """Log of the share of the kernel's energy, of all groups, that each spatial rank keeps."""
        blocks = np.asarray(split_groups(kernel, self.spec.groups), np.float64)
        unfolded = [np.asarray(spatial_unfolding(block)) for block in blocks]
        squares = np.array([np.linalg.svd(m, compute_uv=False) ** 2 for m in unfolded])
        return _log_shares(squares.sum(0))

    def most(self, ranks: Ranks) -> int:
        """The largest channel rank that a chain can have behind the spatial ranks."""
        kh, kw, i, o = self.shape
        inner = kw * ranks[0] if ranks else kh * kw * i
        return min(inner, o // self.spec.groups)
