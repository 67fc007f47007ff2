"""Every factorization of the survey on 8x8 digits, side by side: one small network, many branches.

    python scripts/run.py --config=configs/factorization_digits.py

A plain network of three convolutions is trained; each branch factorizes its second and third
convolution (or what the method is for) at about half of their MACs and fine-tunes the whole
network for six epochs. The names are those of the methods; the papers are named where the rules are
defined. No paper has figures for this data. Real images (scikit-learn's UCI digits), no download;
355 test images, so one is 0.28 point.

What `scripts/update_results.py` found in ``configs/results/factorization_digits.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 1 CPU cores, 1 x cpu, jax 0.10.2
# dense: error 1.60 (0.85-2.25) %, 47.53k non-zeros, 1.00x
# curves: error 1.60 (0.85-2.25) %, 47.53k non-zeros, 1.00x
# svd_dense: 97.5 % of the MACs, error 2.44 (1.41-3.38) % before fine-tuning, 1.78 (1.41-2.54) %
#     after
# filter_basis: 51.3 % of the MACs, error 2.72 (1.97-3.38) % before fine-tuning, 1.78 (1.41-2.25) %
#     after
# weighted_low_rank: 51.3 % of the MACs, error 1.78 (1.13-2.54) % before fine-tuning, 1.60
#     (0.85-2.25) % after
# mahalanobis: 51.3 % of the MACs, error 2.35 (1.41-3.10) % before fine-tuning, 1.60 (1.13-2.25) %
#     after
# dual_basis: 50.2 % of the MACs, error 2.25 (1.97-2.54) % before fine-tuning, 1.60 (1.41-1.97) %
#     after
# tucker2_evbmf: 23.9 % of the MACs, error 2.63 (2.25-3.10) % before fine-tuning, 1.88 (1.41-2.25) %
#     after
# tucker2: 51.2 % of the MACs, error 2.16 (1.13-2.82) % before fine-tuning, 1.69 (1.41-1.97) % after
# tucker: 50.6 % of the MACs, error 4.32 (2.82-5.92) % before fine-tuning, 1.88 (1.41-2.25) % after
# tensor_train: 48.8 % of the MACs, error 2.25 (1.69-3.10) % before fine-tuning, 1.41 (0.85-2.25) %
#     after
# cp_als: 51.6 % of the MACs, error 1.78 (0.85-2.54) % before fine-tuning, 1.69 (1.41-2.25) % after
# cp4_conv: 18.3 % of the MACs, error 5.54 (3.66-6.48) % before fine-tuning, 1.97 (1.41-2.25) %
#     after
# cp_tpm: 32.7 % of the MACs, error 3.94 (2.54-6.20) % before fine-tuning, 1.69 (1.13-2.25) % after
# cp_tpm_layer_by_layer: 32.7 % of the MACs, error 1.97 (1.69-2.54) % before fine-tuning, 1.69
#     (1.41-1.97) % after
# jaderberg_scheme1: 42.4 % of the MACs, error 3.76 (2.25-4.79) % before fine-tuning, 1.97
#     (1.13-2.54) % after
# jaderberg_scheme2_data: 52.3 % of the MACs, error 1.69 (0.85-2.54) % before fine-tuning, 1.31
#     (0.85-1.97) % after
# spatial_svd: 52.3 % of the MACs, error 1.88 (1.13-2.54) % before fine-tuning, 1.69 (1.13-2.54) %
#     after
# low_rank_constrained_training: 52.3 % of the MACs, error 81.13 (74.08-84.79) % before fine-tuning,
#     3.47 (3.38-3.66) % after
# learn_separable_filters: 42.4 % of the MACs, error 4.13 (3.10-5.35) % before fine-tuning, 2.07
#     (1.13-2.82) % after
# dct: 53.0 % of the MACs, error 5.54 (4.23-7.32) % before fine-tuning, 1.97 (1.13-2.82) % after
# predict_taps: 72.5 % of the MACs, error 2.82 (1.69-3.38) % before fine-tuning, 1.69 (1.13-2.54) %
#     after
# predict_inputs: 104.4 % of the MACs, error 1.69 (1.13-2.25) % before fine-tuning, 1.78 (1.41-2.25)
#     % after
# monochromatic_conv: 11.2 % of the MACs, error 31.92 (17.18-43.38) % before fine-tuning, 3.57
#     (2.25-4.51) % after
# biclustered_low_rank: 46.5 % of the MACs, error 3.38 (1.69-5.92) % before fine-tuning, 1.69
#     (1.13-2.25) % after
# zhang_linear: 51.5 % of the MACs, error 1.78 (1.13-2.54) % before fine-tuning, 1.69 (1.13-2.25) %
#     after
# zhang_relu: 51.5 % of the MACs, error 1.78 (1.13-2.54) % before fine-tuning, 1.69 (1.41-2.25) %
#     after
# zhang_3d: 52.3 % of the MACs, error 1.78 (1.13-2.54) % before fine-tuning, 1.88 (1.69-2.25) %
#     after
# circulant_feature_map: 34.6 % of the MACs, error 6.10 (5.92-6.48) % before fine-tuning, 2.63
#     (2.25-3.10) % after
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.factorization import Reconstruction
from cnnjax.pipeline.stages import (
    Branches,
    CompactMaps,
    Constrain,
    Factorize,
    LayerRule,
    Layerwise,
    Reconstruct,
    Train,
)
from cnnjax.training import OptimizerConfig, ScheduleConfig

FIRST, LAYERS, DENSE = "convs/0", "convs/*", "denses/0"


def recipe(epochs: float, base: float) -> pipeline.Recipe:
    """Adam with a cosine schedule."""
    return pipeline.Recipe(
        epochs=epochs,
        optimizer=OptimizerConfig("adam"),
        schedule=ScheduleConfig("cosine", base=base),
        checkpoint_every=epochs,
    )


def rules(method: str, rank: Any = "macs 0.5", **options: Any) -> dict[str, LayerRule]:
    """The method for all convolutions but the first."""
    return {FIRST: LayerRule("keep"), LAYERS: LayerRule(method, rank, options)}


def branches() -> dict[str, Any]:
    """``{name: stage}``."""

    def weights(method: str, rank: Any = "macs 0.5", **options: Any) -> Factorize:
        return Factorize(rules(method, rank, **options), recalibrate=0)

    def responses(method: str, macs: float = 0.5, rank: Any = "macs 0.5", **fit: Any) -> Any:
        return Reconstruct(rules(method, rank), macs=macs, images=1000, fit=Reconstruction(**fit))

    def dense(method: str, rank: Any, **options: Any) -> Factorize:
        return Factorize({DENSE: LayerRule(method, rank, options)}, recalibrate=1000)

    return {
        "svd_dense": dense("svd_dense", 0.25),
        "filter_basis": weights("filter_basis"),
        "weighted_low_rank": weights("weighted_low_rank"),
        "mahalanobis": weights("mahalanobis"),
        "dual_basis": weights("dual_basis"),
        "tucker2_evbmf": weights("tucker2", "evbmf 0.3"),
        "tucker2": weights("tucker2"),
        "tucker": weights("tucker"),
        "tensor_train": weights("tensor_train"),
        "cp_als": weights("cp_als", restarts=1),
        "cp4_conv": weights("cp4_conv", 16, iterations=30, restarts=1),
        "cp_tpm": weights("cp_tpm", "macs 0.3"),
        "cp_tpm_layer_by_layer": Layerwise(rules("cp_tpm", "macs 0.3"), recipe(2.0, 5e-4)),
        "jaderberg_scheme1": weights("jaderberg_scheme1", "macs 0.5", restarts=1, sweeps=50),
        "jaderberg_scheme2_data": responses("jaderberg_scheme2", 0.0),
        "spatial_svd": weights("spatial_svd"),
        "low_rank_constrained_training": Constrain(rules("spatial")),
        "learn_separable_filters": weights("learn_separable_filters", "macs 0.5"),
        "dct": weights("dct", 2),
        "predict_taps": weights("predict_parameters", 5, always=True),
        "predict_inputs": dense("predict_parameters", 0.25, kernel="covariance"),
        "monochromatic_conv": weights("monochromatic_conv", 8),
        "biclustered_low_rank": weights("biclustered_low_rank"),
        "zhang_linear": responses("basis", nonlinear=False),
        "zhang_relu": responses("basis"),
        "zhang_3d": responses("asymmetric_3d"),
        "circulant_feature_map": CompactMaps({"convs/[12]": 0.5}, steps=100),
    }


def get_config() -> Any:
    """See the module's docstring."""
    return pipeline.config_dict(
        "factorization_digits",
        model=pipeline.ModelSpec("plain_cnn", {"widths": (16, 32, 32), "hidden": (64,)}),
        data=pipeline.DataConfig("digits", batch_size=64),
        stages={
            "dense": Train(recipe(12.0, 2e-3)),
            "curves": Branches(branches(), recipe(6.0, 5e-4)),
        },
        seeds=(0, 1, 2),
    )
