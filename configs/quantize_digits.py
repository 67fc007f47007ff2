"""Integers instead of floats: quantization-aware training on digits, widths per layer.

    python scripts/run.py --config=configs/quantize_digits.py

Real images (scikit-learn's UCI digits), no download. Straight-through gradients (Bengio et al.
2013, arXiv 1308.3432), one scale per output channel, 4 bits in the first layer and 2 (three values)
in the others. The accuracy is that of the network read back from ``quantized.cnnz``; the stage's
``accuracy_untrained`` is that of rounding without training.

What `scripts/update_results.py` found in ``configs/results/quantize_digits.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 1 CPU cores, 1 x cpu, jax 0.10.2
# dense: error 2.25 (1.41-2.82) %, 12.06k non-zeros, 1.00x
# rounded_and_trained: error 2.54 (1.69-3.10) %, 7,194 non-zeros, 1.68x
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline.stages import Quantize, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""

    def recipe(epochs: float, rate: float) -> pipeline.Recipe:
        return pipeline.Recipe(
            epochs=epochs,
            optimizer=OptimizerConfig("adam"),
            schedule=ScheduleConfig("cosine", base=rate),
            checkpoint_every=epochs,
            steps_per_call=11,
        )

    widths = {"denses/0/**": 4, "**": 2}
    return pipeline.config_dict(
        "quantize_digits",
        model=pipeline.ModelSpec("plain_mlp", {"hidden": (100, 50)}),
        data=pipeline.DataConfig("digits", batch_size=64, eval_batch_size=355),
        stages={
            "dense": Train(recipe(40.0, 3e-3)),
            "rounded_and_trained": Quantize(recipe(20.0, 2e-3), bits=widths),
        },
        seeds=(0, 1, 2),
    )
