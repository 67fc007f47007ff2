"""Pruning: masks and scores, selection, schedules, and training under masks.

``score -> select -> apply``: every score is higher = keep; a mask is a bool tree like the
parameters; ``masked`` and ``gradual`` are optimizers that keep removed weights at exactly zero.
"""

from __future__ import annotations

from cnnjax.pruning import granularity, importance, masks, schedules
from cnnjax.pruning.costs import CostModel
from cnnjax.pruning.depth import block_scores, removable_blocks, remove_blocks, select_blocks
from cnnjax.pruning.granularity import (
    GRANULARITIES,
    expand,
    groups,
    kept_columns,
    n_m_mask,
    reduce,
    strided_mask,
    strided_positions,
)
from cnnjax.pruning.keep import Keep
from cnnjax.pruning.latency import LatencyTable, latency_table, measured_latency
from cnnjax.pruning.magnitude import (
    magnitude_mask,
    magnitude_scores,
    prune_retrain,
    threshold_mask,
)
from cnnjax.pruning.masks import (
    apply_mask,
    check_alive,
    check_mask,
    density,
    full_mask,
    intersect,
    mask_from_scores,
    mask_of,
    prune_count,
    prune_smallest,
)
from cnnjax.pruning.proof import ProofError
from cnnjax.pruning.select import select_channels
from cnnjax.pruning.shrink import Cut, cut, shrink, shrink_tree
from cnnjax.pruning.transforms import MaskedState, get_mask, gradual, masked, set_mask

__all__ = [
    "GRANULARITIES",
    "CostModel",
    "Cut",
    "Keep",
    "LatencyTable",
    "MaskedState",
    "ProofError",
    "apply_mask",
    "block_scores",
    "check_alive",
    "check_mask",
    "cut",
    "density",
    "expand",
    "full_mask",
    "get_mask",
    "gradual",
    "granularity",
    "groups",
    "importance",
    "intersect",
    "kept_columns",
    "latency_table",
    "magnitude_mask",
    "magnitude_scores",
    "mask_from_scores",
    "mask_of",
    "masked",
    "masks",
    "measured_latency",
    "n_m_mask",
    "prune_count",
    "prune_retrain",
    "prune_smallest",
    "reduce",
    "removable_blocks",
    "remove_blocks",
    "schedules",
    "select_blocks",
    "select_channels",
    "set_mask",
    "shrink",
    "shrink_tree",
    "strided_mask",
    "strided_positions",
    "threshold_mask",
]
