"""VGG-16 for CIFAR-10, the baseline of the pruning papers.

    python scripts/run.py --config=configs/cifar10_vgg16.py --data_dir=DIR

Li, Kadav, Durdanovic, Samet, Graf, ICLR 2017, 1608.08710: SGD with momentum .9, batch 128; rate .1
(as recalled), divided by 10 at epochs 80 and 120 of 160 and weight decay 5e-4 (ours: the paper
prints neither). Paper: 6.75 % error (as recalled). One GPU. Measured here: nothing yet (the paper's
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
        epochs=160.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=5e-4),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(80, 120)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_vgg16",
        "vgg16_cifar",
        recipe,
        batch_size=128,
        error=0.0675,
        source="Li et al. 2017, as recalled",
    )
