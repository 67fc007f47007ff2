"""Dynamic network surgery of LeNet-5 (Caffe's, 431,080 parameters) on MNIST.

    python scripts/run.py --config=configs/mnist_surgery_lenet_5.py --data_dir=DIR

After Guo, Yao, Chen, NIPS 2016, arXiv 1608.04493: 0.91 to 0.91 % error at 108x (14.2, 3.1, 0.7 and
4.3 % of the weights of the four layers left). The released code gives c = 4 for ip1; the other
rates are not tuned yet.

Not run yet: a full recipe, for an accelerator or a free CPU. What `scripts/update_results.py`
found in
``configs/results/mnist_surgery_lenet_5.json``:
"""

# [measured]
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.pipeline.stages import Surgery, Train
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
        "mnist_surgery_lenet_5",
        model=pipeline.ModelSpec("lenet_5_caffe"),
        data=pipeline.DataConfig(
            "mnist", batch_size=128, eval_batch_size=1000, augment=Augment(pad=1)
        ),
        stages={
            "dense": Train(recipe(10.0)),
            "surgery": Surgery(
                recipe(40.0),
                rate={
                    "conv1/kernel": 1.0,
                    "conv2/kernel": 2.5,
                    "fc1/kernel": 4.0,
                    "fc2/kernel": 2.0,
                },
                gamma=1e-4,
                stop=0.7,
            ),
        },
        seeds=(0, 1, 2),
        expected={
            "surgery": {"error": 0.0091, "compression": 108.0, "source": "Guo et al. 2016"},
        },
    )
