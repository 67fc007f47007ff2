"""LeNet-5 (Caffe form, 431,080 parameters) on MNIST, pruned 12 times.

    python scripts/run.py --config=configs/mnist_lenet_5.py --data_dir=DIR

where ``scripts/prepare_data.py mnist --from FILES --data_dir DIR`` has written the images. After
Han, Pool, Tran, Dally, "Learning both weights and connections for efficient neural networks", NIPS
2015, arXiv 1506.02626, Table 1 (12x at 0.77 %, dense 0.80 %): the smallest weights of the whole
network go in three cuts, and the others are retrained after each from where they are.

What `scripts/update_results.py` found in ``configs/results/mnist_lenet_5.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 2 CPU cores, 1 x cpu, jax 0.10.2
# dense: error 0.62 (0.57-0.65) %, 431.1k non-zeros, 1.00x
#   published: 0.80 % (Han et al. 2015, Table 1)
# pruned: error 0.61 (0.58-0.65) %, 35.88k non-zeros, 12.01x
#   published: 0.77 % (Han et al. 2015, Table 1)
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.pipeline.stages import Prune, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=6.0,
        optimizer=OptimizerConfig("adam", weight_decay=1e-5),
        schedule=ScheduleConfig("cosine", base=1.5e-3),
        eval_every=1.0,
    )
    retrain = pipeline.Recipe(
        epochs=1.5,
        optimizer=OptimizerConfig("adam", weight_decay=1e-5),
        schedule=ScheduleConfig("cosine", base=1e-3),
        checkpoint_every=0.5,
    )
    return pipeline.config_dict(
        "mnist_lenet_5",
        model=pipeline.ModelSpec("lenet_5_caffe"),
        data=pipeline.DataConfig(
            "mnist", batch_size=64, eval_batch_size=1000, augment=Augment(pad=1)
        ),
        # 35,301 of 430,500 weights and all 580 biases stay
        stages={
            "dense": Train(recipe),
            "pruned": Prune(retrain, sparsity=0.918, cuts=3, final_epochs=3.0),
        },
        seeds=(0, 1, 2),
        expected={
            "dense": {"error": 0.0080, "source": "Han et al. 2015, Table 1"},
            "pruned": {
                "error": 0.0077,
                "compression": 12.0,
                "source": "Han et al. 2015, Table 1",
            },
        },
    )
