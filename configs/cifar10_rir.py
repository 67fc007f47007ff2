"""ResNet in ResNet, 18 layers, wide, on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_rir.py --data_dir=DIR

Targ, Almeida, Lyman, 2016, 1603.08029: SGD with momentum .9, rate .1 divided by 10 after epochs 42
and 62 of 82, batch 500, weight decay 1e-4, He initialisation, crops and mirror images. Paper: 5.01
% error (as recalled). One GPU. Measured here: nothing yet (the paper's hardware and days are
needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=82.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-4, decay_exclude=()),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(42, 62)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_rir",
        "rir_18_wide",
        recipe,
        batch_size=500,
        error=0.0501,
        source="Targ et al. 2016, as recalled",
    )
