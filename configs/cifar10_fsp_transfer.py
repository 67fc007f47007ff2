"""FSP on CIFAR-10: an 8-layer residual network taught by one of 26 layers, beside FitNets' hint.

    python scripts/run.py --config=configs/cifar10_fsp_transfer.py --data_dir=DIR

Yim, Joo, Bae, Kim, "A gift from knowledge distillation", CVPR 2017: the student's Gram matrices
between the first and the last layer of every resolution imitate the teacher's for 21,000 steps,
then it learns from the labels for 21,000 more; rates .001 and .1, a tenth of it at 11,000 and
16,000 steps, momentum .9, weight decay 1e-4, batch 128; the teacher has the usual 64,000 steps.
Paper (recalled, not checked): student alone 87.91, FitNet 88.57, FSP 88.70, teacher 91.91 %
accuracy. Not run: 64,000 and 5 x 21,000 steps a seed are days on a CPU; the same two stages are
measured at small size in ``digits_transfer``, ``mnist_distill`` and (part of the images)
``cifar10_resnet56_to_resnet20_kd``.
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.distillation import DistillConfig
from cnnjax.pipeline.recipes import STATISTICS
from cnnjax.pipeline.stages import Distill, KeepTeacher, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig

STEPS, TEACHER_STEPS, PER_EPOCH = 21_000, 64_000, 390  # of 128 of 50,000 images
TEACHER = pipeline.ModelSpec("resnet20_cifar", {"blocks_per_stage": 4})  # 26 layers
STUDENT = pipeline.ModelSpec("resnet20_cifar", {"blocks_per_stage": 1})  # 8
INNER = "conv2:input"  # of the first block: what its first layer gives
SECTIONS = tuple(
    (f"layer{i}/0/{INNER}", f"layer{i}/0", f"layer{i}/0/{INNER}", f"layer{i}/3") for i in (1, 2, 3)
)
MIDDLE = (("layer2/0", "layer2/3"),)


def get_config() -> Any:
    """See the module's docstring."""

    def recipe(rate: float, steps: int, *drops: int) -> pipeline.Recipe:
        boundaries = tuple(s / PER_EPOCH for s in drops)
        return pipeline.Recipe(
            epochs=steps / PER_EPOCH,
            optimizer=OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-4, decay_exclude=()),
            schedule=ScheduleConfig("step", base=rate, boundaries=boundaries, gamma=0.1),
            eval_every=10.0,
        )

    first, second = (recipe(rate, STEPS, 11_000, 16_000) for rate in (1e-3, 0.1))
    mean, std = STATISTICS["cifar10"]
    alone = DistillConfig(hard=1.0, soft="none")
    fsp = DistillConfig(hard=1.0, soft="none", fsp_weight=1.0, fsp=SECTIONS)
    hint = DistillConfig(hard=1.0, soft="none", hint_weight=1.0, hints=MIDDLE)

    def student(loss: DistillConfig, **options: Any) -> Distill:
        return Distill(second, loss, STUDENT, order="students", **options)

    return pipeline.config_dict(
        "cifar10_fsp_transfer",
        model=TEACHER,
        data=pipeline.DataConfig(
            "cifar10", batch_size=128, augment=Augment(pad=4, flip=True, mean=mean, std=std)
        ),
        stages={
            "teacher": Train(recipe(0.1, TEACHER_STEPS, 32_000, 48_000)),
            "keep": KeepTeacher(),
            "alone": student(alone),
            "fitnet": student(hint, first=first),
            "fsp": student(fsp, first=first),
        },
        seeds=(0, 1, 2),
        expected={
            name: {"error": error, "source": "Yim et al. 2017, recalled"}
            for name, error in (
                ("teacher", 0.0809), ("alone", 0.1209), ("fitnet", 0.1143), ("fsp", 0.1130)
            )
        },
    )  # fmt: skip
