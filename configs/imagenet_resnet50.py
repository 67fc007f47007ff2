"""ResNet-50 on ImageNet.

    python scripts/run.py --config=configs/imagenet_resnet50.py --data_dir=DIR

He, Zhang, Ren, Sun, CVPR 2016, 1512.03385: SGD with momentum .9 (Nesterov in the Torch code), rate
.1 divided by 10 at epochs 30 and 60 of 90, batch 256, weight decay 1e-4, no drop-out, scales 256 to
480 (here random resized crops, as in the Torch code). Paper: 24.7 % top-1 error (as recalled); 7.8
% top-5, single crop. The stride sits in the 1x1 convolution, as in the paper. Eight GPUs. Measured
here: nothing yet (the paper's hardware and days are needed).
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
        "imagenet_resnet50",
        "resnet50_v1",
        recipe,
        batch_size=256,
        error=0.247,
        source="He et al. 2016, as recalled",
    )
