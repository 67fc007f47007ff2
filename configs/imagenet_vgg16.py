"""VGG-16 on ImageNet.

    python scripts/run.py --config=configs/imagenet_vgg16.py --data_dir=DIR

Simonyan, Zisserman, ICLR 2015, 1409.1556: SGD with momentum .9, rate .01 divided by 10 when the
error stalls, three times in 74 epochs (here at 25, 50 and 65), batch 256, weight decay 5e-4,
drop-out .5 twice, scales 256 to 512. Paper: 25.6 % top-1 error (scale jitter, one scale at test
time; as recalled). Different here: batch normalisation (vgg16_bn) replaces the initialisation from
a shallow network. Four GPUs. Measured here: nothing yet (the paper's hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=74.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=5e-4, decay_exclude=()),
        schedule=ScheduleConfig("step", base=0.01, boundaries=(25, 50, 65)),
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_vgg16",
        "vgg16_bn",
        recipe,
        batch_size=256,
        error=0.256,
        source="Simonyan and Zisserman 2015, as recalled",
        crop=(0.19, 0.77),
    )
