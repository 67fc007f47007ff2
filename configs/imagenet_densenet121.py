"""DenseNet-121 on ImageNet.

    python scripts/run.py --config=configs/imagenet_densenet121.py --data_dir=DIR

Huang, Liu, van der Maaten, Weinberger, CVPR 2017, 1608.06993: SGD with Nesterov momentum .9, rate
.1 divided by 10 at epochs 30 and 60 of 90, batch 256, weight decay 1e-4. Paper: 25.02 % top-1 error
(as recalled). Four GPUs. Measured here: nothing yet (the paper's hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=90.0,
        optimizer=OptimizerConfig(
            "sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(30, 60)),
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_densenet121",
        "densenet121",
        recipe,
        batch_size=256,
        error=0.2502,
        source="Huang et al. 2017, as recalled",
    )
