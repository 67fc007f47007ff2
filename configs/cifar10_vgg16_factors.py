"""VGG-16 on the JPEG copy of CIFAR-10 by factors: error against MACs, method by method.

    python scripts/run.py --config=configs/cifar10_vgg16_factors.py --data_dir=DIR

where ``scripts/prepare_cifar10_jpeg.py`` has written the images. The run trains the network
(Li et al., 1608.08710), then every branch starts from it, replaces twelve of the thirteen
convolutions (the first has three inputs) at half and at a quarter of their MACs and fine-tunes
the whole network: SVD of the kernels (K-filter basis), Tucker-2 with EVBMF ranks (Kim et al. 2016,
1511.06530) as they are and weakened, CP (Lebedev et al. 2015, 1412.6553), separable filters by
Tai's closed form (1511.06067), Zhang's asymmetric channel and 3-D decompositions with ReLU-aware
reconstruction and PCA-energy ranks (1505.06798). BatchNorm statistics of the weight-only methods
are re-estimated before the first measurement. The full run is for an accelerator; a reduced one on
a CPU core has a quarter of the widths, 8,000 images and 2,000 test images:

    ... "--config.model.fields.stages=((16,16),(32,32),(64,64,64),(128,128,128),(128,128,128))" \\
        --config.model.fields.hidden=128 "--config.data.train=train[:8000]" \\
        "--config.data.test=test[:2000]" --config.stages.dense.recipe.epochs=8 \\
        --config.stages.curves.recipe.epochs=0.5

What `scripts/update_results.py` found in ``configs/results/cifar10_vgg16_factors.json``:
"""

# [measured]
# reduced run, seeds 0; 1 CPU cores, 1 x cpu, jax 0.10.2
# dense: error 36.65 %, 939.9k non-zeros, 1.00x
# curves: error 36.65 %, 939.9k non-zeros, 1.00x
# svd_50: 50.3 % of the MACs, error 45.55 % before fine-tuning, 42.00 % after
# tucker2_evbmf_4: 28.3 % of the MACs, error 47.45 % before fine-tuning, 43.55 % after
# cp_50: 50.9 % of the MACs, error 38.75 % before fine-tuning, 42.05 % after
# tai_50: 51.2 % of the MACs, error 43.60 % before fine-tuning, 40.00 % after
# zhang_channels_50: 51.1 % of the MACs, error 38.25 % before fine-tuning, 38.90 % after
# zhang_3d_50: 51.1 % of the MACs, error 40.35 % before fine-tuning, 41.80 % after
# svd_25: 25.6 % of the MACs, error 63.60 % before fine-tuning, 50.50 % after
# tucker2_evbmf_15: 9.1 % of the MACs, error 70.40 % before fine-tuning, 54.40 % after
# cp_25: 26.5 % of the MACs, error 44.50 % before fine-tuning, 44.50 % after
# tai_25: 26.7 % of the MACs, error 52.15 % before fine-tuning, 43.70 % after
# zhang_channels_25: 26.7 % of the MACs, error 43.15 % before fine-tuning, 43.25 % after
# zhang_3d_25: 26.7 % of the MACs, error 44.20 % before fine-tuning, 44.90 % after
# [/measured]

from __future__ import annotations

from typing import Any

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.pipeline.stages import Branches, Factorize, LayerRule, Reconstruct, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig

FIRST, LAYERS = "stages/0/0/conv", "stages/*/*/conv"


def get_config() -> Any:
    """See the module's docstring."""

    def rules(method: str, rank: Any = "macs 0.5", **options: Any) -> dict[str, LayerRule]:
        return {FIRST: LayerRule("keep"), LAYERS: LayerRule(method, rank, options)}

    def weights(method: str, rank: Any, **options: Any) -> Factorize:
        return Factorize(rules(method, rank, **options), recalibrate=1024)

    def responses(method: str, macs: float) -> Reconstruct:
        return Reconstruct(rules(method), macs=macs, images=1024)

    branches: dict[str, Any] = {}
    for share, evbmf in ((0.5, "evbmf 0.4"), (0.25, "evbmf 0.15")):
        percent = round(100 * share)
        branches |= {
            f"svd_{percent}": weights("basis", f"macs {share}"),
            f"tucker2_{evbmf.replace(' 0.', '_')}": weights("tucker2", evbmf),
            f"cp_{percent}": weights("cp", f"macs {share}", restarts=1),
            f"tai_{percent}": weights("spatial", f"macs {share}"),
            f"zhang_channels_{percent}": responses("basis", share),
            f"zhang_3d_{percent}": responses("asymmetric_3d", share),
        }

    def recipe(epochs: float, base: float) -> pipeline.Recipe:
        return pipeline.Recipe(
            epochs=epochs,
            optimizer=OptimizerConfig("sgd", nesterov=True, weight_decay=5e-4),
            schedule=ScheduleConfig("cosine", base=base),
            checkpoint_every=5.0,
        )

    stages = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
    return pipeline.config_dict(
        "cifar10_vgg16_factors",
        model=pipeline.ModelSpec(
            "vgg16_cifar", {"num_classes": 10, "stages": stages, "hidden": 512}
        ),
        data=pipeline.DataConfig(
            "cifar10_jpeg",
            batch_size=64,
            eval_batch_size=1000,
            augment=Augment(
                pad=4, flip=True, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262)
            ),
        ),
        stages={
            "dense": Train(recipe(160.0, 0.05)),
            "curves": Branches(branches, recipe(20.0, 0.01)),
        },
        seeds=(0,),
    )
