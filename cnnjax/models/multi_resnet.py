"""Multi-residual networks: Abdi, Nahavandi, 2016, 1609.05672.

x_{l+1} = x_l + sum_{i=1..k} F_i(x_l) with pre-activation branches; where the width changes one
BN-ReLU is shared by the k branches and the projection.
"""

from __future__ import annotations

from cnnjax.models.preact_resnet import PreActConfig, PreActResNet
from cnnjax.models.registry import register

_SHAPE = (32, 32, 3)
for _depth, _units in ((200, 22), (398, 44)):
    register(
        f"multi_resnet_{_depth}_k5",
        PreActResNet,
        PreActConfig(stages=(_units,) * 3, branches=5, scan=_depth > 200),
        input_shape=_SHAPE,
    )
for _branches in (2, 4):
    register(
        f"multi_resnet_26_k{_branches}_w10",
        PreActResNet,
        PreActConfig(
            block="basic",
            stages=(4, 4, 4),
            widths=(160, 320, 640),
            branches=_branches,
            fan="in",
        ),
        input_shape=_SHAPE,
    )
