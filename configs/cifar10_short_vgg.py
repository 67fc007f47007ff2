"""A narrow VGG on part of the JPEG copy of CIFAR-10 for a few epochs: does the recipe learn?

    python scripts/run.py --config=configs/cifar10_short_vgg.py --data_dir=DIR

where ``scripts/prepare_cifar10_jpeg.py`` has written the images. Simonyan, Zisserman, ICLR 2015,
1409.1556, as on CIFAR: batch norms, three stages of 2, 2 and 3 convolutions, 16 to 64 channels, one
hidden layer of 64. SGD with momentum .9, weight decay 5e-4, pad-4 crops and mirror images; here
10,000 images, 4 epochs, batch 64, rate from .05 to 0 along a cosine, and 2,000 test images. The
floor: 45 % of the test images right (chance is 10 %). The paper-like run is ``cifar10_vgg16.py``.
What `scripts/update_results.py` found in ``configs/results/cifar10_short_vgg.json``:
"""

# [measured]
# full run, seeds 0; 1 CPU cores, 1 x cpu, jax 0.10.2
# train: error 41.45 %, 114.2k non-zeros, 1.00x
#   floor: 45.00 % right, measured 58.55 %: beaten
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
        optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=5e-4, decay_exclude=()),
        schedule=ScheduleConfig("cosine", base=0.05),
    )
    return recipes.short_cifar(
        "cifar10_short_vgg",
        "vgg16_cifar",
        recipe,
        fields={"stages": ((16, 16), (32, 32), (64, 64, 64)), "hidden": 64},
        images=10_000,
        floor=0.45,
    )
