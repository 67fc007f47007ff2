"""Importance scores: which channels or weights matter. Every score: higher = keep.

A score takes the parameters first, then what else it needs: nothing (`l1`, `l2`, `bn_scale`,
`fpgm`, `lamp`, `random`), a loss and batches (`taylor`, `fisher`, `fisher_weight`), outputs or a
loss (`obd`), activations (`apoz`, `hrank`). `compute` gives any set of them from one jitted pass
over the data.
"""

from __future__ import annotations

from cnnjax.pruning.importance.activations import activation_scores, apoz, hrank
from cnnjax.pruning.importance.curvature import (
    gauss_newton_diagonal,
    hutchinson_diagonal,
    mlp_diagonal,
    obd,
    obd_scores,
)
from cnnjax.pruning.importance.filters import fpgm, greedy_l1, lamp
from cnnjax.pruning.importance.gradients import (
    fisher,
    fisher_weight,
    gradient_statistics,
    per_cost,
    taylor,
)
from cnnjax.pruning.importance.parameters import bn_scale, l1, l2, random
from cnnjax.pruning.importance.registry import get, names, register
from cnnjax.pruning.importance.together import compute

__all__ = [
    "activation_scores",
    "apoz",
    "bn_scale",
    "compute",
    "fisher",
    "fisher_weight",
    "fpgm",
    "gauss_newton_diagonal",
    "get",
    "gradient_statistics",
    "greedy_l1",
    "hrank",
    "hutchinson_diagonal",
    "l1",
    "l2",
    "lamp",
    "mlp_diagonal",
    "names",
    "obd",
    "obd_scores",
    "per_cost",
    "random",
    "register",
    "taylor",
]
