"""Hard-concrete gates on LeNet-5 (Caffe's, 431,080 parameters) and MNIST.

    python scripts/run.py --config=configs/mnist_gates_lenet_5.py --data_dir=DIR

After Louizos, Welling, Kingma, ICLR 2018, arXiv 1712.01312: 20-25-45-462 at 0.9 % (lambda 0.1/N):
gates on output maps of convolutions and input units of dense layers, 200 epochs, then shrunk.

Not run yet: a full recipe, for an accelerator or a free CPU. What `scripts/update_results.py`
found in
``configs/results/mnist_gates_lenet_5.json``:
"""

# [measured]
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.pipeline.stages import Gates, ShrinkDead
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
        "mnist_gates_lenet_5",
        model=pipeline.ModelSpec("lenet_5_caffe"),
        data=pipeline.DataConfig(
            "mnist", batch_size=128, eval_batch_size=1000, augment=Augment(pad=1)
        ),
        stages={
            "gates": Gates(
                recipe(200.0, "constant"),
                gates={
                    "conv1/kernel": "filter",
                    "conv2/kernel": "filter",
                    "fc1/kernel": "channel",
                    "fc2/kernel": "channel",
                },
                strength=0.1 / 60_000,
            ),
            "small": ShrinkDead(),
        },
        seeds=(0, 1, 2),
        expected={
            "small": {"error": 0.009, "source": "Louizos et al. 2018"},
        },
    )
