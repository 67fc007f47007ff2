"""FractalNet-20 on CIFAR-10 with drop-path, drop-out and augmentation.

    python scripts/run.py --config=configs/cifar10_fractalnet.py --data_dir=DIR

Larsson, Maire, Shakhnarovich, "FractalNet", ICLR 2017, 1605.07648: SGD with momentum .9, rate .02
divided by 10 each time the remaining epochs halve (200, 300, 350, 375 of 400), batch 100, local and
global drop-path .15, drop-out 0 to .4. Paper: 4.60 % error. Weight decay isn't stated: none here.
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
        epochs=400.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9),
        schedule=ScheduleConfig("step", base=0.02, boundaries=(200, 300, 350, 375)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_fractalnet",
        "fractalnet_cifar",
        recipe,
        batch_size=100,
        error=0.046,
        source="Larsson et al. 2017",
    )
