"""Deep Compression from one config: train, prune, retrain, share, tune codebooks, write the file.

    python scripts/run.py --config=configs/deep_compression_digits.py
    python scripts/compress_file.py info \\
        runs/deep_compression_digits/seed0/coded/compressed.cnnz

Real images (scikit-learn's UCI digits), no download, a minute on a CPU. After Han, Mao, Dally, ICLR
2016, arXiv 1510.00149. The accuracy of the stage "coded" is that of the network read back from
``compressed.cnnz``. On a network this small, tables and biases weigh more than in the paper's:
``configs/deep_compression_mnist.py`` has those.

What `scripts/update_results.py` found in ``configs/results/deep_compression_digits.json``:
"""

# [measured]
# full run, seeds 0, 1, 2; 1 CPU cores, 1 x cpu, jax 0.10.2
# dense: error 2.25 (1.41-2.82) %, 12.06k non-zeros, 1.00x
# pruned: error 2.82 (2.54-3.10) %, 1,944 non-zeros, 6.20x
# coded: error 2.72 (2.25-3.10) %, 1,944 non-zeros, 6.20x
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline.stages import DeepCompression, Prune, Train
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

    return pipeline.config_dict(
        "deep_compression_digits",
        model=pipeline.ModelSpec("plain_mlp", {"hidden": (100, 50)}),
        data=pipeline.DataConfig("digits", batch_size=64, eval_batch_size=355),
        stages={
            "dense": Train(recipe(40.0, 3e-3)),
            "pruned": Prune(recipe(20.0, 3e-3), sparsity=0.85, cuts=4),
            "coded": DeepCompression(
                recipe(10.0, 1e-3), bits={"**": 4}, centroid_dtype="float16", other_dtype="float16"
            ),
        },
        seeds=(0, 1, 2),
    )
