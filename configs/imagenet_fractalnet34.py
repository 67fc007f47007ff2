"""FractalNet-34 on ImageNet.

    python scripts/run.py --config=configs/imagenet_fractalnet34.py --data_dir=DIR

Larsson, Maire, Shakhnarovich, ICLR 2017, 1605.07648: SGD with momentum .9, rate .001 divided by 10
each time the remaining epochs halve (35, 52, 61 of 70), batch 32; compared with ResNet-34 under ten
crops. Paper: 24.12 % top-1 error (ten crops; as recalled). The network's stem and widths are as
recalled, too. One GPU. Measured here: nothing yet (the paper's hardware and days are needed).
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=70.0,
        optimizer=OptimizerConfig("sgd", momentum=0.9),
        schedule=ScheduleConfig("step", base=0.001, boundaries=(35, 52, 61)),
        compute_dtype="bfloat16",
        eval_every=1.0,
    )
    return recipes.imagenet(
        "imagenet_fractalnet34",
        "fractalnet34",
        recipe,
        batch_size=32,
        error=0.2412,
        source="Larsson et al. 2017, ten crops, as recalled",
    )
