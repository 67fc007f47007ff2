"""Network in network with max-pooled perceptrons (MPNIN) on CIFAR-10, without pre-training.

    python scripts/run.py --config=configs/cifar10_mpnin.py --data_dir=DIR

Widths, schedule and drop-out are NiN's (SGD with momentum .9, rate .1 divided by 10 after 100k of
120k steps, batch 128, weight decay 1e-4): the paper's own are not available, nor its error. Block
by block pre-training first is `cnnjax.models.mpnin`'s procedure. One GPU. Measured here: nothing
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
        epochs=307.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-4, decay_exclude=()),
        schedule=ScheduleConfig("step", base=0.1, unit="steps", boundaries=(100_000,)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_mpnin",
        "mpnin",
        recipe,
        batch_size=128,
        error=None,
        source="no figure read",
    )
