"""Writes TFDS data sets from local files: no network, no TensorFlow, nothing left half-written.

The stock builders' own extraction needs TensorFlow, so their files go through a subclass that
keeps name, version and features and replaces only how examples are generated. Afterwards the
stock name reads the result.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cnnjax.data import files
from cnnjax.data.sources import PathLike, default_data_dir, quiet_absl, tfds

IDX = ("mnist", "fashion_mnist", "kmnist")
CIFAR = ("cifar10", "cifar100")

# a split's examples: their number, and a function that yields (key, example)
Split = tuple[int, Callable[[], Iterator[tuple[Any, dict[str, Any]]]]]


def prepare(
    name: str, source: PathLike, data_dir: PathLike | None = None, *, progress: bool = True
) -> pathlib.Path:
    """Prepares a TFDS data set from files that are here already.

    Args:
      name: ``mnist``, ``fashion_mnist``, ``kmnist``, ``cifar10``, ``cifar100``; any other name
        reads ``source`` as a folder of images ``train/<class>/*.jpg|png`` (with optional ``val``
        and ``test``), for ``imagenet2012`` with the WordNet ids as class folders.
      source: the folder (for CIFAR also the ``.tar.gz``).
      data_dir: the TFDS root; default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      progress: show a progress bar.

    Returns:
      The folder of the prepared data set.

    Raises:
      FileNotFoundError: ``source`` or one of its files is missing.
      FileExistsError: the data set is prepared already.
      BadFileError: a file is damaged or files do not match (a ValueError).
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    lib = tfds()
    if not name.isidentifier():
        raise ValueError(f"a data set's name is letters, digits and underscores, not {name!r}")
    if name in IDX:
        cls = lib.builder_cls(name)
        features = cls(data_dir=tempfile.gettempdir()).info.features
        read = files.read_mnist(path, features["image"].shape[:2], features["label"].num_classes)
        splits = {k: _array_split(k, *v) for k, v in read.items()}
        made = _subclass(cls, splits, {}, progress)
    elif name in CIFAR:
        read = files.read_cifar(path, 10 if name == "cifar10" else 100)
        splits = {k: _cifar_split(k, *read[k]) for k in ("train", "test")}
        names = {"label": read["names"], "coarse_label": read["coarse_names"]}
        made = _subclass(lib.builder_cls(name), splits, names, progress)
    else:
        made = _folder_builder(name, path, progress)
    return write(made, data_dir)


def _picture(pixels: np.ndarray) -> Any:
    """TFDS encodes a PIL image without TensorFlow, an array only with it."""
    from PIL import Image

    return Image.fromarray(pixels)


def _array_split(split: str, images: np.ndarray, labels: np.ndarray) -> Split:
    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(len(images)):  # the stock keys, so that the stored order is the stock one
            yield i, {"image": _picture(images[i]), "label": int(labels[i])}

    del split
    return len(images), rows


def _cifar_split(split: str, images: np.ndarray, labels: np.ndarray, coarse: Any) -> Split:
    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(len(images)):
            row = {"id": f"{split}_{i:05d}", "image": _picture(images[i]), "label": int(labels[i])}
            if coarse is not None:
                row["coarse_label"] = int(coarse[i])
            yield i, row

    return len(images), rows


def _subclass(
    stock: Any, splits: dict[str, Split], names: dict[str, Any], progress: bool
) -> type[Any]:
    """A builder with the stock one's name, version and features, and these examples."""

    def _split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        for key, given in names.items():
            if given is not None:
                self.info.features[key].names = given
        return {k: self._generate_examples(k) for k in splits}

    def _generate_examples(self: Any, split: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        from tqdm.auto import tqdm

        total, rows = splits[split]
        yield from tqdm(rows(), f"{self.name} {split}", total, unit=" images", disable=not progress)

    body = {
        "__module__": stock.__module__,  # where TFDS looks for the set's description
        "name": stock.name,
        "_split_generators": _split_generators,
        "_generate_examples": _generate_examples,
    }
    with tfds().core.registered.skip_registration():
        return type(stock.__name__, (stock,), body)


def _folder_builder(name: str, folder: pathlib.Path, progress: bool) -> type[Any]:
    lib = tfds()
    classes, found = files.read_folder(folder)
    try:
        stock = lib.builder_cls(name)
    except lib.core.registered.DatasetNotFoundError:
        stock = own_builder(
            name,
            f"Images of the folder {folder.name}, one folder per class.",
            {"image": lib.features.Image(), "label": lib.features.ClassLabel(names=classes)},
        )
    try:
        features = stock(data_dir=tempfile.gettempdir()).info.features
    except ImportError as e:
        raise ValueError(
            f"TFDS' {name!r} cannot be described without TensorFlow: give the folder of images a"
            " name of its own"
        ) from e
    texts = [k for k, f in features.items() if isinstance(f, lib.features.Text)]
    if set(features) != {"image", "label", *texts}:
        raise ValueError(
            f"TFDS' {name!r} has features {sorted(features)}, which a folder of images cannot"
            " fill: give the folder a name of its own"
        )
    known = features["label"].names
    if not set(classes) <= set(known):
        strange = sorted(set(classes) - set(known))
        raise ValueError(
            f"{folder / 'train'} has classes that TFDS' {name!r} has not, e.g. {strange[:3]}"
            f" (it has e.g. {known[:3]}): rename them, or give the folder a name of its own"
        )

    def split(rows: list[tuple[str, int]]) -> Split:
        def examples() -> Iterator[tuple[str, dict[str, Any]]]:
            for path, label in rows:
                file = pathlib.Path(path)
                row = dict.fromkeys(texts, file.name)
                row |= {"image": path, "label": classes[label]}
                yield f"{classes[label]}/{file.name}", row

        return len(rows), examples

    return _subclass(stock, {k: split(v) for k, v in found.items()}, {}, progress)


def own_builder(name: str, description: str, features: dict[str, Any]) -> type[Any]:
    """An unregistered builder of a set that TFDS does not know; its files carry all it takes."""
    lib = tfds()

    def _info(self: Any) -> Any:
        return lib.core.DatasetInfo(
            builder=self,
            description=description,
            features=lib.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    body = {
        "__module__": __name__,
        "name": name,
        "VERSION": lib.core.Version("1.0.0"),
        "_info": _info,
        "_split_generators": lambda self, dl_manager: {},
        "_generate_examples": lambda self: iter(()),
    }
    with lib.core.registered.skip_registration():
        return type(name, (lib.core.GeneratorBasedBuilder,), body)


def prepare_jpeg(
    name: str,
    description: str,
    splits: dict[str, tuple[list[bytes], np.ndarray]],
    names: list[str],
    shape: tuple[int, int, int],
    data_dir: PathLike | None = None,
    *,
    progress: bool = True,
) -> pathlib.Path:
    """Prepares a set of ours from JPEG files in memory; the bytes are stored as they are.

    Args:
      name: the set's name.
      description: what it is.
      splits: ``{split: (JPEG files, labels)}``.
      names: the classes.
      shape: ``(height, width, channels)`` of every image.
      data_dir: the TFDS root.
      progress: show a progress bar.
    """

    def split(jpegs: list[bytes], labels: np.ndarray) -> Split:
        def rows() -> Iterator[tuple[int, dict[str, Any]]]:
            for i, data in enumerate(jpegs):
                yield i, {"image": data, "label": int(labels[i])}

        return len(jpegs), rows

    lib = tfds()
    features = {
        "image": lib.features.Image(shape=shape, encoding_format="jpeg"),
        "label": lib.features.ClassLabel(names=names),
    }
    stock = own_builder(name, description, features)
    return write(
        _subclass(stock, {k: split(*v) for k, v in splits.items()}, {}, progress), data_dir
    )


def write(builder_cls: Any, data_dir: PathLike | None, *, exist_ok: bool = False) -> pathlib.Path:
    """Runs a TFDS builder into a hidden folder next to its place, then renames it there.

    Several processes may call this together: one writes, the others wait.

    Args:
      builder_cls: a builder whose ``_generate_examples`` needs no TensorFlow.
      data_dir: the TFDS root.
      exist_ok: a set that is prepared already is fine.

    Returns:
      The folder of the prepared data set.

    Raises:
      FileExistsError: the data set is there already.
      OSError: the root cannot be written.
    """
    lib, root = tfds(), pathlib.Path(default_data_dir(data_dir))
    with quiet_absl(), _lock(root, builder_cls.name):
        target = pathlib.Path(builder_cls(data_dir=str(root)).data_dir)
        if (target / "dataset_info.json").exists():
            if exist_ok:
                return target
            raise FileExistsError(f"{target} exists already; remove it to prepare it again")
        for left in root.glob(f".{builder_cls.name}-*.partial"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        hidden = pathlib.Path(
            tempfile.mkdtemp(prefix=f".{builder_cls.name}-", suffix=".partial", dir=root)
        )
        try:
            with _quiet_tfds(lib):
                made = builder_cls(data_dir=str(hidden / "data"), file_format="array_record")
                made.download_and_prepare(
                    download_dir=str(hidden / "downloads"),
                    download_config=lib.download.DownloadConfig(try_download_gcs=False),
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(made.data_dir, target)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    return target


@contextlib.contextmanager
def _lock(root: pathlib.Path, name: str) -> Iterator[None]:
    """Holds ``root`` for one data set against other processes; the lock file goes away again."""
    path = root / f".{name}.lock"
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_RDWR)
        except OSError as e:
            raise OSError(
                e.errno,
                f"cannot write data set {name!r} under {root} ({e.strerror}); choose another folder"
                " with data_dir or the environment variable TFDS_DATA_DIR",
            ) from e
        fcntl.flock(handle, fcntl.LOCK_EX)
        # the previous holder may have removed the file that this handle belongs to
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                break
        os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def _quiet_tfds(lib: Any) -> Iterator[None]:
    """No lines of TFDS' own: it cannot tell how many examples a new set will have."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        lib.disable_progress_bar()
        try:
            yield
        finally:
            lib.enable_progress_bar()
