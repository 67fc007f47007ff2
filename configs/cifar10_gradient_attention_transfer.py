"""Gradient-based attention transfer on CIFAR-10 without augmentation, beside KD.

    python scripts/run.py --config=configs/cifar10_gradient_attention_transfer.py --data_dir=DIR

Zagoruyko, Komodakis, ICLR 2017, 1612.03928, section 3.2: the student's gradient of the loss at its
input imitates the teacher's. WRN-16-1 taught by WRN-16-2, SGD with Nesterov momentum .9, rate .1
times .2 at epochs 60, 120 and 160 of 200, batch 128, weight decay 5e-4. Paper (recalled, not
checked): student alone 13.5 % error, with gradient attention or KD 11.8 to 12.1 %; maps of
activations do better than gradients. Not run: 4 x 200 epochs a seed, one of them with double
backpropagation, are days on a CPU; the same term is measured at small size in ``digits_transfer``.
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.distillation import DistillConfig
from cnnjax.pipeline.recipes import STATISTICS
from cnnjax.pipeline.stages import Distill, KeepTeacher, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig

STUDENT = pipeline.ModelSpec("wrn_40_1", {"stages": (2, 2, 2)})  # WRN-16-1


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=200.0,
        optimizer=OptimizerConfig(
            "sgd", momentum=0.9, nesterov=True, weight_decay=5e-4, decay_exclude=()
        ),
        schedule=ScheduleConfig("step", base=0.1, boundaries=(60, 120, 160), gamma=0.2),
        eval_every=10.0,
    )
    mean, std = STATISTICS["cifar10"]
    losses = {
        "alone": DistillConfig(hard=1.0, soft="none"),
        "kd": DistillConfig(hard=0.1, soft_weight=0.9, temperature=4.0),
        "gradient_attention": DistillConfig(hard=1.0, soft="none", gradient_beta=1e3),
    }
    stages: dict[str, Any] = {"teacher": Train(recipe), "keep": KeepTeacher()}
    stages |= {k: Distill(recipe, loss, STUDENT, order="students") for k, loss in losses.items()}
    return pipeline.config_dict(
        "cifar10_gradient_attention_transfer",
        model=pipeline.ModelSpec("wrn_16_2"),
        data=pipeline.DataConfig("cifar10", batch_size=128, augment=Augment(mean=mean, std=std)),
        stages=stages,
        seeds=(0, 1, 2),
        expected={
            "alone": {"error": 0.135, "source": "Zagoruyko and Komodakis 2017, recalled"},
            "gradient_attention": {"error": 0.121, "source": "the same, recalled"},
        },
    )
