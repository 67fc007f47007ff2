"""ResNeXt-29, 8x64d, on CIFAR-10 with augmentation.

    python scripts/run.py --config=configs/cifar10_resnext.py --data_dir=DIR

Xie, Girshick, Dollar, Tu, He, CVPR 2017, 1611.05431: SGD with momentum .9 (Nesterov in the authors'
code), rate .1 divided by 10 at epochs 150 and 225 of 300, batch 128, weight decay 5e-4. Paper: 3.65
% error (as recalled). Eight GPUs. Measured here: nothing yet (the paper's hardware and days are
needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=300.0,
        optimizer=OptimizerConfig(
            "sgd", momentum=0.9, nesterov=True, weight_decay=5e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(150, 225)),
        eval_every=10.0,
    )
    return recipes.cifar(
        "cifar10_resnext",
        "resnext29_8x64d",
        recipe,
        batch_size=128,
        error=0.0365,
        source="Xie et al. 2017, as recalled",
    )
