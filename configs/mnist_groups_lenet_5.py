"""Structured sparsity of LeNet-5 (Caffe's, 431,080 parameters) on MNIST: whole filters.

    python scripts/run.py --config=configs/mnist_groups_lenet_5.py --data_dir=DIR

After Wen, Wu, Wang, Chen, Li, NIPS 2016, arXiv 1608.03665: 3-12 filters left of 20-50 at 1.0 %
(0.9 % before); by the exact group operator of forward-backward splitting (Zhou, Alvarez, Porikli,
ECCV 2016) in place of their sub-gradient and threshold; shrunk, then trained on. The strength is
not tuned yet.

Not run yet: a full recipe, for an accelerator or a free CPU. What `scripts/update_results.py`
found in
``configs/results/mnist_groups_lenet_5.json``:
"""

# [measured]
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.pipeline.stages import Proximal, ShrinkDead, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig


def recipe(epochs: float, schedule: str = "cosine") -> pipeline.Recipe:
    """Adam; no weight decay, which would fight the method."""
    return pipeline.Recipe(
        epochs=epochs,
        optimizer=OptimizerConfig("adam"),
        schedule=ScheduleConfig(schedule, base=1e-3),
        eval_every=10.0,
        checkpoint_every=5.0,
    )


def get_config() -> Any:
    """See the module's docstring."""
    return pipeline.config_dict(
        "mnist_groups_lenet_5",
        model=pipeline.ModelSpec("lenet_5_caffe"),
        data=pipeline.DataConfig(
            "mnist", batch_size=128, eval_batch_size=1000, augment=Augment(pad=1)
        ),
        stages={
            "groups": Proximal(
                recipe(60.0),
                strength=1.0,
                group="filter",
                include=("conv*/kernel", "fc1/kernel"),
            ),
            "small": ShrinkDead(),
            "tuned": Train(recipe(20.0)),
        },
        seeds=(0, 1, 2),
        expected={
            "tuned": {"error": 0.010, "source": "Wen et al. 2016"},
        },
    )
