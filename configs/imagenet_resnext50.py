"""ResNeXt-50, 32x4d, on ImageNet.

    python scripts/run.py --config=configs/imagenet_resnext50.py --data_dir=DIR

Xie, Girshick, Dollar, Tu, He, CVPR 2017, 1611.05431: SGD with momentum .9 (Nesterov in the Torch
code), rate .1 divided by 10 at epochs 30, 60 and 90 of 100, batch 256, weight decay 1e-4, no
drop-out. Paper: 22.2 % top-1 error (as recalled). Eight GPUs. Measured here: nothing yet (the
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
            "sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(30, 60, 90)),
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_resnext50",
        "resnext50_32x4d",
        recipe,
        batch_size=256,
        error=0.222,
        source="Xie et al. 2017, as recalled",
    )
