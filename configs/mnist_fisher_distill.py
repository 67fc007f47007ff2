"""LeNet-5 on MNIST loses maps by Fisher information while its own whole self teaches it.

    python scripts/run.py --config=configs/mnist_fisher_distill.py --data_dir=DIR

Theis, Korshunova, Tejani, Huszar 2018, 1801.05787: train some steps, remove the map with the
smallest ``Delta L + beta Delta C``, repeat, fine-tune. ``priced`` needs no beta (the paper's beta*:
the smallest ``-Delta L / Delta C`` goes), ``free`` has beta = 0 (the smallest damage goes, whatever
it saves); both end at 17 % of the multiply-accumulates. Paper, error and relative cost: whole
0.80 % and 100 %, beta = 0 0.84 and 26, beta > 0 0.79 and 10, beta* 0.86 and 17. Expected: at most
0.3 points above the whole network, and ``priced`` below ``free`` on the mean of three seeds. A
reduced run takes part of the images: "--config.data.train=train[:10000]"; in it ``priced`` ended
0.7 points above the whole network (not within 0.3) and 2.4 below ``free``, in every seed.

What `scripts/update_results.py` found in ``configs/results/mnist_fisher_distill.json``:
"""

# [measured]
# reduced run, seeds 0, 1, 2; 1 CPU cores, 1 x cpu, jax 0.10.2
# whole: error 2.01 (1.94-2.11) %, 431.1k non-zeros, 1.00x
#   published: 0.80 % (Theis et al. 2018, LeNet-5)
# keep: error 2.01 (1.94-2.11) %, 431.1k non-zeros, 1.00x
# priced: error 2.67 (2.55-2.86) %, 64.35k non-zeros, 1.00x
#   published: 0.86 % (the same, beta*, 17 % of the cost)
# recall: error 2.01 (1.94-2.11) %, 431.1k non-zeros, 1.00x
# free: error 5.04 (4.70-5.33) %, 9,421 non-zeros, 1.00x
#   published: 0.84 % (the same, beta = 0, 26 % of the cost)
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.distillation import DistillConfig
from cnnjax.pipeline.stages import FisherDistill, KeepTeacher, RecallTeacher, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig

KD = DistillConfig(hard=0.1, soft_weight=0.9, temperature=4.0)


def get_config() -> Any:
    """See the module's docstring."""

    def recipe(epochs: float, rate: float) -> pipeline.Recipe:
        return pipeline.Recipe(
            epochs=epochs,
            optimizer=OptimizerConfig("adam"),
            schedule=ScheduleConfig("cosine", base=rate),
            checkpoint_every=0.0,
        )

    def pruned(beta: float) -> FisherDistill:
        return FisherDistill(
            recipe(1.0, 5e-4), recipe(2.0, 1e-3), KD, macs=0.17, rounds=20, examples=256, beta=beta
        )

    return pipeline.config_dict(
        "mnist_fisher_distill",
        model=pipeline.ModelSpec("lenet_5_caffe"),
        data=pipeline.DataConfig("mnist", batch_size=64, eval_batch_size=1000),
        stages={
            "whole": Train(recipe(3.0, 1.5e-3)),
            "keep": KeepTeacher(),
            "priced": pruned(-1.0),
            "recall": RecallTeacher(),
            "free": pruned(0.0),
        },
        seeds=(0, 1, 2),
        expected={
            "whole": {"error": 0.0080, "source": "Theis et al. 2018, LeNet-5"},
            "priced": {"error": 0.0086, "source": "the same, beta*, 17 % of the cost"},
            "free": {"error": 0.0084, "source": "the same, beta = 0, 26 % of the cost"},
        },
        note="maps removed to 17 % of the multiply-accumulates; last epoch",
    )
