"""Whole networks against other libraries' with the same random weights, where installed."""

from __future__ import annotations

import itertools
import json
import os
import zipfile
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from cnnjax import models
from cnnjax.models import keras_layers

KERAS = {
    "mobilenet_v1": ("MobileNet", 64),
    "mobilenet_v2": ("MobileNetV2", 64),
    "xception": ("Xception", 75),
    "inception_v3": ("InceptionV3", 96),
    "inception_resnet_v2": ("InceptionResNetV2", 96),
    "vgg16": ("VGG16", 224),
    "resnet50_v1": ("ResNet50", 64),
    "preact_resnet50": ("ResNet50V2", 64),
    "densenet121": ("DenseNet121", 64),
}


def _forward(model: Any, x: np.ndarray) -> np.ndarray:
    model.eval()
    graphdef, state = nnx.split(model)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x))


def _random_arrays(arrays: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Random weights of a size that keeps activations near 1, whatever the layer."""
    out = []
    for i, a in enumerate(arrays):
        if a.ndim > 1:
            fan = np.prod(a.shape[:-1]) if a.shape[-1] != 1 else np.prod(a.shape[:2])
            out.append(rng.standard_normal(a.shape) * np.sqrt(2 / fan))
        elif len(arrays) >= 3 and i in (len(arrays) - 1, len(arrays) - 4):
            out.append(rng.uniform(0.7, 1.3, a.shape))  # variance, gamma
        else:
            out.append(rng.standard_normal(a.shape) * 0.1)
    return [v.astype(np.float32) for v in out]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KERAS)
def test_keras(name):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    build, size = KERAS[name]
    reference = getattr(keras.applications, build)(
        weights=None, input_shape=(size, size, 3), classes=7, classifier_activation=None
    )
    rng = np.random.default_rng(0)
    for layer in reference.layers:
        weights = layer.get_weights()
        if weights:
            layer.set_weights(_random_arrays(weights, rng))
    fields = keras_layers.keras_fields(name)
    model = models.create(name, num_classes=7, rngs=nnx.Rngs(0), **fields)
    keras_layers.load_keras(model, {v.name: v.get_weights() for v in reference.layers})
    x = rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        want = np.asarray(reference(x, training=False))
    got = _forward(model, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert np.abs(want[0] - want[1]).max() > 1e-3 * np.abs(want).max()  # not degenerate
    # trainable scalars as Keras counts them
    params = sum(v.size for v in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert params == sum(int(np.prod(v.shape)) for v in reference.trainable_weights)


def test_keras_weights_that_do_not_fit():
    model = models.create("mobilenet_v1_025", num_classes=3, rngs=nnx.Rngs(0))
    before = np.asarray(model.fc.bias[...])
    with pytest.raises(ValueError, match="no layer 'conv1'"):
        keras_layers.load_keras(model, {"Conv1": [np.zeros((3, 3, 3, 8))]})
    layers: dict[str, Any] = {"conv1": [np.zeros((3, 3, 3, 8))]}
    layers["conv1_bn"] = [np.ones(8)] * 4
    for i, (a, b) in enumerate(((8, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128)), 1):
        layers |= _separable(i, a, b)
    for i in range(7, 12):
        layers |= _separable(i, 128, 128)
    layers |= _separable(12, 128, 256) | _separable(13, 256, 256)
    layers["conv_preds"] = [np.zeros((1, 1, 256, 4)), np.ones(4)]
    layers["extra"] = [np.zeros(2)]
    with pytest.raises(ValueError, match=r"left over in the weights: extra(?s:.*)fc/bias: \(3,\)"):
        keras_layers.load_keras(model, layers)
    np.testing.assert_array_equal(model.fc.bias[...], before)
    layers["conv_preds"] = [np.zeros((1, 1, 256, 3)), np.ones(3)]
    del layers["extra"]
    keras_layers.load_keras(model, layers)
    np.testing.assert_array_equal(model.fc.bias[...], 1.0)
    with pytest.raises(ValueError, match="no Keras counterpart of 'googlenet'"):
        keras_layers.keras_fields("googlenet")
    with pytest.raises(ValueError, match="no Keras counterpart"):
        keras_layers.load_keras(models.abstract("nin_cifar"), {})


def _separable(i: int, a: int, b: int) -> dict[str, Any]:
    return {
        f"conv_dw_{i}": [np.zeros((3, 3, a, 1))],
        f"conv_dw_{i}_bn": [np.ones(a)] * 4,
        f"conv_pw_{i}": [np.zeros((1, 1, a, b))],
        f"conv_pw_{i}_bn": [np.ones(b)] * 4,
    }


def test_keras_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "w.h5"
    kernel = np.arange(6.0).reshape(2, 3)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"fc", b"relu"]
        file.create_group("relu").attrs["weight_names"] = []
        group = file.create_group("fc")
        group.attrs["weight_names"] = [b"fc/kernel:0"]
        group.create_dataset("fc/kernel:0", data=kernel)
    layers = keras_layers.read_keras_h5(path)
    assert set(layers) == {"fc", "relu"}
    np.testing.assert_array_equal(layers["fc"][0], kernel)
    with pytest.raises(FileNotFoundError, match="no weight file"):
        keras_layers.read_keras_h5(tmp_path / "none.h5")


def _archive(h5py, path, layers: dict[str, list[np.ndarray]]) -> None:
    """A ``.keras`` file: weights under each class's running number, names in the configuration."""
    kinds = {"conv_dw": "DepthwiseConv2D", "conv": "Conv2D", "bn": "BatchNormalization"}
    entries, counts = [], dict.fromkeys(kinds.values(), 0)
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        for name, arrays in layers.items():
            key = "bn" if name.endswith("_bn") else "conv_dw" if "_dw_" in name else "conv"
            kind, number = kinds[key], counts[kinds[key]]
            counts[kind] += 1
            entries.append({"class_name": kind, "config": {"name": name}})
            place = {"Conv2D": "conv2d", "DepthwiseConv2D": "depthwise_conv2d"}.get(
                kind, "batch_normalization"
            )
            for i, array in enumerate(arrays):
                file[
                    f"layers/{place}_{number}/vars/{i}" if number else f"layers/{place}/vars/{i}"
                ] = array
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({"config": {"layers": entries}}))
        archive.write(path.with_suffix(".h5"), "model.weights.h5")


def test_load_pretrained_takes_keras_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    layers: dict[str, Any] = {"conv1": [np.zeros((3, 3, 3, 8))], "conv1_bn": [np.ones(8)] * 4}
    widths = [8, 16, 32, 32, 64, 64, *[128] * 6, 256, 256]
    for i, (a, b) in enumerate(itertools.pairwise(widths), 1):
        layers |= _separable(i, a, b)
    layers["conv_preds"] = [np.zeros((1, 1, 256, 3)), np.ones(3)]
    layers = {k: [rng.uniform(0.5, 1, a.shape).astype(np.float32) for a in v]
              for k, v in layers.items()}  # fmt: skip
    _archive(h5py, tmp_path / "net.keras", layers)
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file.attrs["layer_names"] = [k.encode() for k in layers]
        for name, arrays in layers.items():
            names = [f"{name}/{i}:0".encode() for i in range(len(arrays))]
            file.create_group(name).attrs["weight_names"] = names
            for key, array in zip(names, arrays, strict=True):
                file[name].create_dataset(key.decode(), data=array)
    want = models.create(
        "mobilenet_v1_025", num_classes=3, rngs=nnx.Rngs(0),
        **keras_layers.keras_fields("mobilenet_v1"),
    )  # fmt: skip
    keras_layers.load_keras(want, layers)
    for file in ("net.keras", "net.h5"):
        got = models.load_pretrained("mobilenet_v1_025", tmp_path / file, num_classes=3)
        assert got.config.bn_epsilon == 1e-3
        kinds = nnx.Any(nnx.Param, nnx.BatchStat)
        a, b = (jax.tree.leaves(nnx.state(m, kinds)) for m in (got, want))
        assert len(a) == len(b) > 100
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    for name in ("resnet50", "vgg16_bn", "inception_resnet_v2_paper"):
        with pytest.raises(ValueError, match=f"no Keras counterpart of '{name}'.*Did you mean"):
            models.load_pretrained(name, tmp_path / "net.keras")
    with pytest.raises(ValueError, match="don't fit|hold no layer"):
        models.load_pretrained("mobilenet_v2", tmp_path / "net.keras")
    (tmp_path / "bad.keras").write_bytes(b"nothing")
    with pytest.raises((ValueError, ImportError), match="not a .keras archive"):
        models.load_pretrained("mobilenet_v1", tmp_path / "bad.keras")
