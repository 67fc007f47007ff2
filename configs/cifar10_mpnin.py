"""MPNIN on CIFAR-10: batch-normalized NiN, its mlpconv blocks pre-trained one after the other.

    python scripts/run.py --config=configs/cifar10_mpnin.py --data_dir=DIR

Han, Dai, Applied Intelligence 48(1), 2018. The paper's widths, lengths and error are not available:
widths, schedule and drop-out are NiN's (SGD with momentum .9, rate .1 divided by 10 after 100k of
120k steps, batch 128, weight decay 1e-4); each of the three blocks is pre-trained for 30 epochs
under the same settings at a constant rate, a project choice. One GPU. Measured here: nothing yet
(days of a GPU are needed).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.pipeline.stages import PretrainBlocks
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=307.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-4, decay_exclude=()),
        schedule=ScheduleConfig("step", base=0.1, unit="steps", boundaries=(100_000,)),
        eval_every=10.0,
    )
    block = dataclasses.replace(
        recipe, epochs=30.0, schedule=ScheduleConfig("constant", base=0.1), eval_every=0.0
    )
    return recipes.cifar(
        "cifar10_mpnin",
        "mpnin",
        recipe,
        batch_size=128,
        error=None,
        source="no figure read",
        before={"blocks": PretrainBlocks(block)},
    )
