"""Converts a weight file of PyTorch or Keras into this library's layout, and checks that it fits.

    python scripts/convert_weights.py resnet50 resnet50-0676ba61.pth resnet50.npz
    python scripts/convert_weights.py resnet20_cifar weights.npz out.npz --set num_classes=10

    python scripts/convert_weights.py mobilenet_v2 mobilenet_v2.h5 mobilenet_v2.npz

The result holds one array per path (``layer1/0/conv1/kernel``), HWIO kernels, batch statistics
included, and the fields in which the network differs from its name's defaults (its padding, say):
``cnnjax.models.load_pretrained(name, file)`` creates it so. Every mismatch between file and model
is listed; nothing is written then.
"""

from __future__ import annotations

import argparse
import ast
import pathlib
import sys

from cnnjax import models


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("name", help="a registered model, e.g. resnet50")
    parser.add_argument("source", help=".npz, .safetensors, .pth, .h5, .keras, or hub name")
    parser.add_argument("target", type=pathlib.Path, help="the .npz file to write")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args(argv)
    fields = {}
    for item in args.set:
        field, _, value = item.partition("=")
        try:
            fields[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[field] = value
    try:
        if args.target.suffix != ".npz":
            raise ValueError(f"the target must end in .npz, got {str(args.target)!r}")
        model = models.load_pretrained(args.name, args.source, **fields)
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    count = models.save_weights(args.target, model)
    print(f"{args.name}: {count} arrays -> {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
