"""VGG-16 with batch normalization on part of the JPEG copy of CIFAR-10 for a few epochs.

    python scripts/run.py --config=configs/cifar10_short_vgg16.py --data_dir=DIR

where ``scripts/prepare_cifar10_jpeg.py`` has written the images. Simonyan & Zisserman, ICLR 2015,
1409.1556, in the form for 32x32 images; SGD with Nesterov momentum .9, rate .05, weight decay 5e-4,
batch 64, pad-4 crops and mirror images; here 5,000 images, 4 epochs, the rate to 0 along a cosine,
and 2,000 test images. The floor: 35 % of the test images right (chance is 10 %). The run at full
length is ``cifar10_vgg16.py``. What `scripts/update_results.py` found in
``configs/results/cifar10_short_vgg16.json``:
"""

# [measured]
# not run yet
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
        optimizer=OptimizerConfig("sgd", momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig("cosine", base=0.05),
    )
    return recipes.cifar(
        "cifar10_short_vgg16",
        "vgg16_cifar",
        recipe,
        batch_size=64,
        data="cifar10_jpeg",
        train="train[:5000]",
        test="test[:2000]",
        error=None,
        source="floor stated before the run",
        more={"floor": 0.35},
    )
