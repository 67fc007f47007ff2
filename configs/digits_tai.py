"""Separable layers trained from scratch on 8x8 digits (Tai et al. 2016, 1511.06067).

    python scripts/run.py --config=configs/digits_tai.py

Half of the MACs of two convolutions: ``kh x 1``, BatchNorm, ``1 x kw``, BatchNorm, trained as the
dense network. ``decomposed`` is the dense network's closed-form decomposition at the same ranks,
fine-tuned for as many epochs; ``bare`` are the separable layers from scratch without BatchNorm.
Every network has the same epochs, optimizer and seeds; the last epoch counts.

What `scripts/update_results.py` found in ``configs/results/digits_tai.json``:
"""

# [measured]
# not run yet
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline.stages import Constrain, Factorize, LayerRule, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig

NETWORK = pipeline.ModelSpec("plain_cnn", {"widths": (32, 32, 64), "hidden": (64,)})


def get_config() -> Any:
    """See the module's docstring."""
    recipe = pipeline.Recipe(
        epochs=20.0,
        optimizer=OptimizerConfig("adam"),
        schedule=ScheduleConfig("cosine", base=3e-3),
        checkpoint_every=20.0,
    )
    rules = {"convs/0": LayerRule("keep"), "convs/*": LayerRule("spatial", "macs 0.5")}
    return pipeline.config_dict(
        "digits_tai",
        model=NETWORK,
        data=pipeline.DataConfig("digits", batch_size=50),
        stages={
            "dense": Train(recipe),
            "factors": Factorize(rules),
            "decomposed": Train(recipe),
            "separable": Constrain(rules, model=NETWORK),
            "constrained": Train(recipe),
            "separable_bare": Constrain(rules, norm=False, model=NETWORK),
            "bare": Train(recipe),
        },
        seeds=(0, 1, 2),
        note="half of the MACs of the second and third convolution; last epoch",
    )
