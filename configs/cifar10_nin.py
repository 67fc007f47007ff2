"""NiN on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_nin.py --data_dir=DIR

Lin, Chen, Yan, "Network in network", ICLR 2014, 1312.4400: SGD with momentum .9, rate .1 divided by
10 after 100k of 120k steps, batch 128, weight decay 1e-4, drop-out .5. Paper: 8.81 % error.
Different here: per-channel normalisation instead of global contrast normalisation and ZCA
whitening. One GPU. Measured here: nothing yet (the paper's hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=307.0,  # 120k steps
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-4, decay_exclude=()),
        schedule=ScheduleConfig("step", base=0.1, unit="steps", boundaries=(100_000,)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_nin",
        "nin_cifar",
        recipe,
        batch_size=128,
        error=0.0881,
        source="Lin et al. 2014",
    )
