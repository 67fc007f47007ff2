"""Writes TFDS data sets from local files: no network, no TensorFlow, nothing left half-written."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from typing import Any

from cnnjax.data.sources import PathLike, default_data_dir, tfds


def write(builder_cls: Any, data_dir: PathLike | None, *, progress: bool = True) -> pathlib.Path:
    """Runs a TFDS builder into a hidden folder next to its place, then renames it there.

    Args:
      builder_cls: a builder whose ``_generate_examples`` needs no TensorFlow.
      data_dir: the TFDS root.
      progress: TFDS' own progress lines (ours are drawn by the readers).

    Returns:
      The folder of the prepared data set.

    Raises:
      FileExistsError: the data set is there already.
    """
    lib, root = tfds(), pathlib.Path(default_data_dir(data_dir))
    root.mkdir(parents=True, exist_ok=True)
    target = pathlib.Path(builder_cls(data_dir=str(root)).data_dir)
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it to prepare it again")
    hidden = pathlib.Path(tempfile.mkdtemp(prefix=f".{builder_cls.name}-", dir=root))
    try:
        with _quiet(lib):
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
def _quiet(lib: Any) -> Any:
    """No lines of TFDS' own: it cannot tell how many examples a new set will have."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        lib.disable_progress_bar()
        try:
            yield
        finally:
            lib.enable_progress_bar()
