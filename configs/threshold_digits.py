"""Iterative hard thresholding on 8x8 digits: 90 % of the weights removed, released, removed again.

    python scripts/run.py --config=configs/threshold_digits.py

After Jin, Yuan, Feng, Yan 2016, arXiv 1607.05423, with the MLP 64-100-50-10; no paper has figures
for this data. Real images (scikit-learn's UCI digits), no download.

What `scripts/update_results.py` found in ``configs/results/threshold_digits.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 2 CPU cores, 1 x cpu, jax 0.10.2
# dense: error 2.63 (2.25-2.82) %, 12.06k non-zeros, 1.00x
# threshold: error 4.88 (3.66-6.48) %, 1,346 non-zeros, 8.96x
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline.stages import Threshold, Train
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
    last = pipeline.Recipe(
        epochs=20.0,
        optimizer=OptimizerConfig("adam"),
        schedule=ScheduleConfig("cosine", base=1e-3),
        steps_per_call=11,
        checkpoint_every=20.0,
    )
    return pipeline.config_dict(
        "threshold_digits",
        model=pipeline.ModelSpec("plain_mlp"),
        data=pipeline.DataConfig("digits", batch_size=64),
        stages={
            "dense": Train(dense),
            "threshold": Threshold(last, keep=0.1, cycles=3, dense_epochs=6.0, sparse_epochs=12.0),
        },
        seeds=(0, 1, 2),
    )
