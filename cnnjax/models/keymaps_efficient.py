"""torchvision's and timm's names of the Inception and mobile networks' modules.

Rules as in `cnnjax.models.keymaps`: they map our dotted module path to theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


def _branch(prefix: str, theirs: dict[tuple[int, ...], str]) -> Rules:
    """Rules of one concatenation: (branch, step, side of a split) -> the name of the unit.

    Args:
      prefix: regular expression of our module, its groups kept out.
      theirs: their name below the module; a branch of one step has the key (branch,).
    """
    rules = []
    for place, name in theirs.items():
        parts = ["branches", str(place[0])]
        if len(place) > 1:
            parts += ["steps", str(place[1])]
        if len(place) > 2:
            parts += ["branches", str(place[2])]
        rules.append((rf"^({prefix})\.{re.escape('.'.join(parts))}(?=\.|$)", rf"\1.{name}"))
    return tuple(rules)


# torchvision's googlenet counts branches from 1
GOOGLENET: Rules = _branch(
    r"inception\w+",
    {
        (0,): "branch1",
        (1, 0): "branch2.0",
        (1, 1): "branch2.1",
        (2, 0): "branch3.0",
        (2, 1): "branch3.1",
        (3, 1): "branch4.1",
    },
)

_A = {
    (0,): "branch1x1",
    (1, 0): "branch5x5_1",
    (1, 1): "branch5x5_2",
    **{(2, i): f"branch3x3dbl_{i + 1}" for i in range(3)},
    (3, 1): "branch_pool",
}
_C = {
    (0,): "branch1x1",
    **{(1, i): f"branch7x7_{i + 1}" for i in range(3)},
    **{(2, i): f"branch7x7dbl_{i + 1}" for i in range(5)},
    (3, 1): "branch_pool",
}
_E = {
    (0,): "branch1x1",
    (1, 0): "branch3x3_1",
    (1, 1, 0): "branch3x3_2a",
    (1, 1, 1): "branch3x3_2b",
    (2, 0): "branch3x3dbl_1",
    (2, 1): "branch3x3dbl_2",
    (2, 2, 0): "branch3x3dbl_3a",
    (2, 2, 1): "branch3x3dbl_3b",
    (3, 1): "branch_pool",
}
INCEPTION_V3: Rules = (
    *_branch("mixed_5[bcd]", _A),
    *_branch(
        "mixed_6a", {(0,): "branch3x3", **{(1, i): f"branch3x3dbl_{i + 1}" for i in range(3)}}
    ),
    *_branch("mixed_6[bcde]", _C),
    *_branch(
        "mixed_7a",
        {
            (0, 0): "branch3x3_1",
            (0, 1): "branch3x3_2",
            **{(1, i): f"branch7x7x3_{i + 1}" for i in range(4)},
        },
    ),
    *_branch("mixed_7[bc]", _E),
    (r"^mixed_", "Mixed_"),
    (r"^conv_(1a|2a|2b|4a)\b", r"Conv2d_\1_3x3"),
    (r"^conv_3b\b", "Conv2d_3b_1x1"),
    (r"^aux1\.conv1", "AuxLogits.conv0"),
    (r"^aux1\.conv2", "AuxLogits.conv1"),
    (r"^aux1", "AuxLogits"),
)

_V4_FEATURES = [
    "conv_1a",
    "conv_2a",
    "conv_2b",
    "mixed_3a",
    "mixed_4a",
    "mixed_5a",
    *[f"inception_a{i}" for i in range(4)],
    "reduction_a",
    *[f"inception_b{i}" for i in range(7)],
    "reduction_b",
    *[f"inception_c{i}" for i in range(3)],
]
_V4_C = {
    (0,): "branch0",
    (1, 0): "branch1_0",
    (1, 1, 0): "branch1_1a",
    (1, 1, 1): "branch1_1b",
    (2, 0): "branch2_0",
    (2, 1): "branch2_1",
    (2, 2): "branch2_2",
    (2, 3, 0): "branch2_3a",
    (2, 3, 1): "branch2_3b",
    (3, 1): "branch3.1",
}
INCEPTION_V4: Rules = (
    *_branch("mixed_3a", {(1,): "conv"}),
    *_branch("mixed_5a", {(0,): "conv"}),
    *_branch("inception_c[0-9]", _V4_C),
    # everything else: branch0.0, branch1.0, ... or branch0 for a single step
    (r"branches\.(\d)\.steps\.(\d)", r"branch\1.\2"),
    (r"branches\.(\d)", r"branch\1"),
    *((rf"^{name}(?=\.|$)", f"features.{i}") for i, name in enumerate(_V4_FEATURES)),
    (r"^fc$", "last_linear"),
)

INCEPTION_RESNET_V2: Rules = (
    (r"^block_a(\d+)", r"repeat.\1"),
    (r"^block_b(\d+)", r"repeat_1.\1"),
    (r"^block_c9", "block8"),
    (r"^block_c(\d+)", r"repeat_2.\1"),
    (r"^reduction_a", "mixed_6a"),
    (r"^reduction_b", "mixed_7a"),
    # a residual block holds its concatenation as "branches"
    (r"\.branches\.branches\.", ".branches."),
    (r"branches\.(\d)\.steps\.(\d)", r"branch\1.\2"),
    (r"branches\.(\d)", r"branch\1"),
    (r"\.up$", ".conv2d"),
    (r"^conv_(1a|2a|2b|3b|4a|7b)\b", r"conv2d_\1"),
    (r"^fc$", "classif"),
)


def _inverted(match: re.Match[str]) -> str:
    """torchvision's MobileNetV2: a block's ``conv`` holds [expand,] depthwise, 1x1, its norm."""
    index, part, kind = int(match.group(1)), match.group(2), match.group(3)
    at = {"expand": 0, "depthwise": 1, "project": 2}[part] - (index == 0)
    number = {"conv": 0, "bn": 1}[kind]
    where = f"{at + number}" if part == "project" else f"{at}.{number}"
    return f"features.{index + 1}.conv.{where}"


MOBILENET_V2: Rules = (
    (r"^blocks\.(\d+)\.(expand|depthwise|project)\.(conv|bn)$", _inverted),
    (r"^stem\.conv$", "features.0.0"),
    (r"^stem\.bn$", "features.0.1"),
    (r"^head\.conv$", "features.18.0"),
    (r"^head\.bn$", "features.18.1"),
    (r"^fc$", "classifier.1"),
)
