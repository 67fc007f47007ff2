"""Weights of ``keras.applications`` into the models that have a counterpart there.

MobileNets, Xception, Inception-v3, Inception-ResNet-v2, VGGs, ResNets (``resnet50_v1`` ...),
ResNet50V2 (``preact_resnet50``) and DenseNets.
Keras has HWIO kernels and NHWC maps as we do; what differs are the names, which it numbers in
creation order where the author gave none (``conv2d``, ``conv2d_1``, ...).

The configuration must match too: `keras_fields` has the fields of the Keras networks.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from cnnjax.errors import did_you_mean
from cnnjax.models import blocks, keras_names
from cnnjax.models.keras_names import counterpart, keras_fields

__all__ = [
    "counterpart",
    "keras_fields",
    "load_keras",
    "read_keras",
    "read_keras_h5",
]
Layers = Mapping[str, Sequence[Any]]

_AUTO = re.compile(r"(conv2d|batch_normalization)(?:_(\d+))?")


def read_keras_h5(path: str | os.PathLike[str]) -> dict[str, list[np.ndarray]]:
    """``{layer name: arrays}`` of a Keras application's ``.h5`` weight file.

    Raises:
      FileNotFoundError: no such file.
      ImportError: h5py is absent.
      ValueError: the file isn't in that format.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {str(path)!r}")
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("reading Keras' .h5 files needs h5py: pip install h5py") from error
    text = lambda v: v.decode() if isinstance(v, bytes) else str(v)  # noqa: E731
    with h5py.File(path, "r") as file:
        root: Any = file.get("model_weights", file)
        if "layer_names" not in root.attrs:
            raise ValueError(f"{str(path)!r} has no layer_names: not a Keras application's weights")
        return {
            text(layer): [np.asarray(root[layer][w]) for w in root[layer].attrs["weight_names"]]
            for layer in root.attrs["layer_names"]
        }


def read_keras(path: str | os.PathLike[str]) -> dict[str, list[np.ndarray]]:
    """``{layer name: arrays}`` of a Keras file: an application's ``.h5``, or a ``.keras`` archive.

    Raises:
      FileNotFoundError: no such file.
      ImportError: h5py is absent.
      ValueError: the file isn't in such a format.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() != ".keras":
        return read_keras_h5(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {str(path)!r}")
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("reading .keras files needs h5py: pip install h5py") from error
    try:
        with zipfile.ZipFile(path) as archive:
            layers = json.loads(archive.read("config.json"))["config"]["layers"]
            weights = io.BytesIO(archive.read("model.weights.h5"))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a .keras archive of a network: {error}") from error
    out: dict[str, list[np.ndarray]] = {}
    seen: dict[str, int] = {}
    with h5py.File(weights, "r") as file:
        for layer in layers:
            # the archive counts layers of a class: conv2d, conv2d_1, ... whatever their own names
            kind = _snake(layer["class_name"])
            number = seen[kind] = seen.get(kind, -1) + 1
            place: Any = file.get(f"layers/{kind}_{number}" if number else f"layers/{kind}")
            held: Any = {} if place is None else place.get("vars", {})
            arrays = [np.asarray(held[k]) for k in sorted(held, key=int)]
            out[layer["config"]["name"]] = arrays
    return out


def _snake(name: str) -> str:
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _units(module: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, layer) of convolutions, norms, units and dense layers, in the order of creation."""
    kinds = (blocks.ConvNorm, nnx.Conv, nnx.Linear, nnx.BatchNorm)
    if isinstance(module, kinds) or (hasattr(module, "pointwise") and hasattr(module, "bn")):
        yield path, module
        return
    if isinstance(module, nnx.List):
        children = [(str(i), v) for i, v in enumerate(module)]
    else:
        children = list(vars(module).items())
    for name, child in children:
        if isinstance(child, nnx.Module | nnx.List):
            yield from _units(child, f"{path}/{name}" if path else name)


class _Source:
    """Hands out a file's layers: by name, or the next automatic one of a kind."""

    def __init__(self, layers: Layers):
        # older files: "conv1/bn"
        named = {k.replace("/", "_"): v for k, v in layers.items()}
        self.layers = {k: [np.asarray(a) for a in v] for k, v in named.items() if len(v)}
        self.unused = dict.fromkeys(self.layers)
        auto: dict[str, list[tuple[int, str]]] = {"conv2d": [], "batch_normalization": []}
        for name in self.layers:
            if match := _AUTO.fullmatch(name):
                auto[match.group(1)].append((int(match.group(2) or 0), name))
        self._auto = {kind: iter([n for _, n in sorted(found)]) for kind, found in auto.items()}

    def take(self, name: str | None, kind: str, path: str) -> list[np.ndarray]:
        if name is None:
            name = next(self._auto[kind], None)
            if name is None:
                raise ValueError(f"the weights hold no {kind} layer for {path!r}: another network?")
        if name not in self.layers:
            raise ValueError(
                f"the weights hold no layer {name!r} (for {path!r})."
                f"{did_you_mean(name, self.layers)}"
            )
        self.unused.pop(name, None)
        return self.layers[name]


def _assign(target: Any, value: np.ndarray, path: str, wrong: list[str]) -> None:
    if target.shape != value.shape and value.size == target.size:
        # depthwise (h, w, C, 1) -> (h, w, 1, C); a 1x1 convolution as the classifier
        value = value.reshape(target.shape)
    if target.shape != value.shape:
        wrong.append(f"{path}: {tuple(target.shape)} here, {value.shape} in the weights")
        return
    target[...] = np.asarray(value, np.float32)


def load_keras(model: Any, layers: Layers) -> Any:
    """Copies Keras weights into ``model``, in place.

    Args:
      model: from ``create(name, **keras_fields(name))``, or with a width, class number, etc.
      layers: ``{layer.name: layer.get_weights() for layer in keras_model.layers}``, or what
        `read_keras_h5` returns.

    Returns:
      ``model``.

    Raises:
      ValueError: a network without a counterpart, or weights that don't fit (all mismatches are
        listed; nothing is changed unless every layer is there).
    """
    name = model.provenance.name if model.provenance is not None else type(model).__name__
    base = counterpart(name)
    source, wrong = _Source(layers), []
    plan: list[tuple[Any, np.ndarray, str]] = []
    for path, unit in _units(model):
        keras = keras_names.name_of(base, path)
        if isinstance(unit, nnx.Linear):
            kernel, bias = source.take(keras or "predictions", "dense", path)
            plan += [(unit.kernel, kernel, f"{path}/kernel"), (unit.bias, bias, f"{path}/bias")]
            continue
        arrays, targets, norm = [], [], unit if isinstance(unit, nnx.BatchNorm) else None
        if norm is None:
            arrays = source.take(keras, "conv2d", path)
            norm = getattr(unit, "bn", None)
            keras = keras and keras_names.norm_of(base, keras)
            if hasattr(unit, "pointwise"):
                targets = [unit.depthwise.kernel, unit.pointwise.kernel]
            else:
                conv = unit if isinstance(unit, nnx.Conv) else unit.conv
                targets = [conv.kernel, *([conv.bias] if conv.bias is not None else [])]
        if norm is not None:
            arrays = [*arrays, *source.take(keras, "batch_normalization", path)]
            targets += [v for v in (norm.scale, norm.bias, norm.mean, norm.var) if v is not None]
        if len(arrays) != len(targets):
            wrong.append(f"{path}: {len(targets)} arrays here, {len(arrays)} in the weights")
        plan += [(t, a, path) for t, a in zip(targets, arrays)]
    if source.unused:
        wrong.append(f"left over in the weights: {', '.join(source.unused)}")
    wrong += [
        f"{path}: {tuple(t.shape)} here, {a.shape} in the weights"
        for t, a, path in plan
        if t.shape != a.shape and t.size != a.size
    ]
    if wrong:
        raise ValueError(f"these weights don't fit {name!r}:\n  " + "\n  ".join(wrong))
    for target, array, path in plan:
        _assign(target, array, path, wrong)
    return model
