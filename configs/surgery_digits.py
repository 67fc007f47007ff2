"""Dynamic network surgery on 8x8 digits: weights are pruned, and spliced back where it was wrong.

    python scripts/run.py --config=configs/surgery_digits.py

After Guo, Yao, Chen, NIPS 2016, arXiv 1608.04493, with the MLP 64-100-50-10; no paper has figures
for this data. Real images (scikit-learn's UCI digits), no download.

What `scripts/update_results.py` found in ``configs/results/surgery_digits.json``:
"""

# [measured]
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline.stages import Surgery, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    dense = pipeline.Recipe(
        epochs=20.0,
        optimizer=OptimizerConfig("adam"),
        schedule=ScheduleConfig("cosine", base=2e-3),
        steps_per_call=11,
        checkpoint_every=20.0,
    )
    surgery = pipeline.Recipe(
        epochs=40.0,
        optimizer=OptimizerConfig("adam"),
        schedule=ScheduleConfig("cosine", base=1e-3),
        steps_per_call=11,
        checkpoint_every=20.0,
    )
    return pipeline.config_dict(
        "surgery_digits",
        model=pipeline.ModelSpec("plain_mlp"),
        data=pipeline.DataConfig("digits", batch_size=64),
        stages={"dense": Train(dense), "surgery": Surgery(surgery, rate=1.3, gamma=1e-3)},
        seeds=(0, 1, 2),
    )
