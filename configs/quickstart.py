"""The first minute: a CNN on 8x8 digits, 90 % of its weights removed in five cuts.

    python scripts/run.py --config=configs/quickstart.py

Real images (scikit-learn's UCI digits), no download. After Han et al., NIPS 2015, 1506.02626:
cut the smallest weights, retrain the others from where they are, cut again.
"""

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline.stages import Prune, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=30.0,
        optimizer=OptimizerConfig("adam", weight_decay=1e-4),
        schedule=ScheduleConfig("cosine", base=2e-3),
        eval_every=5.0,
        checkpoint_every=10.0,
    )
    retrain = pipeline.Recipe(
        epochs=8.0,
        optimizer=OptimizerConfig("adam", weight_decay=1e-4),
        schedule=ScheduleConfig("cosine", base=1e-3),
        checkpoint_every=8.0,
    )
    return pipeline.config_dict(
        "quickstart",
        model=pipeline.ModelSpec("plain_cnn"),
        data=pipeline.DataConfig("digits", batch_size=64),
        stages={
            "dense": Train(recipe),
            "pruned": Prune(retrain, sparsity=0.9, cuts=5),
        },
    )
