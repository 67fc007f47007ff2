"""Every architecture at its smallest: (name, image size, fields), for the tests of whole models."""

from __future__ import annotations

from typing import Any

Small = tuple[str, int, dict[str, Any]]

CLASSICAL: list[Small] = [  # and residual, and dense
    ("lenet_300_100", 8, {"image_size": 8}),
    ("lenet_5", 32, {}),
    ("lenet_5_caffe", 16, {"image_size": 16}),
    ("lenet_5_1998", 32, {}),
    ("plain_cnn", 8, {}),
    ("alexnet", 63, {"hidden": 8}),
    ("alexnet_caffe", 67, {"hidden": 8, "image_size": 67}),
    ("zfnet", 66, {"hidden": 8, "image_size": 66, "widths": (8, 8, 8)}),
    ("vgg16", 32, {"stages": (1, 1), "widths": (4, 4), "hidden": 8}),
    ("vgg16_bn", 32, {"stages": (1, 1), "widths": (4, 4), "hidden": 8}),
    ("vgg16_cifar", 8, {"stages": ((4, 4), (8,), (8,)), "hidden": 8}),
    ("highway_19", 8, {"stages": ((4, 1, 2), (8, 2, 0)), "stage_dropout": (0.2, 0.0)}),
    ("resnet18", 32, {"stages": (1, 1), "width": 4}),
    ("resnet50", 32, {"stages": (1, 1), "width": 4}),
    ("resnext29_8x64d", 8, {"stages": (1, 1), "width": 8, "groups": 2}),
    ("resnet20_cifar", 8, {"blocks_per_stage": 1, "widths": (4, 8)}),
    ("resnet1202_cifar", 8, {"blocks_per_stage": 4, "widths": (4, 8)}),
    ("stochastic_depth_110", 8, {"blocks_per_stage": 2, "widths": (4, 8), "survival": 0.999}),
    ("preact_resnet110", 8, {"stages": (1, 1), "widths": (4, 8), "stem_width": 4}),
    ("preact_resnet1001", 8, {"stages": (4, 3), "widths": (8, 16), "stem_width": 4}),
    ("wrn_28_10", 8, {"stages": (1, 1), "widths": (8, 16), "stem_width": 4, "dropout": 0.3}),
    ("multi_resnet_200_k5", 8, {"stages": (1, 1), "widths": (8, 16), "branches": 2}),
    ("ror_3_110", 8, {"blocks_per_stage": 1, "widths": (4, 8)}),
    ("ror_3_wrn_40_4", 8, {"blocks_per_stage": 2, "widths": (4, 8), "survival": 0.999}),
    ("rir_18_wide", 8, {"stages": (1, 1), "width": 4}),
    ("densenet121", 32, {"stages": (2, 2), "growth": 4, "stem_width": 8}),
    ("densenet_40_12", 8, {"stages": (2, 1), "growth": 4, "dropout": 0.2}),
    ("ccnn_gender", 8, {"image_size": 8}),
    ("cross_lenet_5", 32, {}),
]
EFFICIENT: list[Small] = [
    ("nin_cifar", 8, {}),
    ("cic", 8, {}),
    ("maxout_nin", 8, {"pieces": 2}),
    ("mpnin", 8, {}),
    ("fractalnet_cifar", 8, {"widths": (8, 8), "dropout": (0.0, 0.1)}),
    ("mobilenet_v1_025", 32, {}),
    ("mobilenet_v2_035", 32, {}),
    ("shufflenet_v1_g3", 32, {"scale": 0.25}),
    ("googlenet", 32, {}),
    ("inception_v2", 32, {}),
    ("inception_v3", 75, {}),
    ("inception_v4", 75, {"blocks": (1, 1, 1)}),
    ("inception_resnet_v1", 75, {"blocks": (1, 1, 1)}),
    ("inception_resnet_v2", 75, {"blocks": (1, 1, 1)}),
    ("xception", 71, {"middle_blocks": 1}),
]
SMALL = [*CLASSICAL, *EFFICIENT]
# a whole training pass of these compiles for more than a few seconds
LARGE = (
    "googlenet",
    "inception_v2",
    "inception_v3",
    "inception_v4",
    "inception_resnet_v1",
    "inception_resnet_v2",
    "xception",
)
