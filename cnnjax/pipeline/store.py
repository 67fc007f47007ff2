"""Stage results on the disk: arrays and mask of a network, appearing by one rename."""

from __future__ import annotations

import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax import tree
from cnnjax.pipeline.registry import Carry


def save(folder: pathlib.Path, network: Carry) -> None:
    """Writes the network's arrays (random-number state apart) and its mask."""
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    np.savez(temporary / "arrays.npz", **_arrays(network.model))
    if network.mask is not None:
        flat = {k: np.asarray(v) for k, v in tree.flatten(jax.device_get(network.mask)).items()}
        packed: dict[str, Any] = {k: np.packbits(v) for k, v in flat.items()}
        np.savez(temporary / "mask.npz", **packed)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def load(folder: pathlib.Path, like: Carry) -> Carry:
    """The saved network in the structure of ``like``.

    Raises:
      ValueError: the arrays do not fit the structure.
    """
    with np.load(folder / "arrays.npz") as file:
        stored = dict(file)
    expected = _arrays(like.model)
    tree.check_same_structure(expected, stored, what=f"network saved in {folder}", of="model")
    graphdef, rngs, rest = nnx.split(like.model, nnx.RngState, ...)
    pure = tree.map_with_path(
        lambda path, old: jax.numpy.asarray(stored[path], old.dtype), nnx.to_pure_dict(rest)
    )
    nnx.replace_by_pure_dict(rest, pure)
    model = nnx.merge(graphdef, rngs, rest, copy=True)
    mask = None
    if (folder / "mask.npz").exists():
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        with np.load(folder / "mask.npz") as file:
            packed = dict(file)
        mask = tree.map_with_path(
            lambda path, w: np.unpackbits(packed[path], count=w.size).astype(bool).reshape(w.shape),
            params,
        )
    return Carry(model, mask, like.extras)


def _arrays(model: Any) -> dict[str, Any]:
    _, _, rest = nnx.split(model, nnx.RngState, ...)
    return {k: np.asarray(v) for k, v in tree.flatten(nnx.to_pure_dict(rest)).items()}
