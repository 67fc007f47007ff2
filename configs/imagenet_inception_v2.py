"""Inception-v2 (BN-Inception) on ImageNet.

    python scripts/run.py --config=configs/imagenet_inception_v2.py --data_dir=DIR

Ioffe, Szegedy, ICML 2015, 1502.03167: GoogLeNet's recipe with a rate of .045 that falls six times
faster (x .96 every 1.3 epochs here), no drop-out, a fifth of the weight decay (4e-5), milder
photometric noise; batch 32 on each of several replicas (256 here). Paper: 25.2 % top-1 error (as
recalled). Different here: SGD with momentum .9, 40 epochs. Several GPUs. Measured here: nothing yet
(the paper's hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=40.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=4e-5),
        schedule=ScheduleConfig("step", base=0.045, every=1.3, gamma=0.96),
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_inception_v2",
        "inception_v2",
        recipe,
        batch_size=256,
        error=0.252,
        source="Ioffe and Szegedy 2015, as recalled",
        statistics="tf",
        crop=(0.08, 1.0),
        fields={"dropout": 0.0},
    )
