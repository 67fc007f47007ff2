"""Prepares a TFDS data set from files that you already have: no network, no TensorFlow.

  python scripts/prepare_data.py mnist --from DIR [--data_dir D]
  python scripts/prepare_data.py cifar10 --from cifar-10-binary.tar.gz
  python scripts/prepare_data.py my_flowers --from FOLDER        # FOLDER/train/<class>/*.jpg|png

``mnist``, ``fashion_mnist`` and ``kmnist`` take the four IDX files (gzipped or not), ``cifar10``
and ``cifar100`` the binary or the python archive (packed or unpacked); any other name takes a
folder of images with ``train`` and, if you have them, ``val`` and ``test``; ``imagenet2012`` is
such a folder with the WordNet ids as class names. Afterwards ``tfds.data_source(NAME)`` and
``cnnjax.data.loader(NAME, ...)`` read it. An interrupted run leaves nothing behind.
"""

from __future__ import annotations

import argparse
import pathlib
import signal
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cnnjax.data import info
from cnnjax.data.prepare import prepare


def terminate(*_: Any) -> None:
    """SIGTERM cleans up as Ctrl-C does."""
    raise SystemExit(143)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="the TFDS name, or a new one for a folder of images")
    parser.add_argument("--from", dest="source", required=True, help="where the files are")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, terminate)
    try:
        folder = prepare(args.dataset, args.source, args.data_dir, progress=not args.quiet)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    known = info(args.dataset, args.data_dir)
    sizes = ", ".join(f"{n} {k}" for k, n in known.splits.items())
    print(f"{known.name}: {sizes}, {known.num_classes} classes, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
