"""How other libraries name the modules of our architectures.

A layout's rules, (regular expression, replacement), are applied in order to our dotted module path
(``layer1.0.downsample.conv``) and give theirs (``layer1.0.downsample.0``). Its fields are what a
port does otherwise than our default configuration. Several layouts of one architecture are tried.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from typing import Any

Rules = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Naming rules of one port and the configuration fields that its weights imply."""

    rules: Rules = ()
    fields: tuple[tuple[str, Any], ...] = ()


_DOWNSAMPLE: Rules = ((r"downsample\.conv$", "downsample.0"), (r"downsample\.bn$", "downsample.1"))
_LINEAR_HEAD: Rules = ((r"^fc$", "linear"),)

# glob over our names -> layouts
_LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "resnet*_cifar": (
        Layout(_DOWNSAMPLE),
        # a widespread CIFAR port: dense layer "linear", zero channels on both sides
        Layout(_DOWNSAMPLE + _LINEAR_HEAD, (("zero_channels", "both"),)),
    ),
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
