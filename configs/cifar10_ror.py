"""RoR-3-WRN-40-4 with stochastic depth on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_ror.py --data_dir=DIR

Zhang, Sun, Han, Yuan, Guo, Liu, "Residual networks of residual networks", 2016, 1608.02908: SGD
with momentum .9 (of a port), rate .1 divided by 10 at epochs 250 and 375 of 500, batch 128, weight
decay 1e-4, survival falling to .5. Paper: 4.09 % error. One GPU. Measured here:
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
        epochs=500.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-4, decay_exclude=()),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(250, 375)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_ror",
        "ror_3_wrn_40_4",
        recipe,
        batch_size=128,
        error=0.0409,
        source="Zhang et al. 2016",
        fields={"survival": 0.5},
    )
