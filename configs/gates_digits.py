"""Hard-concrete gates on 8x8 digits, then the network without the closed ones.

    python scripts/run.py --config=configs/gates_digits.py

After Louizos, Welling, Kingma, ICLR 2018, arXiv 1712.01312, with the MLP 64-100-50-10 and gates on
all inputs of its layers, lambda 0.3 / 1442 images; no paper has figures for this data. Real images
(scikit-learn's UCI digits), no download.

What `scripts/update_results.py` found in ``configs/results/gates_digits.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 2 CPU cores, 1 x cpu, jax 0.10.2
# gates: error 2.07 (1.41-2.54) %, 8,567 non-zeros, 1.41x
# small: error 2.07 (1.41-2.54) %, 7,160 non-zeros, 1.20x
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline.stages import Gates, ShrinkDead
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=200.0,
        optimizer=OptimizerConfig("adam"),
        schedule=ScheduleConfig("constant", base=2e-3),
        steps_per_call=11,
        checkpoint_every=50.0,
    )
    gates = Gates(
        recipe,
        gates={
            "denses/0/kernel": "channel",
            "denses/1/kernel": "channel",
            "head/kernel": "channel",
        },
        strength=0.3 / 1442,
        droprate={"denses/0/kernel": 0.2},
    )
    return pipeline.config_dict(
        "gates_digits",
        model=pipeline.ModelSpec("plain_mlp"),
        data=pipeline.DataConfig("digits", batch_size=64),
        stages={"gates": gates, "small": ShrinkDead()},
        seeds=(0, 1, 2),
    )
