"""Wide ResNet 28-10 on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_wide_resnet.py --data_dir=DIR

Zagoruyko, Komodakis, 2016, 1605.07146: SGD with Nesterov momentum .9, rate .1 times .2 at epochs
60, 120 and 160 of 200, batch 128, weight decay 5e-4, pad-4 crops (reflected borders) and mirror
images, no drop-out. Paper: 4.00 % error. One GPU. Measured here: nothing yet (the paper's hardware
and days are needed).
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
        optimizer=OptimizerConfig(
            "sgd", momentum=0.9, nesterov=True, weight_decay=5e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(60, 120, 160), gamma=0.2),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_wide_resnet",
        "wrn_28_10",
        recipe,
        batch_size=128,
        error=0.04,
        source="Zagoruyko and Komodakis 2016",
        augment={"pad_mode": "reflect"},
    )
