"""What ``keras.applications`` calls the layers of our architectures, and what differs there."""

from __future__ import annotations

import re
from typing import Any

from cnnjax.errors import did_you_mean

_EPSILON = 1.001e-5
_RESNET: dict[str, Any] = {"use_bias": True, "epsilon": _EPSILON}
_DENSE: dict[str, Any] = {"epsilon": _EPSILON}
FIELDS: dict[str, dict[str, Any]] = {
    "mobilenet_v1": {"activation": "relu6", "bn_epsilon": 1e-3, "bn_momentum": 0.99},
    "mobilenet_v2": {"padding": "SAME", "bn_epsilon": 1e-3, "bn_momentum": 0.999},
    "xception": {"dropout": 0.0},
    "inception_v3": {"use_scale": False, "bn_momentum": 0.99, "dropout": 0.0},
    "inception_resnet_v2": {"use_scale": False, "bn_momentum": 0.99, "dropout": 0.0},
    "vgg16": {"dropout": 0.0},
    "vgg19": {"dropout": 0.0},
    "resnet50_v1": _RESNET,
    "resnet101_v1": _RESNET,
    "resnet152_v1": _RESNET,
    "preact_resnet50": {"stem": "bare", "keras": True, "epsilon": _EPSILON},
    "densenet121": _DENSE,
    "densenet169": _DENSE,
    "densenet201": _DENSE,
}

# our path of a convolution, norm, dense layer or separable unit; its name in Keras; what is added
# to the numbers of the path there
Rule = tuple[str, str, tuple[int, ...]]
_VGG: tuple[Rule, ...] = ((r"stages/(\d+)/(\d+)/conv", "block{0}_conv{1}", (1, 1)),) + tuple(
    (name, name, ()) for name in ("fc1", "fc2")
)
_V1: tuple[Rule, ...] = (
    (r"(conv|bn)1", "conv1_{0}", ()),
    (r"layer(\d)/(\d+)/(conv|bn)(\d)", "conv{0}_block{1}_{3}_{2}", (1, 1)),
    (r"layer(\d)/(\d+)/downsample", "conv{0}_block{1}_0_conv", (1, 1)),
)
_UNIT = r"layer(\d)/(\d+)"
_V2: tuple[Rule, ...] = (
    (r"conv1", "conv1_conv", ()),
    (r"bn", "post_bn", ()),
    (rf"{_UNIT}/(?:bn|body/branches/0/bn1)", "conv{0}_block{1}_preact_bn", (1, 1)),
    (rf"{_UNIT}/body/branches/0/bn(\d)", "conv{0}_block{1}_{2}_bn", (1, 1, -1)),
    (rf"{_UNIT}/body/branches/0/conv(\d)", "conv{0}_block{1}_{2}_conv", (1, 1)),
    (rf"{_UNIT}/projection", "conv{0}_block{1}_0_conv", (1, 1)),
)
_DENSENET: tuple[Rule, ...] = (
    (r"(conv|bn)0", "conv1_{0}", ()),
    (r"stages/(\d+)/(\d+)/bn(\d)", "conv{0}_block{1}_{2}_bn", (2, 1, -1)),
    (r"stages/(\d+)/(\d+)/conv(\d)", "conv{0}_block{1}_{2}_conv", (2, 1)),
    (r"transitions/(\d+)/(conv|bn)", "pool{0}_{1}", (2,)),
    (r"bn", "bn", ()),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "mobilenet_v1": (
        (r"stem", "conv1", ()),
        (r"blocks/(\d+)/depthwise", "conv_dw_{0}", (1,)),
        (r"blocks/(\d+)/pointwise", "conv_pw_{0}", (1,)),
        (r"fc", "conv_preds", ()),
    ),
    "mobilenet_v2": (
        (r"stem", "Conv1", ()),
        (r"blocks/0/(\w+)", "expanded_conv_{0}", ()),
        (r"blocks/(\d+)/(\w+)", "block_{0}_{1}", ()),
        (r"head", "Conv_1", ()),
    ),
    "xception": (
        (r"conv(\d)", "block1_conv{0}", ()),
        (r"entry/(\d+)/units/(\d+)", "block{0}_sepconv{1}", (2, 1)),
        (r"middle/(\d+)/units/(\d+)", "block{0}_sepconv{1}", (5, 1)),
        (r"exit/units/(\d+)", "block13_sepconv{0}", (1,)),
        (r"tail(\d)", "block14_sepconv{0}", ()),
    ),
    "inception_v3": (),
    "inception_resnet_v2": (
        (r"block_a(\d+)/up", "block35_{0}_conv", (1,)),
        (r"block_b(\d+)/up", "block17_{0}_conv", (1,)),
        (r"block_c(\d+)/up", "block8_{0}_conv", (1,)),
        (r"conv_7b", "conv_7b", ()),
    ),
    **dict.fromkeys(("vgg16", "vgg19"), _VGG),
    **dict.fromkeys(("resnet50_v1", "resnet101_v1", "resnet152_v1"), _V1),
    "preact_resnet50": _V2,
    **dict.fromkeys(("densenet121", "densenet169", "densenet201"), _DENSENET),
}


def keras_fields(name: str) -> dict[str, Any]:
    """Configuration fields with which ``create(name, ...)`` is the network of Keras.

    Raises:
      ValueError: if ``keras.applications`` has no such network.
    """
    if name not in FIELDS:
        raise ValueError(f"no Keras counterpart of {name!r}.{did_you_mean(name, FIELDS)}")
    return dict(FIELDS[name])


def counterpart(name: str) -> str:
    """The Keras application (by our name) of a registered model, e.g. of its other widths.

    Raises:
      ValueError: there is none.
    """
    if name in RULES:
        return name
    for base in ("mobilenet_v1", "mobilenet_v2"):
        if name.startswith(f"{base}_"):
            return base
    raise ValueError(f"no Keras counterpart of {name!r}.{did_you_mean(name, RULES)}")


def name_of(model: str, path: str) -> str | None:
    """Keras' name of the layer at our path, None where Keras numbers it automatically."""
    for pattern, template, offsets in RULES[model]:
        if match := re.fullmatch(pattern, path):
            groups = list(match.groups())
            for i, offset in enumerate(offsets):
                groups[i] = str(int(groups[i]) + offset)
            return template.format(*groups)
    return None


def norm_of(model: str, conv: str) -> str:
    """Keras' name of the batch norm behind a convolution of that name, in one unit with it."""
    if model == "mobilenet_v2":
        return {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}.get(conv, f"{conv}_BN")
    return conv.removesuffix("_conv") + "_bn"
