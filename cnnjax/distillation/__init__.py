"""Knowledge transfer: losses on outputs and features, synthetic data, neuron selection.

Every loss is a pure function of arrays: a mean over examples in float32, with the teacher's
gradient stopped. `kd` and `dkd` take logits; `hint`, `attention_transfer`, `fsp`, `saliency`,
`hierarchical_context` take feature maps; `gradient_attention` takes functions.

Training a student: a `DistillConfig` names the terms and layers, `plan_distillation` resolves
them, `distillation_loss` is what `cnnjax.training.Hooks` takes. `widen` and `deepen` grow a network
without changing its function.
"""

from cnnjax.distillation.adapters import ChannelAdapter, HintRegressor, ReviewFusion
from cnnjax.distillation.cache import (
    CachedStream,
    TargetCache,
    cache_examples,
    cache_stream,
    load_cache,
    lookup,
)
from cnnjax.distillation.contrastive import contrastive, hierarchical_context
from cnnjax.distillation.deeper import deepen
from cnnjax.distillation.density import DensityHead, center_prior, gaussian_blur
from cnnjax.distillation.detection import (
    DetectionDistillConfig,
    DetectionPlan,
    detection_distillation_loss,
    plan_detection,
)
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
from cnnjax.distillation.loss import distillation_loss
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
from cnnjax.distillation.objective import DistillConfig
from cnnjax.distillation.planning import Plan, plan_distillation
from cnnjax.distillation.shallow import LinearBottleneck, LogitScale, logit_scale
from cnnjax.distillation.synthetic import independent_marginals, munge
from cnnjax.distillation.taps import (
    Pair,
    WithAdapters,
    features_of,
    make_adapter,
    pair_features,
    tap_shapes,
)
from cnnjax.distillation.teachers import Targets, Teacher, check_classes, compare_classes

__all__ = [
    "CachedStream",
    "ChannelAdapter",
    "DensityHead",
    "DetectionDistillConfig",
    "DetectionPlan",
    "DistillConfig",
    "HintRegressor",
    "LinearBottleneck",
    "LogitScale",
    "Move",
    "Pair",
    "Plan",
    "ReviewFusion",
    "TargetCache",
    "Targets",
    "Teacher",
    "Widening",
    "WithAdapters",
    "attention_map",
    "attention_transfer",
    "bounded_regression",
    "cache_examples",
    "cache_stream",
    "center_prior",
    "check_classes",
    "compare_classes",
    "contrastive",
    "cross_entropy",
    "deepen",
    "detection_classification",
    "detection_distillation_loss",
    "detection_regression",
    "distillation_loss",
    "dkd",
    "ensemble_logits",
    "features_of",
    "fsp",
    "fsp_matrix",
    "gaussian_blur",
    "gradient_attention",
    "gradient_symmetry",
    "hierarchical_context",
    "hint",
    "independent_marginals",
    "input_gradient",
    "kd",
    "load_cache",
    "logit_regression",
    "logit_scale",
    "lookup",
    "make_adapter",
    "munge",
    "neuron_mimic",
    "neuron_profile",
    "pair_features",
    "plan_detection",
    "plan_distillation",
    "saliency",
    "select_neurons",
    "smooth_l1",
    "soft_targets",
    "tap_shapes",
    "weighted_soft_cross_entropy",
    "widen",
    "widen_tree",
]
