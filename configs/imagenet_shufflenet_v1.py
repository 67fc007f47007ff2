"""ShuffleNet v1 (g = 3, 1x) on ImageNet.

    python scripts/run.py --config=configs/imagenet_shufflenet_v1.py --data_dir=DIR

Zhang, Zhou, Lin, Sun, "ShuffleNet", CVPR 2018, 1707.01083: SGD with momentum .9, rate .5 linearly
to 0 over 3e5 steps of 1024 images on 4 GPUs, weight decay 4e-5, mild scale augmentation. Paper:
32.6 % top-1 error (the authors' release, with label smoothing and colour jitter: 32.2). Measured
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
        epochs=240.0,  # 3e5 steps
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=4e-5),
        schedule=ScheduleConfig("linear", base=0.5),
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_shufflenet_v1",
        "shufflenet_v1_g3",
        recipe,
        batch_size=1024,
        error=0.326,
        source="Zhang et al. 2018, as recalled",
        crop=(0.25, 1.0),
    )
