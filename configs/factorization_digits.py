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
# not run yet
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
