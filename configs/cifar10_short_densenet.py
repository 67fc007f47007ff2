"""A small DenseNet-BC on part of the JPEG copy of CIFAR-10 for a few epochs: does it learn?

    python scripts/run.py --config=configs/cifar10_short_densenet.py --data_dir=DIR

where ``scripts/prepare_cifar10_jpeg.py`` has written the images. Huang et al., CVPR 2017,
1608.06993: SGD with Nesterov momentum .9, rate .1, weight decay 1e-4, batch 64, pad-4 crops and
mirror images; here three blocks of 3 bottleneck layers, growth 12, 8,000 images, 3 epochs, the rate
to 0 along a cosine, and 2,000 test images. The floor: 40 % of the test images right (chance is
10 %). The paper's own run is ``cifar10_densenet.py``. What `scripts/update_results.py` found in
``configs/results/cifar10_short_densenet.json``:
"""

# [measured]
# full run, seeds 0; 1 CPU cores, 1 x cpu, jax 0.10.2
# train: error 53.70 %, 71.69k non-zeros, 1.00x
#   floor: 40.00 % right, measured 46.30 %: beaten
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=3.0,
        optimizer=OptimizerConfig(
            "sgd", momentum=0.9, nesterov=True, weight_decay=1e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("cosine", base=0.1),
    )
    return recipes.short_cifar(
        "cifar10_short_densenet",
        "densenet_bc_100_12",
        recipe,
        fields={"stages": (3, 3, 3)},
        images=8_000,
        floor=0.40,
    )
