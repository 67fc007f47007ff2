"""Dynamic network surgery on 8x8 digits: weights are pruned, and spliced back where it was wrong.

    python scripts/run.py --config=configs/surgery_digits.py

After Guo, Yao, Chen, NIPS 2016, arXiv 1608.04493, with the MLP 64-100-50-10; no paper has figures
for this data. Real images (scikit-learn's UCI digits), no download.

What `scripts/update_results.py` found in ``configs/results/surgery_digits.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 2 CPU cores, 1 x cpu, jax 0.10.2
# dense: error 2.63 (2.25-2.82) %, 12.06k non-zeros, 1.00x
# surgery: error 3.10 (2.82-3.66) %, 1,584 non-zeros, 7.63x
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
        stages={"dense": Train(dense), "surgery": Surgery(surgery, rate=2.0, gamma=1e-3)},
        seeds=(0, 1, 2),
    )
