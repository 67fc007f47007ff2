"""Pre-activation ResNet-164 on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_preact_resnet.py --data_dir=DIR

He, Zhang, Ren, Sun, "Identity mappings in deep residual networks", ECCV 2016, 1603.05027: SGD with
momentum .9, rate .1 divided by 10 after 32k and 48k of 64k steps, the first 400 at .01 (here rising
to .1), batch 128, weight decay 1e-4. Paper: 5.46 % error (as recalled). One GPU. Measured here:
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
        "cifar10_preact_resnet",
        "preact_resnet164",
        recipe,
        batch_size=128,
        error=0.0546,
        source="He et al. 2016b, as recalled",
    )
