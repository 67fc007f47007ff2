"""Wide ResNet-50-2 on ImageNet.

    python scripts/run.py --config=configs/imagenet_wide_resnet50.py --data_dir=DIR

Zagoruyko, Komodakis, 2016, 1605.07146: as ResNet-50 (SGD with momentum .9 (Nesterov in the Torch
code), rate .1 divided by 10 at epochs 30 and 60 of 90, batch 256, weight decay 1e-4, no drop-out)
with doubled inner widths. Paper: 21.9 % top-1 error (as recalled). Eight GPUs. Measured here:
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
        epochs=90.0,
        optimizer=OptimizerConfig(
            "sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(30, 60)),
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_wide_resnet50",
        "wide_resnet50_2",
        recipe,
        batch_size=256,
        error=0.219,
        source="Zagoruyko and Komodakis 2016, as recalled",
    )
