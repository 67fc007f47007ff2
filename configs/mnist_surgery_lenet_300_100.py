"""Dynamic network surgery of LeNet-300-100 (266,610 parameters) on MNIST.

    python scripts/run.py --config=configs/mnist_surgery_lenet_300_100.py --data_dir=DIR

After Guo, Yao, Chen, "Dynamic network surgery for efficient DNNs", NIPS 2016, arXiv 1608.04493:
2.28 to 1.99 % error at 56x (1.8, 1.8 and 5.5 % of the weights of the three layers left). The paper
does not give c for this network; the values here are not tuned yet and remove fewer weights than
the paper.

What `scripts/update_results.py` found in ``configs/results/mnist_surgery_lenet_300_100.json``:
"""

# [measured]
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.pipeline.stages import Surgery, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    dense = pipeline.Recipe(
        epochs=10.0,
        optimizer=OptimizerConfig("adam", weight_decay=1e-4),
        schedule=ScheduleConfig("cosine", base=1e-3),
        checkpoint_every=10.0,
    )
    # no weight decay: it would make pruning irreversible
    surgery = pipeline.Recipe(
        epochs=30.0,
        optimizer=OptimizerConfig("adam"),
        schedule=ScheduleConfig("cosine", base=1e-3),
        eval_every=10.0,
        checkpoint_every=10.0,
    )
    return pipeline.config_dict(
        "mnist_surgery_lenet_300_100",
        model=pipeline.ModelSpec("lenet_300_100"),
        data=pipeline.DataConfig(
            "mnist", batch_size=128, eval_batch_size=1000, augment=Augment(pad=1)
        ),
        stages={
            "dense": Train(dense),
            "surgery": Surgery(
                surgery,
                rate={"fc1/kernel": 3.0, "fc2/kernel": 3.0, "fc3/kernel": 1.5},
                gamma=1e-4,
                stop=0.7,
            ),
        },
        seeds=(0, 1, 2),
        expected={
            "surgery": {
                "error": 0.0199,
                "compression": 56.0,
                "source": "Guo et al. 2016, Table 1",
            },
        },
    )
