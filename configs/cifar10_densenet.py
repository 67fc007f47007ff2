"""DenseNet-BC-100 (growth 12) on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_densenet.py --data_dir=DIR

Huang, Liu, van der Maaten, Weinberger, CVPR 2017, 1608.06993: SGD with Nesterov momentum .9, rate
.1 divided by 10 at half and three quarters of 300 epochs, batch 64, weight decay 1e-4; drop-out .2
only without augmentation. Paper: 4.51 % error. One GPU. Measured here: nothing yet (the paper's
hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=300.0,
        optimizer=OptimizerConfig(
            "sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(150, 225)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_densenet",
        "densenet_bc_100_12",
        recipe,
        batch_size=64,
        error=0.0451,
        source="Huang et al. 2017",
    )
