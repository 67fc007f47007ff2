"""Wide ResNets for CIFAR: Zagoruyko, Komodakis, BMVC 2016, 1605.07146.

WRN-d-k: pre-activation basic units, d = 6n + 4, stages of 16k, 32k and 64k channels. The ImageNet
form with a doubled bottleneck is ``wide_resnet50_2`` in `cnnjax.models.resnet`.
"""

from __future__ import annotations

from cnnjax.models.preact_resnet import PreActConfig, PreActResNet
from cnnjax.models.registry import register


def wide_config(depth: int, widen: int, **fields: object) -> PreActConfig:
    """The configuration of WRN-``depth``-``widen``.

    Raises:
      ValueError: if the depth isn't 6n + 4.
    """
    if (depth - 4) % 6 or depth < 10:
        raise ValueError(f"a wide ResNet's depth is 6n + 4 (10, 16, 22, 28, ...), got {depth}")
    return PreActConfig(
        block="basic",
        stages=((depth - 4) // 6,) * 3,
        widths=(16 * widen, 32 * widen, 64 * widen),
        fan="in",
        **fields,  # type: ignore[arg-type]
    )


for _depth, _widen in ((28, 10), (16, 8), (40, 4), (40, 2), (16, 2), (16, 4), (22, 8), (40, 1)):
    register(
        f"wrn_{_depth}_{_widen}", PreActResNet, wide_config(_depth, _widen), input_shape=(32, 32, 3)
    )
