"""Inception-v3 on ImageNet.

    python scripts/run.py --config=configs/imagenet_inception_v3.py --data_dir=DIR

Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016, 1512.00567:
TensorFlow's RMSProp (decay .9, epsilon 1.0), rate .045 times .94 every 2 epochs, 32 images on each
of 50 replicas, label smoothing .1, gradients clipped to norm 2, moving average of the parameters;
weight decay 4e-5 and momentum .9 from slim. Szegedy et al. 2016: 21.2 % top-1 error (single crop).
Different here: no auxiliary loss, colour distortion without hue. Measured here: nothing yet (the
paper's hardware and days are needed).
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
        optimizer=OptimizerConfig(
            "rmsprop", decay=0.9, eps=1.0, momentum=0.9, weight_decay=4e-5, clip_norm=2.0
        ),
        schedule=ScheduleConfig("step", base=0.045, every=2, gamma=0.94),
        label_smoothing=0.1,
        ema_decay=0.9999,
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_inception_v3",
        "inception_v3",
        recipe,
        batch_size=1600,
        error=0.212,
        source="Szegedy et al. 2016, as recalled",
        size=299,
        statistics="tf",
        crop=(0.05, 1.0),
        augment={"brightness": 0.125, "saturation": 0.5},
    )
