"""How other libraries name the modules of our architectures.

A layout's rules, (regular expression, replacement), are applied in order to our dotted module path
(``layer1.0.downsample.conv``) and give theirs (``layer1.0.downsample.0``). Its fields are what a
port does otherwise than our default configuration. Several layouts of one architecture are tried.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable
from typing import Any

from cnnjax.models import keymaps_efficient as efficient
from cnnjax.models import keymaps_timm as timm

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Naming rules of one port and the configuration fields that its weights imply."""

    rules: Rules = ()
    fields: tuple[tuple[str, Any], ...] = ()


_DOWNSAMPLE: Rules = ((r"downsample\.conv$", "downsample.0"), (r"downsample\.bn$", "downsample.1"))
_LINEAR_HEAD: Rules = ((r"^fc$", "linear"),)

_ALEXNET: Rules = (
    *((rf"^conv{i + 1}$", f"features.{n}") for i, n in enumerate((0, 3, 6, 8, 10))),
    *((rf"^fc{i + 1}$", f"classifier.{n}") for i, n in enumerate((1, 4, 6))),
)


def _vgg(stages: tuple[int, ...], norm: bool) -> Rules:
    """torchvision numbers convolutions, norms, ReLUs and pools in one sequence."""
    rules: list[tuple[str, str]] = []
    index = 0
    for i, count in enumerate(stages):
        for j in range(count):
            rules.append((rf"^stages\.{i}\.{j}\.conv$", f"features.{index}"))
            rules.append((rf"^stages\.{i}\.{j}\.bn$", f"features.{index + 1}"))
            index += 3 if norm else 2
        index += 1
    rules += [(rf"^fc{i + 1}$", f"classifier.{3 * i}") for i in range(3)]
    return tuple(rules)


def _dense_layer(match: re.Match[str]) -> str:
    stage, layer, kind, number = match.groups()
    kind = "norm" if kind == "bn" else kind
    return f"features.denseblock{int(stage) + 1}.denselayer{int(layer) + 1}.{kind}{number}"


def _transition(match: re.Match[str]) -> str:
    kind = "norm" if match.group(2) == "bn" else "conv"
    return f"features.transition{int(match.group(1)) + 1}.{kind}"


_DENSENET: Rules = (
    (r"^stages\.(\d+)\.(\d+)\.(conv|bn)(\d)$", _dense_layer),
    (r"^transitions\.(\d+)\.(conv|bn)$", _transition),
    (r"^conv0$", "features.conv0"),
    (r"^bn0$", "features.norm0"),
    (r"^bn$", "features.norm5"),
    (r"^fc$", "classifier"),
)


def _vggs(stages: tuple[int, ...], norm: bool) -> tuple[Layout, ...]:
    rules = _vgg(stages, norm)
    return Layout(rules), Layout(rules + timm.VGG_HEAD)


# symmetric padding and PyTorch's epsilon, where the registry has Keras'
_TORCH = (("padding", "torch"), ("bn_epsilon", 1e-5), ("bn_momentum", 0.9))

# glob over our names -> layouts
_LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "resnet*_cifar": (
        Layout(_DOWNSAMPLE),
        # a widespread CIFAR port: dense layer "linear", zero channels on both sides
        Layout(_DOWNSAMPLE + _LINEAR_HEAD, (("zero_channels", "both"),)),
    ),
    "resnet[0-9]*": (Layout(_DOWNSAMPLE),),
    "resnext*": (Layout(_DOWNSAMPLE),),
    "wide_resnet*": (Layout(_DOWNSAMPLE),),
    "alexnet": (Layout(_ALEXNET),),
    "vgg16": _vggs((2, 2, 3, 3, 3), False),
    "vgg16_bn": _vggs((2, 2, 3, 3, 3), True),
    "vgg19": _vggs((2, 2, 4, 4, 4), False),
    "vgg19_bn": _vggs((2, 2, 4, 4, 4), True),
    "densenet[0-9]*": (Layout(_DENSENET),),
    "googlenet": (Layout(efficient.GOOGLENET),),
    "inception_v3": (Layout(efficient.INCEPTION_V3, (("count_include_pad", True),)),),
    "inception_v4": (Layout(efficient.INCEPTION_V4),),
    "inception_resnet_v2": (Layout(efficient.INCEPTION_RESNET_V2),),
    "mobilenet_v2*": (Layout(efficient.MOBILENET_V2), Layout(timm.MOBILENET_V2)),
    "mobilenet_v1*": (Layout(timm.MOBILENET_V1, (*_TORCH, ("activation", "relu6"))),),
    "preact_resnet50": (Layout(timm.PREACT_RESNET, (("stem", "bare"),)),),
    "xception": (Layout(timm.XCEPTION, _TORCH),),
}


def layouts_of(name: str) -> tuple[Layout, ...]:
    """The layouts known for a registered model; at least our own naming."""
    found = [layouts for glob, layouts in _LAYOUTS.items() if fnmatch.fnmatch(name, glob)]
    return (*(layout for layouts in found for layout in layouts), Layout())


def apply(rules: Rules, module: str) -> str:
    """Their name of our dotted module path."""
    for pattern, replacement in rules:
        module = re.sub(pattern, replacement, module)
    return module


def fused_bias(module: str) -> str | None:
    """The bias that a convolution has in a file where the batch norm ``module`` is fused into it.

    ``layer1.0.bn2`` -> ``layer1.0.conv2.bias``, ``downsample.1`` -> ``downsample.0.bias``.
    """
    head, _, last = module.rpartition(".")
    if last.isdigit() and int(last):
        conv = str(int(last) - 1)
    elif match := re.fullmatch(r"(?:bn|norm)(\d*)", last):
        conv = f"conv{match.group(1)}"
    else:
        return None
    return f"{head}.{conv}.bias" if head else f"{conv}.bias"
