"""ResNet-110 with stochastic depth on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_stochastic_depth.py --data_dir=DIR

Huang, Sun, Liu, Sedra, Weinberger, ECCV 2016, 1603.09382: SGD with Nesterov momentum .9, rate .1
divided by 10 at half and three quarters of 500 epochs, batch 128, weight decay 1e-4, survival
falling linearly to .5, 45,000 training images and the epoch chosen on the other 5,000 (here the
last one counts, all images train). Paper: 5.23 % error. One GPU. Measured here: nothing yet (the
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
        epochs=500.0,
        optimizer=OptimizerConfig(
            "sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(250, 375)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_stochastic_depth",
        "stochastic_depth_110",
        recipe,
        batch_size=128,
        error=0.0523,
        source="Huang et al. 2016",
    )
