"""Multi-ResNet of depth 200 with 5 branches on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_multi_resnet.py --data_dir=DIR

Abdi, Nahavandi, 2016, 1609.05672: SGD with Nesterov momentum .9, rate .1 divided by 10 at epochs 81
and 122 (the authors' code) of 200, batch 64, weight decay 1e-4. Paper: 4.35 % error (as recalled).
One GPU. Measured here: nothing yet (the paper's hardware and days are needed).
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
            "sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(81, 122)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_multi_resnet",
        "multi_resnet_200_k5",
        recipe,
        batch_size=64,
        error=0.0435,
        source="Abdi and Nahavandi 2016, as recalled",
    )
