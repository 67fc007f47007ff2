"""Tucker-2 with ranks by variational Bayes on 8x8 digits, BatchNorm recalibrated, fine-tuned.

    python scripts/run.py --config=configs/factorize_digits.py

After Kim et al., ICLR 2016, arXiv 1511.06530, with a small VGG-like network whose ranks are
weakened by half towards full rank (on small layers the plain ranks leave nothing). No paper has
figures for this data. Real images (scikit-learn's UCI digits), no download.

What `scripts/update_results.py` found in ``configs/results/factorize_digits.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 1 CPU cores, 1 x cpu, jax 0.10.2
# dense: error 1.60 (1.41-1.69) %, 85.06k non-zeros, 1.00x
# factorized: error 1.78 (1.69-1.97) %, 45.78k non-zeros, 1.00x
# finetuned: error 1.13 (0.85-1.41) %, 45.79k non-zeros, 1.00x
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline.stages import Factorize, LayerRule, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig


def get_config() -> Any:
    """See the module's docstring."""

    def recipe(epochs: float, base: float) -> pipeline.Recipe:
        return pipeline.Recipe(
            epochs=epochs,
            optimizer=OptimizerConfig("adam"),
            schedule=ScheduleConfig("cosine", base=base),
            steps_per_call=11,
            checkpoint_every=epochs,
        )

    return pipeline.config_dict(
        "factorize_digits",
        model=pipeline.ModelSpec("plain_cnn", {"widths": (32, 64), "hidden": (64,)}),
        data=pipeline.DataConfig("digits", batch_size=64),
        stages={
            "dense": Train(recipe(12.0, 2e-3)),
            "factorized": Factorize(
                {
                    "convs/0": LayerRule("keep"),
                    "convs/**": LayerRule("tucker2", "evbmf 0.25"),
                    "denses/**": LayerRule("basis", "energy 0.8"),
                },
                speed_batch=64,
            ),
            "finetuned": Train(recipe(8.0, 1e-3)),
        },
        seeds=(0, 1, 2),
    )
