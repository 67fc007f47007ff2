"""AlexNet (two groups, 227) on ImageNet.

    python scripts/run.py --config=configs/imagenet_alexnet.py --data_dir=DIR

Krizhevsky, Sutskever, Hinton, NIPS 2012: SGD with momentum .9, rate .01 divided by 10 when the
error stalls, three times in about 90 epochs (here at 30, 60 and 80), batch 128, weight decay 5e-4,
crops of the 256-pixel image, mirror images, PCA colour noise .1, drop-out .5 twice. Paper: 40.7 %
top-1 error (one network, ten crops; as recalled). Different here: the random crop also rescales (48
to 100 % of the area). One GPU. Measured here: nothing yet (the paper's hardware and days are
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
        epochs=90.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=5e-4, decay_exclude=()),
        schedule=ScheduleConfig("step", base=0.01, boundaries=(30, 60, 80)),
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_alexnet",
        "alexnet_caffe",
        recipe,
        batch_size=128,
        error=0.407,
        source="Krizhevsky et al. 2012, ten crops, as recalled",
        size=227,
        resize=256,
        crop=(0.48, 1.0),
        augment={"lighting": 0.1},
    )
