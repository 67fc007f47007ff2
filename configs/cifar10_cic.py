"""Convolution in convolution (CiC, window 5) on CIFAR-10.

    python scripts/run.py --config=configs/cifar10_cic.py --data_dir=DIR

Pang, Sun, Jiang, Li, "Convolution in convolution for network in network", 2016, 1603.06759: widths,
schedule and drop-out are NiN's (SGD with momentum .9, rate .1 divided by 10 after 100k of 120k
steps, batch 128, weight decay 1e-4), which the paper builds on; its own figures were not read, so
none is stated. One GPU. Measured here: nothing yet (the paper's hardware and days are needed).
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
        "cifar10_cic",
        "cic",
        recipe,
        batch_size=128,
        error=None,
        source="no figure read",
    )
