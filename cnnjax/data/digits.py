"""scikit-learn's copy of the UCI handwritten digits as a TFDS data set: real images, no network.

1,797 grey images 8x8 with 17 levels (0..16), stored here as 0..255 (``round(level * 255 / 16)``).
The split is fixed: within each class, in scikit-learn's order, every fifth image (the 5th, 10th,
...) is a test image. That gives 1,442 training and 355 test images with the classes balanced.

E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits. UCI ML Repository, 1998.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_EVERY = 5


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads the digits out of scikit-learn.

    Returns:
      ``(images, labels, is_test)``: uint8 ``(1797, 8, 8, 1)``, int32 ``(1797,)``, bool ``(1797,)``.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    labels = np.asarray(raw.target, np.int32)
    is_test = np.zeros(len(labels), bool)
    for digit in range(10):
        is_test[np.flatnonzero(labels == digit)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return images, labels, is_test


class Digits(tfds.core.GeneratorBasedBuilder):
    """UCI handwritten digits 8x8 from scikit-learn."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="UCI handwritten digits 8x8 as shipped with scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        _, _, is_test = load()
        return {
            "train": self._generate_examples(np.flatnonzero(~is_test)),
            "test": self._generate_examples(np.flatnonzero(is_test)),
        }

    def _generate_examples(self, rows: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image

        images, labels, _ = load()
        for i in rows.tolist():
            yield i, {"image": Image.fromarray(images[i, :, :, 0]), "label": int(labels[i])}


def prepare(root: str) -> None:
    """Writes the set under ``root`` once; several processes may call this together.

    Raises:
      OSError: ``root`` cannot be written.
    """
    from cnnjax.data.prepare import write

    write(Digits, root, exist_ok=True)
