"""Pre-activation ResNet-200 on ImageNet.

    python scripts/run.py --config=configs/imagenet_preact_resnet200.py --data_dir=DIR

He, Zhang, Ren, Sun, ECCV 2016, 1603.05027: SGD with momentum .9 (Nesterov in the Torch code), rate
.1 divided by 10 at epochs 30 and 60 of 90, batch 256, weight decay 1e-4, no drop-out, scales 256 to
480 (here random resized crops). Paper: 21.7 % top-1 error (224 crop; as recalled). Eight GPUs.
Measured here: nothing yet (the paper's hardware and days are needed).
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
        "imagenet_preact_resnet200",
        "preact_resnet200",
        recipe,
        batch_size=256,
        error=0.217,
        source="He et al. 2016b, as recalled",
    )
