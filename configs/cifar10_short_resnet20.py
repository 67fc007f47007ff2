"""ResNet-20 on part of the JPEG copy of CIFAR-10 for a few epochs: does the recipe learn?

    python scripts/run.py --config=configs/cifar10_short_resnet20.py --data_dir=DIR

where ``scripts/prepare_cifar10_jpeg.py`` has written the images. He et al., CVPR 2016, 1512.03385:
SGD with momentum .9, rate .1, weight decay 1e-4, pad-4 crops and mirror images; here 10,000 images,
4 epochs, batch 64, rate from .1 to 0 along a cosine, and 2,000 test images. The floor: 45 % of the
test images right (chance is 10 %; a linear classifier of pixels reaches about 38 %). The paper's
own run is ``cifar10_resnet.py``. What `scripts/update_results.py` found in
``configs/results/cifar10_short_resnet20.json``:
"""

# [measured]
# full run, seeds 0; 1 CPU cores, 1 x cpu, jax 0.10.2
# train: error 52.20 %, 269.7k non-zeros, 1.00x
#   floor: 45.00 % right, measured 47.80 %: beaten
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=4.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-4, decay_exclude=()),
        schedule=ScheduleConfig("cosine", base=0.1),
    )
    return recipes.short_cifar(
        "cifar10_short_resnet20",
        "resnet20_cifar",
        recipe,
        images=10_000,
        floor=0.45,
    )
