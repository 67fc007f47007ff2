"""VGG-19 for CIFAR-10, the baseline of network slimming.

    python scripts/run.py --config=configs/cifar10_vgg19.py --data_dir=DIR

Liu, Li, Shen, Huang, Yan, Zhang, ICCV 2017, 1708.06519: SGD with Nesterov momentum .9, rate .1
divided by 10 at epochs 80 and 120 of 160, batch 64, weight decay 1e-4. Paper: 6.34 % error (as
recalled). One GPU. Measured here: nothing yet (the paper's hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=160.0,
        optimizer=OptimizerConfig(
            "sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(80, 120)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_vgg19",
        "vgg19_cifar",
        recipe,
        batch_size=64,
        error=0.0634,
        source="Liu et al. 2017, as recalled",
    )
