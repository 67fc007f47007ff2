"""timm's names where they differ from torchvision's: mobile networks, Xception, VGG's head.

Rules as in `cnnjax.models.keymaps`: they map our dotted module path to theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

_PARTS = {
    # (our unit, conv or bn) -> their name within a block
    ("depthwise", "conv"): "conv_dw",
    ("depthwise", "bn"): "bn1",
    ("pointwise", "conv"): "conv_pw",
    ("pointwise", "bn"): "bn2",
}
_FIRST = {**_PARTS, ("project", "conv"): "conv_pw", ("project", "bn"): "bn2"}
_INVERTED = {
    ("expand", "conv"): "conv_pw",
    ("expand", "bn"): "bn1",
    ("depthwise", "conv"): "conv_dw",
    ("depthwise", "bn"): "bn2",
    ("project", "conv"): "conv_pwl",
    ("project", "bn"): "bn3",
}


def _staged(stages: tuple[int, ...], inverted: bool) -> Callable[[re.Match[str]], str]:
    """Numbers of blocks by stage and place in it; MobileNetV2's first has no expansion."""
    places = [(s, i) for s, count in enumerate(stages) for i in range(count)]

    def name(match: re.Match[str]) -> str:
        stage, place = places[int(match.group(1))]
        parts = _INVERTED if inverted and stage else _FIRST
        return f"blocks.{stage}.{place}.{parts[match.group(2), match.group(3)]}"

    return name


_BLOCK = r"^blocks\.(\d+)\.(\w+)\.(conv|bn)$"
_ENDS: Rules = ((r"^stem\.conv$", "conv_stem"), (r"^stem\.bn$", "bn1"), (r"^fc$", "classifier"))
MOBILENET_V1: Rules = ((_BLOCK, _staged((1, 2, 2, 6, 2), False)), *_ENDS)
MOBILENET_V2: Rules = (
    (_BLOCK, _staged((1, 2, 3, 4, 3, 3, 1), True)),
    (r"^head\.conv$", "conv_head"),
    (r"^head\.bn$", "bn2"),
    *_ENDS,
)


def _xception_unit(match: re.Match[str]) -> str:
    """Their blocks count from 1; a unit is ReLU, separable convolution, norm (the first has no
    ReLU in front)."""
    flow, index, unit, part = match.groups()
    block = {"entry": 1, "middle": 4, "exit": 12}[flow] + int(index or 0)
    at = 3 * int(unit) + (block != 1)
    if part == "bn":
        return f"block{block}.rep.{at + 1}"
    return f"block{block}.rep.{at}.{'conv1' if part == 'depthwise' else part}"


def _xception_skip(match: re.Match[str]) -> str:
    block = 12 if match.group(1) == "exit" else 1 + int(match.group(2))
    return f"block{block}.{'skip' if match.group(3) == 'conv' else 'skipbn'}"


XCEPTION: Rules = (
    (r"^(entry|middle|exit)(?:\.(\d+))?\.units\.(\d)\.(depthwise|pointwise|bn)$", _xception_unit),
    (r"^(entry|exit)(?:\.(\d+))?\.shortcut\.(conv|bn)$", _xception_skip),
    (r"^conv(\d)\.conv$", r"conv\1"),
    (r"^conv(\d)\.bn$", r"bn\1"),
    (r"^tail(\d)\.depthwise$", lambda m: f"conv{int(m.group(1)) + 2}.conv1"),
    (r"^tail(\d)\.pointwise$", lambda m: f"conv{int(m.group(1)) + 2}.pointwise"),
    (r"^tail(\d)\.bn$", lambda m: f"bn{int(m.group(1)) + 2}"),
)

PREACT_RESNET: Rules = (
    (r"^layer(\d)\.(\d+)\.", lambda m: f"stages.{int(m.group(1)) - 1}.blocks.{m.group(2)}."),
    (r"\.body\.branches\.0\.bn(\d)$", r".norm\1"),
    (r"\.body\.branches\.0\.", "."),
    (r"\.bn$", ".norm1"),
    (r"\.projection$", ".downsample.conv"),
    (r"^conv1$", "stem.conv"),
    (r"^bn$", "norm"),
    (r"^fc$", "head.fc"),
)
# behind torchvision's rules
VGG_HEAD: Rules = (
    (r"^classifier\.0$", "pre_logits.fc1"),
    (r"^classifier\.3$", "pre_logits.fc2"),
    (r"^classifier\.6$", "head.fc"),
)
