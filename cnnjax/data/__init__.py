"""Data sets by their TFDS name, read by Grain without TensorFlow, augmented in numpy.

``info`` describes a set, ``arrays`` gives a small one as a whole, ``loader`` gives batches with an
exact position, ``Augment`` says what happens to an image on the way.
"""

from __future__ import annotations

from cnnjax.data.augment import Augment
from cnnjax.data.loader import Loader, loader
from cnnjax.data.sources import (
    DatasetInfo,
    DatasetNotPreparedError,
    arrays,
    default_data_dir,
    info,
)

__all__ = [
    "Augment",
    "DatasetInfo",
    "DatasetNotPreparedError",
    "Loader",
    "arrays",
    "default_data_dir",
    "info",
    "loader",
]
