"""NiN on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_nin.py --data_dir=DIR

Lin, Chen, Yan, "Network in network", ICLR 2014, 1312.4400: SGD with momentum .9, rate .1 divided by
10 after 100k of 120k steps, batch 128, weight decay 1e-4, drop-out .5. Paper: 8.81 % error.
Different here: per-channel normalisation instead of global contrast normalisation and ZCA
whitening. One GPU. Measured here: nothing yet (the paper's hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.pipeline.stages import Train
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=307.0,  # 120k steps
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-4, decay_exclude=()),
        schedule=ScheduleConfig("step", base=0.1, unit="steps", boundaries=(100_000,)),
        eval_every=10.0,
    )
    return pipeline.config_dict(
        "cifar10_nin",
        model=pipeline.ModelSpec("nin_cifar"),
        data=pipeline.DataConfig(
            "cifar10",
            batch_size=128,
            augment=Augment(
                pad=4,
                flip=True,
                mean=(0.4914, 0.4822, 0.4465),
                std=(0.2470, 0.2435, 0.2616),
            ),
        ),
        stages={"train": Train(recipe)},
        expected={"train": {"error": 0.0881, "source": "Lin et al. 2014"}},
    )
