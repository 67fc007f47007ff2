"""Which data sets exist, what they look like, and their records: TFDS without TensorFlow.

Nothing here downloads: a set that is not on the disk is an error that names the command to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from cnnjax.errors import did_you_mean

PathLike = str | os.PathLike[str]

# sets that `scripts/prepare_data.py` writes under TFDS' own name, and sets of ours
PREPARABLE = ("mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "imagenet2012")
OWN = ("digits", "cifar10_jpeg")


class DatasetNotPreparedError(FileNotFoundError):
    """The data set is known, but its files are not in ``data_dir``."""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a model needs to know of a data set.

    Attributes:
      name: the TFDS name.
      num_classes: number of labels.
      image_shape: ``(height, width, channels)``; ``None`` where images differ in size.
      splits: number of examples of each split, e.g. ``{"train": 60000, "test": 10000}``.
      class_names: one name per label, in the order of the labels.
      data_dir: the folder that holds the prepared files.
    """

    name: str
    num_classes: int
    image_shape: tuple[int | None, int | None, int]
    splits: dict[str, int]
    class_names: tuple[str, ...]
    data_dir: str


def tfds() -> Any:
    """Imports tensorflow_datasets (never TensorFlow) together with our own builders.

    Raises:
      ImportError: the ``train`` extra is not installed.
    """
    try:
        with warnings.catch_warnings():
            # third-party deprecations at import time are not ours to mend
            warnings.simplefilter("ignore", DeprecationWarning)
            import tensorflow_datasets

            from cnnjax.data import digits  # noqa: F401  (registers the builder)
    except ImportError as e:
        raise ImportError(
            f"reading data needs the 'train' extra: pip install 'cnnjax[train]' ({e})"
        ) from e
    return tensorflow_datasets


@contextlib.contextmanager
def quiet_absl() -> Iterator[None]:
    """TFDS logs a warning for each folder that is not there yet; our errors say it better."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def default_data_dir(data_dir: PathLike | None = None) -> str:
    """``data_dir``, else ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return str(pathlib.Path(chosen).expanduser().absolute())


def prepare_hint(name: str, data_dir: str) -> str:
    """The command that prepares a data set."""
    base = name.split("/")[0].split(":")[0]
    if base == "cifar10_jpeg":
        return f"python scripts/prepare_cifar10_jpeg.py --from DIR --data_dir {data_dir}"
    if base in PREPARABLE:
        return f"python scripts/prepare_data.py {base} --from DIR --data_dir {data_dir}"
    return (
        f"tfds build {name} --file_format=array_record --data_dir {data_dir}"
        "  (this one downloads, and needs TensorFlow)"
    )


@quiet_absl()
def builder(name: str, data_dir: PathLike | None = None) -> Any:
    """The TFDS builder of a data set that is ready to be read.

    ``digits`` is prepared on first use (its images come with scikit-learn).

    Args:
      name: a TFDS name, e.g. ``"cifar10"``, ``"emnist/letters"``, or ``"digits"``.
      data_dir: where the data lies; see `default_data_dir`.

    Raises:
      ValueError: there is no such data set.
      DatasetNotPreparedError: it exists, but is not in ``data_dir``.
    """
    lib, root = tfds(), default_data_dir(data_dir)
    if not isinstance(name, str) or not name:
        raise ValueError(f"a data set's name is a non-empty string, not {name!r}")
    try:
        found = lib.builder(name, data_dir=root)
    except lib.core.registered.DatasetNotFoundError:
        if name in OWN:
            raise _not_prepared(name, root) from None
        known = sorted({*OWN, *PREPARABLE, *_on_disk(root), *_all_names()})
        raise ValueError(
            f"unknown data set {name!r}.{did_you_mean(name, known)} A folder of images becomes a"
            f" data set with: python scripts/prepare_data.py {name} --from DIR --data_dir {root}"
        ) from None
    except ImportError as e:  # its code needs TensorFlow, and there are no files to read instead
        raise _not_prepared(name, root) from e
    if name == "digits" and not found.is_prepared():
        from cnnjax.data import digits

        digits.prepare(root)
        found = lib.builder(name, data_dir=root)
    if not found.is_prepared() or not found.info.splits:
        raise _not_prepared(name, root)
    formats = {f.value for f in found.info.available_file_formats()}
    if not formats & {"array_record", "parquet"}:
        raise DatasetNotPreparedError(
            f"{name!r} in {found.data_dir} is stored as {', '.join(sorted(formats))}, which has no"
            f" random access. Prepare it as array_record in another folder: "
            f"{prepare_hint(name, root)}"
        )
    return found


def _not_prepared(name: str, root: str) -> DatasetNotPreparedError:
    return DatasetNotPreparedError(
        f"data set {name!r} is not prepared in {root}, and cnnjax never downloads. "
        f"Run: {prepare_hint(name, root)}"
    )


def _on_disk(root: str) -> list[str]:
    """Names of the data sets prepared under ``root``."""
    path = pathlib.Path(root)
    if not path.is_dir():
        return []
    return sorted({p.parents[1].name for p in path.glob("*/*/dataset_info.json")})


@functools.cache
def _all_names() -> tuple[str, ...]:
    # community data sets are left out: listing those asks the network
    return tuple(tfds().list_builders(with_community_datasets=False))


def _keys(found: Any) -> tuple[str, str]:
    """Names of the image feature and of the label feature."""
    features, types = found.info.features, tfds().features
    pair = found.info.supervised_keys
    if pair and len(pair) == 2 and all(isinstance(k, str) and k in features for k in pair):
        image, label = pair
    else:
        images = [k for k, f in features.items() if isinstance(f, types.Image)]
        labels = [k for k, f in features.items() if isinstance(f, types.ClassLabel)]
        image, label = (*images[:1], *labels[:1]) if images and labels else ("", "")
    if not (
        image
        and isinstance(features[image], types.Image)
        and isinstance(features[label], types.ClassLabel)
    ):
        raise ValueError(
            f"{found.name!r} is not an image-classification set: its features are {list(features)}"
        )
    return image, label


def info(name: str, data_dir: PathLike | None = None) -> DatasetInfo:
    """Describes a prepared data set.

    Args:
      name: a TFDS name.
      data_dir: where the data lies; see `default_data_dir`.

    Raises:
      ValueError: no such data set, or not one of image classification.
      DatasetNotPreparedError: it is not in ``data_dir``.
    """
    found = builder(name, data_dir)
    image, label = _keys(found)
    labels = found.info.features[label]
    return DatasetInfo(
        name=name,
        num_classes=labels.num_classes,
        image_shape=tuple(found.info.features[image].shape),
        splits={k: int(v.num_examples) for k, v in found.info.splits.items() if k != "all"},
        class_names=tuple(labels.names),
        data_dir=str(found.data_dir),
    )


def decode_image(data: bytes, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """Decodes a PNG or JPEG.

    Args:
      data: the file's bytes.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA); other modes are converted.

    Returns:
      uint8 array ``(height, width, channels)``.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        pixels = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


class Records:
    """Random access to the encoded records of one split; can be sent to worker processes."""

    def __init__(self, name: str, split: str, data_dir: PathLike | None = None):
        self.name, self.split, self.data_dir = name, split, default_data_dir(data_dir)
        self._open()

    def _open(self) -> None:
        found = builder(self.name, self.data_dir)
        self._image, self._label = _keys(found)
        self.channels = int(found.info.features[self._image].shape[-1])
        try:
            self.length = int(found.info.splits[self.split].num_examples)
        except (KeyError, ValueError) as e:
            sizes = {k: v.num_examples for k, v in found.info.splits.items() if k != "all"}
            listed = ", ".join(f"{k} ({n} examples)" for k, n in sizes.items())
            raise ValueError(
                f"unknown split {self.split!r} of {self.name!r}; it has {listed}; slices such as"
                f" 'train[:90%]' work too.{did_you_mean(self.split.split('[')[0], sizes)}"
            ) from e
        if self.length == 0:
            raise ValueError(f"split {self.split!r} of {self.name!r} is empty")
        self._raw = found.info.file_format.value == "array_record"
        if self._raw:  # parsed below: ten times faster than TFDS' general parser
            how = {"deserialize_method": tfds().decode.DeserializeMethod.RAW_BYTES}
        else:
            how = {"decoders": {self._image: tfds().decode.SkipDecoding()}}
        self._source = found.as_data_source(self.split, **how)

    def __getstate__(self) -> dict[str, str]:
        return {"name": self.name, "split": self.split, "data_dir": self.data_dir}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self.length

    def encoded(self, indices: Sequence[int]) -> tuple[list[bytes], np.ndarray]:
        """Encoded images and int32 labels of some records."""
        rows = self._source.__getitems__([int(i) for i in indices])
        if self._raw:
            from tensorflow_datasets.proto import tf_example_pb2

            parse = tf_example_pb2.Example.FromString
            features = [parse(r).features.feature for r in rows]
            labels = [f[self._label].int64_list.value[0] for f in features]
            images = [f[self._image].bytes_list.value[0] for f in features]
        else:
            labels, images = [r[self._label] for r in rows], [r[self._image] for r in rows]
        return images, np.asarray(labels, np.int32)


@functools.lru_cache(maxsize=8)
def _arrays(name: str, split: str, root: str) -> tuple[np.ndarray, np.ndarray]:
    records = Records(name, split, root)
    shape: Any = info(name, root).image_shape
    if None in shape:
        raise ValueError(
            f"the images of {name!r} differ in size ({shape}), so they do not form one array: "
            "read them with cnnjax.data.loader"
        )
    images = np.empty((len(records), *shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), 4096):  # in pieces: the encoded copies need not all live
        span = range(start, min(start + 4096, len(records)))
        encoded, labels[span.start : span.stop] = records.encoded(span)
        for i, data in zip(span, encoded, strict=True):
            images[i] = decode_image(data, records.channels)
    images.flags.writeable = labels.flags.writeable = False  # shared by every caller
    return images, labels


def arrays(
    name: str, split: str, data_dir: PathLike | None = None
) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"]]:
    """A whole split as arrays, decoded once per process and kept (read-only).

    Args:
      name: a TFDS name whose images all have one size.
      split: ``"train"``, ``"test"``, or a slice like ``"train[:90%]"``.
      data_dir: where the data lies; see `default_data_dir`.

    Returns:
      ``(images, labels)``: uint8 ``(n, height, width, channels)`` and int32 ``(n,)``.

    Raises:
      ValueError: unknown set or split, or images of different sizes.
      DatasetNotPreparedError: it is not in ``data_dir``.
    """
    return _arrays(name, split, default_data_dir(data_dir))
