"""ResNet-20 taught by ResNet-56 on the JPEG copy of CIFAR-10: seven ways at equal epochs.

    python scripts/run.py --config=configs/cifar10_resnet56_to_resnet20_kd.py --data_dir=DIR \\
        --config.stages.published.weights=cifar10_resnet56.npz

where ``scripts/prepare_cifar10_jpeg.py`` has written the images. The teacher starts from published
weights (93.39 % on the lossless test set, 83.20 % on this copy) and is adapted to the copy by a
short fine-tuning; every student has the same epochs, optimizer, seeds and order of augmented
images, and the last epoch counts. Students are ResNet-20, but for ``fisher_kd``, which is the
teacher with maps removed down to ResNet-20's multiply-accumulates while it learns (Theis et al.
2018, 1801.05787). Hints and FSP have a first stage of their own in addition (Romero et al. 2015,
1412.6550; Yim et al., CVPR 2017). Others: Hinton et al. 2015 (1503.02531), Zagoruyko & Komodakis
2017 (1612.03928), Zhao et al. 2022 (2203.08679). Needs an accelerator: about 7 x 100 epochs a seed.
A reduced run on one CPU core (half an hour a seed) takes part of the images and few epochs:

    for each student --config.stages.NAME.recipe.epochs=3.0, for each first stage and the teacher 1,
    --config.stages.fisher_kd.recipe.epochs=1.0 --config.stages.fisher_kd.finish.epochs=2.0
    --config.stages.fisher_kd.examples=256 --config.stages.fisher_kd.rounds=10
    "--config.data.train=train[:4000]" "--config.data.test=test[:2000]" --config.data.batch_size=64

Expected from these papers: KD and attention transfer above the student alone. Seen in the reduced
run, in which 186 steps leave every student far from its end, by two seeds: attention transfer and
FSP 4 to 5 points above the student alone on the mean and above it in both, DKD level with it, KD
above it in one and below it on the mean, FitNet below it in both; the teacher with maps removed
keeps most of its accuracy. It doesn't say how they stand at the end.

What `scripts/update_results.py` found in the result file:
"""

# [measured]
# reduced run, seeds 0, 1; 1 CPU cores, 1 x cpu, jax 0.10.2
# published: error 16.00 %, 853.0k non-zeros, 1.00x
# teacher: error 12.60 %, 853.0k non-zeros, 1.00x
# keep: error 12.60 %, 853.0k non-zeros, 1.00x
# alone: error 61.22 (60.10-62.35) %, 269.7k non-zeros, 1.00x
# kd: error 65.00 (60.70-69.30) %, 269.7k non-zeros, 1.00x
# fitnet: error 66.75 (63.65-69.85) %, 269.7k non-zeros, 1.00x
# attention: error 57.48 (56.75-58.20) %, 269.7k non-zeros, 1.00x
# fsp: error 56.65 (55.50-57.80) %, 269.7k non-zeros, 1.00x
# dkd: error 60.95 (59.55-62.35) %, 269.7k non-zeros, 1.00x
# recall: error 12.60 %, 853.0k non-zeros, 1.00x
# fisher_kd: error 21.85 (21.70-22.00) %, 324.0k non-zeros, 1.00x
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.distillation import DistillConfig
from cnnjax.pipeline.stages import (
    Distill,
    FisherDistill,
    KeepTeacher,
    Pretrained,
    RecallTeacher,
    Train,
)
from cnnjax.training import OptimizerConfig, ScheduleConfig

TEACHER = pipeline.ModelSpec("resnet56_cifar", {"num_classes": 10})
STUDENT = pipeline.ModelSpec("resnet20_cifar")
# last block of each resolution, after its ReLU; the channel counts agree
ENDS = tuple((f"layer{i}/2", f"layer{i}/8") for i in (1, 2, 3))
# first and last block of each resolution
SECTIONS = tuple((f"layer{i}/0", f"layer{i}/2", f"layer{i}/0", f"layer{i}/8") for i in (1, 2, 3))


def get_config() -> Any:
    """See the module's docstring."""

    def recipe(epochs: float, rate: float, decay: float = 5e-4) -> pipeline.Recipe:
        return pipeline.Recipe(
            epochs=epochs,
            optimizer=OptimizerConfig("sgd", nesterov=True, weight_decay=decay),
            schedule=ScheduleConfig("cosine", base=rate),
            checkpoint_every=1.0,
        )

    def student(loss: DistillConfig, **options: Any) -> Distill:
        return Distill(recipe(100.0, 0.1), loss, STUDENT, order="students", **options)

    kd = DistillConfig(hard=0.1, soft_weight=0.9, temperature=4.0)
    # FitNets' weight of the soft term falls from 4 to 1, without the factor T^2 that ours has
    hint = DistillConfig(
        hard=1.0,
        soft_weight=4.0 / 9,
        soft_weight_end=1.0 / 9,
        temperature=3.0,
        hint_weight=1e-3,
        hints=ENDS[1:2],
        hint_activation="none",
    )
    attention = DistillConfig(hard=1.0, soft="none", attention_beta=1e3, attention=ENDS)
    fsp = DistillConfig(hard=1.0, soft="none", fsp_weight=1e-2, fsp=SECTIONS)
    # the authors' warm-up: 20 of 240 epochs
    dkd = DistillConfig(hard=1.0, soft="dkd", soft_weight=1.0, dkd_beta=2.0, soft_warmup=20 / 240)
    return pipeline.config_dict(
        "cifar10_resnet56_to_resnet20_kd",
        model=TEACHER,
        data=pipeline.DataConfig(
            "cifar10_jpeg",
            augment=Augment(
                pad=4, flip=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
            ),
        ),
        stages={
            "published": Pretrained(model=TEACHER),
            "teacher": Train(recipe(5.0, 0.01)),
            "keep": KeepTeacher(),
            "alone": student(DistillConfig(hard=1.0, soft="none")),
            "kd": student(kd),
            "fitnet": student(hint, first=recipe(20.0, 0.05, 0.0)),
            "attention": student(attention),
            "fsp": student(fsp, first=recipe(20.0, 1e-3, 0.0)),
            "dkd": student(dkd),
            "recall": RecallTeacher(),
            "fisher_kd": FisherDistill(
                recipe(25.0, 0.01), recipe(75.0, 0.02), kd, macs=0.325, rounds=40, examples=1024
            ),
        },
        seeds=(0, 1, 2),
        note="CIFAR-10 as JPEG; students at equal epochs, last epoch",
    )
