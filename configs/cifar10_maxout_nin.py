"""Maxout network in network on CIFAR-10.

    python scripts/run.py --config=configs/cifar10_maxout_nin.py --data_dir=DIR

Chang, Chen, "Batch-normalized maxout network in network", 2015, 1511.02583: SGD with momentum .9,
batch 100, weight decay 5e-4 on convolution kernels, drop-out .5, no augmentation; the kernels' rate
is .5 x .1 for 80 epochs, then falls linearly. Paper: 7.85 % error (as recalled). Different here:
per-channel normalisation instead of global contrast normalisation and ZCA whitening; norms and
biases have the kernels' rate, which falls along one cosine over 222 epochs. One GPU. Measured here:
nothing yet (the paper's hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=222.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=5e-4),
        schedule=ScheduleConfig("cosine", base=0.05),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_maxout_nin",
        "maxout_nin",
        recipe,
        batch_size=100,
        error=0.0785,
        source="Chang and Chen 2015, as recalled",
        augment={"pad": 0, "flip": False},
    )
