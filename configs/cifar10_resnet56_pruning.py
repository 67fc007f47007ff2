"""ResNet-56 on the JPEG copy of CIFAR-10: who chooses the channels, at one and the same widths.

    python scripts/run.py --config=configs/cifar10_resnet56_pruning.py --data_dir=DIR \\
        --config.stages.published.weights=cifar10_resnet56.npz

where ``scripts/prepare_cifar10_jpeg.py`` has written the images. The weights are published ones
(83.20 % on this copy). Widths are those of "ResNet-56-B" of Li, Kadav, Durdanovic, Samet, Graf,
"Pruning filters for efficient ConvNets", ICLR 2017, 1608.08710: 60, 30 and 10 % of the first
convolution of every block by stage, blocks of the layers 16, 18, 20, 34, 38 and 54 whole; 27.6 % of
the MACs and 13.7 % of the weights go (there: error 6.96 -> 6.94, from scratch 8.69). The channels
are chosen by l1 norm, lasso (with and without least squares), ThiNet, Fisher information, BN
scale, at random; ``bn_scale_macs``, ``slimming`` and ``fisher_cost`` share out the same MACs over
all layers, the residual streams included. ``dense`` is fine-tuned alike, ``scratch`` trains the l1
network from fresh weights as long as the others are fine-tuned. ``slimming`` first trains under
the l1 penalty on the scales (Liu et al. 2017), epochs that the others don't get: ``no_penalty``
trains as long, without it. The full run fine-tunes 40 epochs on all images, for an accelerator; a
reduced one on two CPU cores takes one epoch of 5,000 images, and a penalty that is stronger as the
steps under it are fewer:

    ... "--config.data.train=train[:5000]" "--config.data.test=test[:2000]" \\
        --config.stages.methods.recipe.epochs=1 \\
        --config.stages.methods.branches.slimming.recipe.epochs=1 \\
        --config.stages.methods.branches.slimming.strength=0.04 \\
        --config.stages.methods.branches.no_penalty.recipe.epochs=1

What `scripts/update_results.py` found in ``configs/results/cifar10_resnet56_pruning.json``:
"""

# [measured]
# reduced run, seeds 0; 1 CPU cores, 1 x cpu, jax 0.10.2
# published: error 16.00 %, 853.0k non-zeros, 1.00x
# methods: error 16.00 %, 853.0k non-zeros, 1.00x
# dense: 100.0 % of the MACs, error 16.00 % before fine-tuning, 12.85 % after
# l1: 72.4 % of the MACs, error 27.80 % before fine-tuning, 14.00 % after
# lasso: 72.4 % of the MACs, error 32.00 % before fine-tuning, 14.05 % after
# lasso_refit: 72.4 % of the MACs, error 18.90 % before fine-tuning, 14.00 % after
# thinet_refit: 72.4 % of the MACs, error 18.20 % before fine-tuning, 14.40 % after
# fisher: 72.4 % of the MACs, error 29.95 % before fine-tuning, 14.95 % after
# bn_scale: 72.4 % of the MACs, error 40.40 % before fine-tuning, 14.40 % after
# random: 72.4 % of the MACs, error 49.10 % before fine-tuning, 15.95 % after
# random_refit: 72.4 % of the MACs, error 23.35 % before fine-tuning, 18.20 % after
# bn_scale_macs: 70.1 % of the MACs, error 86.95 % before fine-tuning, 22.90 % after
# fisher_cost: 72.4 % of the MACs, error 26.35 % before fine-tuning, 13.10 % after
# scratch: 72.4 % of the MACs, error 89.45 % before fine-tuning, 73.40 % after
# slimming: 72.1 % of the MACs, error 89.60 % before fine-tuning, 24.70 % after
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.pipeline.stages import Branches, Select, Slimming
from cnnjax.training import OptimizerConfig, ScheduleConfig

SHARES, WHOLE = (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54)


def paper_ratios(blocks: int = 9) -> dict[str, float]:
    """Share to remove of the first convolution of each block: layer ``2 + 2 * block``."""
    layers = [(s, b, 2 + 2 * (s * blocks + b)) for s in range(3) for b in range(blocks)]
    return {f"layer{s + 1}/{b}/conv1": SHARES[s] for s, b, n in layers if n not in WHOLE}


def get_config() -> Any:
    """See the module's docstring."""
    ratio, macs = paper_ratios(), 0.7245
    readers = ("layer*/*/conv2",)
    slim = pipeline.Recipe(
        epochs=40.0,
        optimizer=OptimizerConfig("sgd", nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig("cosine", base=0.05),
        checkpoint_every=5.0,
    )
    branches: dict[str, Any] = {
        "dense": Select(),
        "l1": Select("l1", ratio),
        "lasso": Select("lasso", ratio, readers=readers),
        "lasso_refit": Select("lasso", ratio, readers=readers, refit=True),
        "thinet_refit": Select("thinet", ratio, readers=readers, refit=True),
        "fisher": Select("fisher", ratio),
        "bn_scale": Select("bn_scale", ratio),
        "random": Select("random", ratio),
        "random_refit": Select("random", ratio, readers=readers, refit=True),
        "bn_scale_macs": Select("bn_scale", macs=macs),
        "slimming": Slimming(recipe=slim, strength=1e-4, macs=macs),
        "no_penalty": Slimming(recipe=slim, strength=0.0, macs=macs),
        "fisher_cost": Select("fisher_cost", macs=macs),
        "scratch": Select("l1", ratio, fresh=True),
    }
    recipe = pipeline.Recipe(
        epochs=40.0,
        optimizer=OptimizerConfig("sgd", nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig("cosine", base=0.01),
        checkpoint_every=5.0,
    )
    return recipes.published_cifar(
        "cifar10_resnet56_pruning",
        "resnet56_cifar",
        {"methods": Branches(branches, recipe)},
    )
