"""Pruning: masks and scores, selection, schedules, and training under masks.

``score -> select -> apply``: every score is higher = keep; a mask is a bool tree like the
parameters; ``masked`` and ``gradual`` are optimizers that keep removed weights at exactly zero.
"""

from __future__ import annotations

from cnnjax.pruning import (
    brain_damage,
    dynamic,
    gates,
    granularity,
    importance,
    masks,
    merging,
    noise,
    obs,
    penalties,
    prox,
    random_masks,
    reconstruction,
    schedules,
    thresholding,
)
from cnnjax.pruning.brain_damage import ThinConv, thin, thin_conv
from cnnjax.pruning.costs import CostModel
from cnnjax.pruning.dead import dead_channels
from cnnjax.pruning.depth import block_scores, removable_blocks, remove_blocks, select_blocks
from cnnjax.pruning.dynamic import (
    dynamic_network_surgery,
    erdos_renyi,
    random_mask,
    regrowth,
    spliced,
    surgery_hooks,
)
from cnnjax.pruning.fisher_maps import (
    channel_mask,
    fisher_select,
    fisher_sums,
    gated_params,
    map_fisher,
)
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
from cnnjax.pruning.linen import ShrunkLinen, register_linen, shrink_linen
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
from cnnjax.pruning.merging import merge_neurons
from cnnjax.pruning.next_layer import next_layer_scores, reconstruct
from cnnjax.pruning.proof import ProofError
from cnnjax.pruning.proximal import (
    Prox,
    adam_steps,
    forward_backward_splitting,
    penalty_tree,
    prox_tree,
)
from cnnjax.pruning.random_masks import best_of_masks, best_of_n, bits_to_mask, particle_filter
from cnnjax.pruning.select import select_channels
from cnnjax.pruning.shrink import Cut, cut, shrink, shrink_tree
from cnnjax.pruning.thresholding import (
    greedy_densities,
    iterative_hard_thresholding,
    keep_counts,
    memory_bounded_l0,
    project_l0,
)
from cnnjax.pruning.tickets import lottery_ticket, rewind, sensitivity
from cnnjax.pruning.transforms import MaskedState, get_mask, gradual, masked, set_mask

__all__ = [
    "GRANULARITIES",
    "CostModel",
    "Cut",
    "Keep",
    "LatencyTable",
    "MaskedState",
    "ProofError",
    "Prox",
    "ShrunkLinen",
    "ThinConv",
    "adam_steps",
    "apply_mask",
    "best_of_masks",
    "best_of_n",
    "bits_to_mask",
    "block_scores",
    "brain_damage",
    "channel_mask",
    "check_alive",
    "check_mask",
    "cut",
    "dead_channels",
    "density",
    "dynamic",
    "dynamic_network_surgery",
    "erdos_renyi",
    "expand",
    "fisher_select",
    "fisher_sums",
    "forward_backward_splitting",
    "full_mask",
    "gated_params",
    "gates",
    "get_mask",
    "gradual",
    "granularity",
    "greedy_densities",
    "groups",
    "importance",
    "intersect",
    "iterative_hard_thresholding",
    "keep_counts",
    "kept_columns",
    "latency_table",
    "lottery_ticket",
    "magnitude_mask",
    "magnitude_scores",
    "map_fisher",
    "mask_from_scores",
    "mask_of",
    "masked",
    "masks",
    "measured_latency",
    "memory_bounded_l0",
    "merge_neurons",
    "merging",
    "n_m_mask",
    "next_layer_scores",
    "noise",
    "obs",
    "particle_filter",
    "penalties",
    "penalty_tree",
    "project_l0",
    "prox",
    "prox_tree",
    "prune_count",
    "prune_retrain",
    "prune_smallest",
    "random_mask",
    "random_masks",
    "reconstruct",
    "reconstruction",
    "reduce",
    "register_linen",
    "regrowth",
    "removable_blocks",
    "remove_blocks",
    "rewind",
    "schedules",
    "select_blocks",
    "select_channels",
    "sensitivity",
    "set_mask",
    "shrink",
    "shrink_linen",
    "shrink_tree",
    "spliced",
    "strided_mask",
    "strided_positions",
    "surgery_hooks",
    "thin",
    "thin_conv",
    "threshold_mask",
    "thresholding",
]
