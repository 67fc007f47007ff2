"""Prepares the JPEG copy of CIFAR-10 (npz files) as the TFDS data set ``cifar10_jpeg``.

  python scripts/prepare_cifar10_jpeg.py --from DIR [--data_dir D]

DIR holds ``train_jpeg.npz`` and ``test_jpeg.npz``, each with ``jpeg`` (uint8: all files, one after
the other), ``offset`` (int64, n + 1: where each begins and ends) and ``label`` (uint8, n). The
copy is lossy: an accuracy on it is not one on ``cifar10``, so it has a name of its own.
"""

from __future__ import annotations

import argparse
import pathlib
import signal
import sys
import zipfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cnnjax.data.files import BadFileError, check_labels
from cnnjax.data.prepare import prepare_jpeg
from scripts.prepare_data import terminate

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def read(path: pathlib.Path) -> tuple[list[bytes], np.ndarray]:
    """The JPEG files and labels of one npz.

    Raises:
      FileNotFoundError: there is no such file.
      BadFileError: it is damaged or its parts do not match.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
            jpeg, offset, label = npz["jpeg"], npz["offset"], npz["label"]
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, OSError) as e:
        raise BadFileError(f"{path}: not a whole npz file with jpeg, offset and label ({e})") from e
    if len(offset) != len(label) + 1 or offset[0] != 0 or offset[-1] != len(jpeg):
        raise BadFileError(
            f"{path}: {len(label)} labels, {len(offset)} offsets up to {offset[-1]}, {len(jpeg)}"
            " bytes: these do not match"
        )
    if (np.diff(offset) < 4).any():
        raise BadFileError(f"{path}: offsets do not increase")
    check_labels(path, label, len(CLASSES))
    data = jpeg.tobytes()
    files = [data[a:b] for a, b in zip(offset[:-1].tolist(), offset[1:].tolist(), strict=True)]
    for i, file in enumerate(files):
        if not file.startswith(b"\xff\xd8"):
            raise BadFileError(f"{path}: file {i} is no JPEG")
    return files, label


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", required=True, help="the folder of the npz files")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, terminate)
    try:
        splits = {s: read(pathlib.Path(args.source) / f"{s}_jpeg.npz") for s in ("train", "test")}
        folder = prepare_jpeg(
            "cifar10_jpeg",
            "CIFAR-10 recompressed as JPEG: a lossy copy, not comparable with CIFAR-10.",
            splits,
            CLASSES,
            (32, 32, 3),
            args.data_dir,
            progress=not args.quiet,
        )
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(f"cifar10_jpeg: {', '.join(f'{len(v[1])} {k}' for k, v in splits.items())}, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
