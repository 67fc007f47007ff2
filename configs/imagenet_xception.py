"""Xception on ImageNet.

    python scripts/run.py --config=configs/imagenet_xception.py --data_dir=DIR

Chollet, "Xception: deep learning with depthwise separable convolutions", CVPR 2017, 1610.02357: SGD
with momentum .9, rate .045 times .94 every 2 epochs, weight decay 1e-5, drop-out .5, Polyak
averaging, 60 GPUs. Paper: 21.0 % top-1 error. The batch (32 a GPU) and the number of epochs (100)
are ours. Measured here: nothing yet (the paper's hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=100.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-5),
        schedule=ScheduleConfig("step", base=0.045, every=2, gamma=0.94),
        ema_decay=0.9999,
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_xception",
        "xception",
        recipe,
        batch_size=1920,
        error=0.21,
        source="Chollet 2017",
        size=299,
        statistics="tf",
        crop=(0.05, 1.0),
        augment={"brightness": 0.125, "saturation": 0.5},
    )
