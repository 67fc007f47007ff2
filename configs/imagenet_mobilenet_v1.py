"""MobileNet v1 on ImageNet.

    python scripts/run.py --config=configs/imagenet_mobilenet_v1.py --data_dir=DIR

Howard et al., "MobileNets", 2017, 1704.04861: RMSProp as Inception-v3 has it, less augmentation, no
label smoothing, next to no weight decay on depthwise filters. Paper: 29.4 % top-1 error. Rate and
decay follow slim; the batch (96 times 16) and the number of epochs (100) are ours. Measured here:
nothing yet (the paper's hardware and days are needed).
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
            "rmsprop",
            decay=0.9,
            eps=1.0,
            momentum=0.9,
            weight_decay=4e-5,
            decay_exclude=("**/bias", "**/scale", "**/depthwise/**"),
        ),
        schedule=ScheduleConfig("step", base=0.045, every=2, gamma=0.94),
        ema_decay=0.9999,
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_mobilenet_v1",
        "mobilenet_v1",
        recipe,
        batch_size=1536,
        error=0.294,
        source="Howard et al. 2017",
        statistics="tf",
        crop=(0.3, 1.0),
    )
