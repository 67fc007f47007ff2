"""Conversion of PyTorch-layout weights: layouts, mismatches, and two trained networks."""

from __future__ import annotations

import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import models

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def cifar_test_images(real_data: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    image = pytest.importorskip("PIL.Image")
    with np.load(real_data / "cifar10_jpeg" / "test_jpeg.npz") as data:
        raw, offset, label = data["jpeg"].tobytes(), data["offset"], data["label"]
    images = np.stack(
        [
            np.asarray(image.open(io.BytesIO(raw[a:b])).convert("RGB"))
            for a, b in zip(offset[:-1], offset[1:], strict=True)
        ]
    )
    return images, label


def accuracy(model, images: np.ndarray, labels: np.ndarray, batch: int = 500) -> float:
    graphdef, state = nnx.split(model)

    @jax.jit
    def correct(state, x, y):
        x = (x.astype(jnp.float32) / 255.0 - MEAN) / STD
        return jnp.sum(jnp.argmax(nnx.merge(graphdef, state)(x), -1) == y)

    hits = [
        int(correct(state, images[i : i + batch], labels[i : i + batch]))
        for i in range(0, len(images), batch)
    ]
    return 100.0 * sum(hits) / len(images)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20_cifar", 81.03),
        pytest.param("resnet56_cifar", 83.20, marks=pytest.mark.slow),
    ],
)
@pytest.mark.method("resnet_cifar")
def test_trained_cifar_resnet_reproduces_its_accuracy(real_data, name, expected):
    file = real_data / "weights" / f"cifar10_{name.removesuffix('_cifar')}.npz"
    model = models.load_pretrained(name, file)
    images, labels = cifar_test_images(real_data)
    assert accuracy(model, images, labels) == pytest.approx(expected, abs=0.05)
