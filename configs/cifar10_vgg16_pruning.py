"""VGG-16 on the JPEG copy of CIFAR-10: who chooses the channels, at one and the same widths.

    python scripts/run.py --config=configs/cifar10_vgg16_pruning.py --data_dir=DIR

where ``scripts/prepare_cifar10_jpeg.py`` has written the images. Widths are those of Li, Kadav,
Durdanovic, Samet, Graf, "Pruning filters for efficient ConvNets", ICLR 2017, 1608.08710: half of
the convolutions 1 and 8 to 13; 34.2 % of the MACs and 64.0 % of the weights go (there: error
6.75 -> 6.60, from scratch 6.88). The channels are chosen by l1 norm, lasso (with and without
least squares), ThiNet, Fisher information, BN scale, APoZ, HRank, at random; ``bn_scale_macs``,
``slimming`` and ``fisher_cost`` share out the same MACs over all layers. ``dense`` is trained on
alike; ``scratch`` trains the l1 network from fresh weights as long as the others are fine-tuned.
``slimming`` first trains under the l1 penalty on the scales (Liu et al. 2017), epochs that the
others don't get: ``no_penalty`` trains as long, without it. The full run trains
160 epochs and fine-tunes 40 on all images, for an accelerator; a reduced one on two CPU cores has
a quarter of the widths, 8,000 images and 2,000 test images, and a penalty that is stronger as the
steps under it are fewer:

    ... "--config.model.fields.stages=((16,16),(32,32),(64,64,64),(128,128,128),(128,128,128))" \\
        --config.model.fields.hidden=128 "--config.data.train=train[:8000]" \\
        "--config.data.test=test[:2000]" --config.stages.dense.recipe.epochs=8 \\
        --config.stages.methods.recipe.epochs=1 \\
        --config.stages.methods.branches.slimming.recipe.epochs=2 \\
        --config.stages.methods.branches.slimming.strength=0.0125 \\
        --config.stages.methods.branches.no_penalty.recipe.epochs=2

What `scripts/update_results.py` found in ``configs/results/cifar10_vgg16_pruning.json``:
"""

# [measured]
# reduced run, seeds 0; 1 CPU cores, 1 x cpu, jax 0.10.2
# dense: error 36.65 %, 939.9k non-zeros, 1.00x
# methods: error 36.65 %, 939.9k non-zeros, 1.00x
# dense: 100.0 % of the MACs, error 36.65 % before fine-tuning, 36.15 % after
# l1: 65.5 % of the MACs, error 89.80 % before fine-tuning, 38.40 % after
# lasso: 65.5 % of the MACs, error 83.75 % before fine-tuning, 36.15 % after
# lasso_refit: 65.5 % of the MACs, error 39.55 % before fine-tuning, 36.65 % after
# thinet_refit: 65.5 % of the MACs, error 37.95 % before fine-tuning, 37.30 % after
# fisher: 65.5 % of the MACs, error 85.80 % before fine-tuning, 36.65 % after
# bn_scale: 65.5 % of the MACs, error 87.85 % before fine-tuning, 38.20 % after
# apoz: 65.5 % of the MACs, error 90.25 % before fine-tuning, 38.35 % after
# hrank: 65.5 % of the MACs, error 90.30 % before fine-tuning, 38.30 % after
# random: 65.5 % of the MACs, error 90.30 % before fine-tuning, 39.10 % after
# random_refit: 65.5 % of the MACs, error 40.45 % before fine-tuning, 39.45 % after
# bn_scale_macs: 65.6 % of the MACs, error 83.35 % before fine-tuning, 40.20 % after
# fisher_cost: 65.0 % of the MACs, error 75.15 % before fine-tuning, 37.55 % after
# scratch: 65.5 % of the MACs, error 88.75 % before fine-tuning, 65.80 % after
# slimming: 65.7 % of the MACs, error 42.00 % before fine-tuning, 40.70 % after
# no_penalty: 65.7 % of the MACs, error 88.90 % before fine-tuning, 36.40 % after
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.pipeline.stages import Branches, Select, Slimming, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig

STAGES = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)


def paper_ratios() -> dict[str, float]:
    """Half of the convolutions 1 and 8 to 13."""
    layers = [(0, 0), *((s, i) for s in (3, 4) for i in range(3))]
    return {f"stages/{s}/{i}/conv": 0.5 for s, i in layers}


def dense_recipe() -> pipeline.Recipe:
    """Of the network that is pruned."""
    return pipeline.Recipe(
        epochs=160.0,
        optimizer=OptimizerConfig("sgd", nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig("cosine", base=0.05),
        checkpoint_every=5.0,
    )


def images() -> pipeline.DataConfig:
    """The copy, shifted and mirrored."""
    return pipeline.DataConfig(
        "cifar10_jpeg",
        batch_size=64,
        eval_batch_size=1000,
        augment=Augment(pad=4, flip=True, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262)),
    )


def get_config() -> Any:
    """See the module's docstring."""
    ratio, macs = paper_ratios(), 0.658
    slim = pipeline.Recipe(
        epochs=40.0,
        optimizer=OptimizerConfig("sgd", nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig("cosine", base=0.05),
        checkpoint_every=5.0,
    )
    branches: dict[str, Any] = {
        "dense": Select(),
        "l1": Select("l1", ratio),
        "lasso": Select("lasso", ratio),
        "lasso_refit": Select("lasso", ratio, refit=True),
        "thinet_refit": Select("thinet", ratio, refit=True),
        "fisher": Select("fisher", ratio),
        "bn_scale": Select("bn_scale", ratio),
        "apoz": Select("apoz", ratio),
        "hrank": Select("hrank", ratio),
        "random": Select("random", ratio),
        "random_refit": Select("random", ratio, refit=True),
        "bn_scale_macs": Select("bn_scale", macs=macs),
        "slimming": Slimming(recipe=slim, strength=1e-4, macs=macs),
        "no_penalty": Slimming(recipe=slim, strength=0.0, macs=macs),
        "fisher_cost": Select("fisher_cost", macs=macs),
        "scratch": Select("l1", ratio, fresh=True),
    }
    tune = pipeline.Recipe(
        epochs=40.0,
        optimizer=OptimizerConfig("sgd", nesterov=True, weight_decay=5e-4),
        schedule=ScheduleConfig("cosine", base=0.01),
        checkpoint_every=5.0,
    )
    return pipeline.config_dict(
        "cifar10_vgg16_pruning",
        model=pipeline.ModelSpec(
            "vgg16_cifar", {"num_classes": 10, "stages": STAGES, "hidden": 512}
        ),
        data=images(),
        stages={"dense": Train(dense_recipe()), "methods": Branches(branches, tune)},
        seeds=(0,),
    )
