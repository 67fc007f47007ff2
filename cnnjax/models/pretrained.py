"""Models with trained weights: from a file, a folder, or the Hugging Face hub."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from flax import nnx

from cnnjax.models import init, keras_layers, registry
from cnnjax.models.convert import best_layout, load_weights, read_weights, stored_fields

_HUB = re.compile(r"^(?:hf://|hf-hub:)?([\w.-]+/[\w.-]+)(?:/(.+))?$")
_HUB_FILE = "model.safetensors"


def load_pretrained(
    name: str,
    source: str | os.PathLike[str],
    *,
    rngs: nnx.Rngs | None = None,
    skip: str | Sequence[str] = (),
    **fields: Any,
) -> Any:
    """Creates a model and loads trained weights into it.

    Fields in which the weights' origin differs from our default (say, the zero channels of a CIFAR
    ResNet's shortcuts) are set from the layout that the names reveal, unless given.

    Args:
      name: a registered name.
      source: a weight file (see `read_weights`; also Keras' ``.h5`` and ``.keras``, whose padding
        and epsilons then become the model's), a folder with ``model.safetensors``, or
        ``owner/repository[/file]`` on the Hugging Face hub (needs ``huggingface_hub`` and network;
        default file ``model.safetensors``).
      rngs: random streams of the model; ``nnx.Rngs(0)`` by default.
      skip: globs of the model's paths that stay freshly initialised, e.g. ``"fc/*"`` for another
        number of classes.
      **fields: the configuration's fields, as for `cnnjax.models.create`.

    Returns:
      the model, in evaluation mode.

    Raises:
      ValueError: every mismatch between file and model at once.
      FileNotFoundError: no such file, folder or repository, or no network.
    """
    if pathlib.Path(source).suffix.lower() in (".h5", ".hdf5", ".keras"):
        return _from_keras(name, source, rngs, skip, fields)
    path = pathlib.Path(source)
    if path.is_dir():
        path = path / _HUB_FILE
    elif not path.is_file():
        path = _from_hub(str(source))
    weights = read_weights(path)
    fields = {**stored_fields(path), **fields}
    skip = (skip,) if isinstance(skip, str) else skip

    @functools.cache
    def blank(own: tuple[tuple[str, Any], ...]) -> Any:
        return registry.abstract(name, **{**dict(own), **fields})

    layout, _ = best_layout(blank(()), weights, None, skip, lambda tried: blank(tried.fields))
    fields = {**dict(layout.fields), **fields}
    rngs = rngs if rngs is not None else nnx.Rngs(0)
    with contextlib.nullcontext() if skip else init.without_draws():
        model = registry.create(name, rngs=rngs, **fields)
    load_weights(model, weights, layouts=(layout,), skip=skip)
    model.eval()
    return model


def _from_keras(
    name: str, source: Any, rngs: nnx.Rngs | None, skip: Any, fields: dict[str, Any]
) -> Any:
    if skip:
        raise ValueError("skip= is for PyTorch-layout files; a Keras file is loaded whole")
    base = keras_layers.counterpart(name)
    layers = keras_layers.read_keras(source)
    fields = {**keras_layers.keras_fields(base), **fields}
    with init.without_draws():
        model = registry.create(name, rngs=rngs or nnx.Rngs(0), **fields)
    keras_layers.load_keras(model, layers)
    model.eval()
    return model


def _from_hub(source: str) -> pathlib.Path:
    match = _HUB.match(source)
    missing = f"no weight file {source!r}"
    if match is None or (pathlib.Path(source).suffix and not match.group(2)):
        raise FileNotFoundError(missing)
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise FileNotFoundError(
            f"{missing}; if it's a repository on the Hugging Face hub, `pip install "
            "huggingface_hub` first"
        ) from error
    repository, file = match.group(1), match.group(2) or _HUB_FILE
    try:
        return pathlib.Path(hf_hub_download(repository, file))
    except Exception as error:  # its errors' classes differ from release to release
        raise FileNotFoundError(
            f"{missing}, and {file!r} of {repository!r} can't be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {error})"
        ) from error
