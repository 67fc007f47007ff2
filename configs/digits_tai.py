"""Separable layers trained from scratch on 8x8 digits (Tai et al. 2016, 1511.06067).

    python scripts/run.py --config=configs/digits_tai.py

Half of the MACs of two convolutions: ``kh x 1``, BatchNorm, ``1 x kw``, BatchNorm, trained as the
dense network. ``decomposed`` is the dense network's closed-form decomposition at the same ranks,
fine-tuned for as many epochs; ``bare`` are the separable layers from scratch without BatchNorm.
Every network has the same epochs, optimizer and seeds; the last epoch counts.

What `scripts/update_results.py` found in ``configs/results/digits_tai.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 1 CPU cores, 1 x cpu, jax 0.10.2
# dense: error 0.94 (0.85-1.13) %, 94.31k non-zeros, 1.00x
# factors: error 1.13 (0.85-1.41) %, 80.49k non-zeros, 1.00x
# decomposed: error 0.94 (0.85-1.13) %, 80.49k non-zeros, 1.00x
# separable: error 91.36 (88.73-95.49) %, 80.44k non-zeros, 1.00x
# constrained: error 1.03 (0.85-1.41) %, 80.70k non-zeros, 1.00x
# separable_bare: error 92.39 (89.86-97.46) %, 80.29k non-zeros, 1.00x
# bare: error 1.03 (0.28-1.41) %, 80.49k non-zeros, 1.00x
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
