"""MobileNet v2 on ImageNet.

    python scripts/run.py --config=configs/imagenet_mobilenet_v2.py --data_dir=DIR

Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018, 1801.04381:
RMSProp with decay and momentum .9, weight decay 4e-5, rate .045 times .98 an epoch, batch 96 on
each of 16 workers, drop-out .2. Paper: 28.0 % top-1 error. The number of epochs (200) is ours.
Measured here: nothing yet (the paper's hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=200.0,
        optimizer=OptimizerConfig("rmsprop", decay=0.9, eps=1.0, momentum=0.9, weight_decay=4e-5),
        schedule=ScheduleConfig("step", base=0.045, every=1, gamma=0.98),
        ema_decay=0.9999,
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_mobilenet_v2",
        "mobilenet_v2",
        recipe,
        batch_size=1536,
        error=0.28,
        source="Sandler et al. 2018",
        statistics="tf",
        crop=(0.05, 1.0),
        augment={"brightness": 0.125, "saturation": 0.5},
    )
