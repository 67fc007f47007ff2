"""Pruning: masks and scores, selection, schedules, and training under masks.

``score -> select -> apply``: every score is higher = keep; a mask is a bool tree like the
parameters; ``masked`` and ``gradual`` are optimizers that keep removed weights at exactly zero.
"""

from __future__ import annotations

from cnnjax.pruning import granularity, masks, schedules
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
from cnnjax.pruning.transforms import MaskedState, get_mask, gradual, masked, set_mask

__all__ = [
    "GRANULARITIES",
    "MaskedState",
    "apply_mask",
    "check_alive",
    "check_mask",
    "density",
    "expand",
    "full_mask",
    "get_mask",
    "gradual",
    "granularity",
    "groups",
    "intersect",
    "kept_columns",
    "magnitude_mask",
    "magnitude_scores",
    "mask_from_scores",
    "mask_of",
    "masked",
    "masks",
    "n_m_mask",
    "prune_count",
    "prune_retrain",
    "prune_smallest",
    "reduce",
    "schedules",
    "set_mask",
    "strided_mask",
    "strided_positions",
    "threshold_mask",
]
