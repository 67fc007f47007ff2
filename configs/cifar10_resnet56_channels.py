"""ResNet-56 on the JPEG copy of CIFAR-10: half of the MACs removed by whole channels, fine-tuned.

    python scripts/run.py --config=configs/cifar10_resnet56_channels.py --data_dir=DIR \\
        --config.stages.published.weights=cifar10_resnet56.npz

where ``scripts/prepare_cifar10_jpeg.py`` has written the images. The weights are published ones
(93.39 % on the lossless test set, 83.20 % on this copy). Filters go by their L1 norm (Li et al.
2017, 1608.08710), compared over the whole network after dividing by each group's mean; tied
channels of the residual streams go together. BatchNorm statistics are measured again on 2,000
training images before the fine-tuning of 40 epochs, for an accelerator; a reduced run on two CPU
cores takes part of the training images:

    ... --config.stages.channels.recipe.epochs=4 "--config.data.train=train[:10000]"

What `scripts/update_results.py` found in ``configs/results/cifar10_resnet56_channels.json``:
"""

# [measured]
# reduced run, seeds 0; 1 CPU cores, 1 x cpu, jax 0.10.2
# published: error 16.80 %, 853.0k non-zeros, 1.00x
# channels: error 17.44 %, 495.1k non-zeros, 1.00x
#   accuracy % before 83.20, shrunk 11.59, recalibrated 48.08
#   fine-tuned 82.56, MACs left 0.49x, parameters left 0.58x, measured speed-up 1.33x
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.pipeline.stages import Channels
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=40.0,
        optimizer=OptimizerConfig("sgd", nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig("cosine", base=0.02),
        checkpoint_every=5.0,
    )
    return recipes.published_cifar(
        "cifar10_resnet56_channels",
        "resnet56_cifar",
        {"channels": Channels(recipe, macs=0.5, round_to=4, recalibrate=2000)},
    )
