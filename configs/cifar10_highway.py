"""Highway network of 19 layers on CIFAR-10.

    python scripts/run.py --config=configs/cifar10_highway.py --data_dir=DIR

Srivastava, Greff, Schmidhuber, "Training very deep networks", NIPS 2015, 1507.06228: SGD with
Nesterov momentum .9, rate .025 divided by 10 after 100k, 150k and 175k of 200k steps, batch 100,
weight decay 1e-3, pad-8 crops, drop-out .2. Paper: 7.72 % error (mean). Different here:
per-channel normalisation instead of global contrast normalisation. One GPU. Measured here: nothing
yet (the paper's hardware and days are needed).
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
        optimizer=OptimizerConfig("sgd", momentum=0.9, nesterov=True, weight_decay=1e-3),
        schedule=ScheduleConfig(
            "step", base=0.025, unit="steps", boundaries=(100_000, 150_000, 175_000)
        ),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_highway",
        "highway_19",
        recipe,
        batch_size=100,
        error=0.0772,
        source="Srivastava et al. 2015",
        augment={"pad": 8},
    )
