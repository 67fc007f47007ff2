"""GoogLeNet (paper's form) on ImageNet, Caffe's quick solver.

    python scripts/run.py --config=configs/imagenet_googlenet.py --data_dir=DIR

Szegedy et al., "Going deeper with convolutions", CVPR 2015, 1409.4842, as trained by BVLC Caffe:
SGD with momentum .9, rate .01 with a polynomial decay of power .5 over 2.4M steps of 32 images,
weight decay 2e-4. BVLC: 31.3 % top-1 error. Different here: no auxiliary losses (the run's loss is
the main head's) and per-channel normalisation. Measured here: nothing yet (the paper's hardware and
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
        epochs=60.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=2e-4, decay_exclude=()),
        schedule=ScheduleConfig("polynomial", base=0.01, power=0.5),
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_googlenet",
        "googlenet_caffe",
        recipe,
        batch_size=32,
        error=0.313,
        source="BVLC Caffe",
    )
