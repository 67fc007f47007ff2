"""Knowledge transfer: losses on outputs and features, synthetic data, neuron selection.

Every loss is a pure function of arrays: a mean over examples in float32, with the teacher's
gradient stopped. `kd` and `dkd` take logits; `hint`, `attention_transfer`, `fsp`, `saliency`,
`hierarchical_context` take feature maps; `gradient_attention` takes functions.
"""

from cnnjax.distillation.adapters import ChannelAdapter, HintRegressor
from cnnjax.distillation.contrastive import contrastive, hierarchical_context
from cnnjax.distillation.deeper import deepen
from cnnjax.distillation.detection_losses import (
    bounded_regression,
    detection_classification,
    detection_regression,
    smooth_l1,
    weighted_soft_cross_entropy,
)
from cnnjax.distillation.ensemble import ensemble_logits
from cnnjax.distillation.gradients import gradient_attention, gradient_symmetry, input_gradient
from cnnjax.distillation.growth import Move, Widening
from cnnjax.distillation.logits import (
    cross_entropy,
    dkd,
    kd,
    logit_regression,
    soft_targets,
)
from cnnjax.distillation.maps import (
    attention_map,
    attention_transfer,
    fsp,
    fsp_matrix,
    hint,
    saliency,
)
from cnnjax.distillation.net2net import widen, widen_tree
from cnnjax.distillation.neurons import neuron_mimic, neuron_profile, select_neurons
from cnnjax.distillation.synthetic import independent_marginals, munge

__all__ = [
    "ChannelAdapter",
    "HintRegressor",
    "Move",
    "Widening",
    "attention_map",
    "attention_transfer",
    "bounded_regression",
    "contrastive",
    "cross_entropy",
    "deepen",
    "detection_classification",
    "detection_regression",
    "dkd",
    "ensemble_logits",
    "fsp",
    "fsp_matrix",
    "gradient_attention",
    "gradient_symmetry",
    "hierarchical_context",
    "hint",
    "independent_marginals",
    "input_gradient",
    "kd",
    "logit_regression",
    "munge",
    "neuron_mimic",
    "neuron_profile",
    "saliency",
    "select_neurons",
    "smooth_l1",
    "soft_targets",
    "weighted_soft_cross_entropy",
    "widen",
    "widen_tree",
]
