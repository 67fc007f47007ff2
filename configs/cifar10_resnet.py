"""ResNet-110 on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_resnet.py --data_dir=DIR

He, Zhang, Ren, Sun, CVPR 2016, 1512.03385: SGD with momentum .9, rate .1 divided by 10 after 32k
and 48k of 64k steps, batch 128, weight decay 1e-4 on everything, He initialisation, pad-4 crops and
mirror images. Paper: 6.43 % error (best of 5; as recalled). Different here: the warm-up is 400
steps at a rising rate instead of .01 until the training error falls below 80 %. Other depths:
--config.model.name=resnet20_cifar. One GPU. Measured here: nothing yet (the paper's hardware and
days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=164.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-4, decay_exclude=()),
        schedule=ScheduleConfig(
            "step",
            base=0.1,
            unit="steps",
            warmup=400,
            warmup_start=0.1,
            boundaries=(32_000, 48_000),
        ),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_resnet",
        "resnet110_cifar",
        recipe,
        batch_size=128,
        error=0.0643,
        source="He et al. 2016, as recalled",
    )
