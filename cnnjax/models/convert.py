"""Weights of other frameworks in PyTorch's layout and naming, into a model of the registry.

A convolution's kernel is OIHW there and HWIO here, a dense one is transposed, and the rows of a
dense layer that reads a flattened map change from (c, h, w) to (h, w, c) order.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import files, tree
from cnnjax.models import keymaps, registry

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


@dataclasses.dataclass(frozen=True)
class _Target:
    """One array of the model: its path and the names that it takes in the file (many: stacked)."""

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    flattened: tuple[int, int, int] | None


_FIELDS = "__fields__"  # in an .npz file, beside the arrays: JSON


def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Arrays of a weight file by name: ``.npz``, ``.safetensors`` or PyTorch's ``.pth``/``.pt``.

    PyTorch files are read with ``weights_only=True`` (no arbitrary pickles) and need torch,
    ``.safetensors`` needs safetensors. Prefixes ``module.`` and counters ``num_batches_tracked``
    are dropped, and so is what `save_weights` says about the network.

    Raises:
      ValueError: unknown suffix, or not a weight file.
      FileNotFoundError: no such file.
      ImportError: the format's package is absent.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays: Mapping[str, Any] = {k: file[k] for k in file.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{str(path)!r} is not a readable .npz file: {error}") from error
    elif suffix == ".safetensors":
        arrays = _read_safetensors(path)
    elif suffix in (".pth", ".pt", ".bin"):
        arrays = _read_torch(path)
    else:
        raise ValueError(
            f"can't tell the format of {str(path)!r}: the suffix must be .npz, .safetensors, "
            ".pth, .pt or .bin"
        )
    return {
        name.removeprefix("module."): np.asarray(array)
        for name, array in arrays.items()
        if not name.endswith("num_batches_tracked") and name != _FIELDS
    }


def stored_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration fields that `save_weights` wrote into a file; {} for any other file."""
    path = pathlib.Path(path)
    if path.suffix.lower() != ".npz":
        return {}
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file[_FIELDS])) if _FIELDS in file.files else {}


def save_weights(path: str | os.PathLike[str], model: Any) -> int:
    """Writes a model's parameters and statistics, and in which fields it differs from its name.

    `cnnjax.models.load_pretrained` reads the file back: padding, epsilons and the like, which came
    with weights of another library, are part of the network.

    Args:
      path: of the ``.npz`` file; by way of a temporary file beside it and a rename.
      model: of the registry.

    Returns:
      the number of arrays, by path (``layer1/0/conv1/kernel``), kernels HWIO.
    """
    arrays = tree.flatten(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    plain, config = registry.config(model.provenance.name), model.config
    fields = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(plain, f.name)
    }
    named: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in arrays.items()}
    named[_FIELDS] = np.asarray(json.dumps(fields, default=lambda v: v.item()))  # NumPy's numbers
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **named)
    return len(arrays)


def _read_safetensors(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        import safetensors.numpy as safetensors  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("reading .safetensors needs `pip install safetensors`") from error
    return safetensors.load_file(path)


def _read_torch(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs torch; or convert it to .safetensors where torch is"
        ) from error
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(loaded).__name__}, not named weights")
    return {k: v.numpy() for k, v in loaded.items() if hasattr(v, "numpy")}


def _targets(model: Any, rules: keymaps.Rules) -> list[_Target]:
    flattened = dict(getattr(model, "flattened", ()))
    out = []
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    for path, leaf in tree.flatten(state).items():
        module, _, last = path.rpartition("/")
        if last not in _LEAVES:
            raise ValueError(f"{path}: no PyTorch name for an array called {last!r}")
        dotted = [module.replace("/", ".")]
        stacked = re.search(r"(.*\.)(\d+)\.repeated\.(.*)", dotted[0])
        if stacked:
            # repeated blocks are one stacked array here and numbered modules there
            head, first, rest = stacked.groups()
            dotted = [f"{head}{int(first) + i}.{rest}" for i in range(leaf.shape[0])]
        names = tuple(f"{keymaps.apply(rules, d)}.{_LEAVES[last]}" for d in dotted)
        shape = tuple(leaf.shape[1:] if stacked else leaf.shape)
        out.append(_Target(path, names, shape, flattened.get(module)))
    return out


def _layout(array: np.ndarray, target: _Target) -> np.ndarray | None:
    """The array in this library's layout, or None if its shape can't be it."""
    want = target.shape
    if len(want) == 4:
        h, w, i, o = want
        if array.ndim == 2 and array.shape == (o, i * h * w):
            array = array.reshape(o, i, h, w)
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
    elif len(want) == 2:
        if array.ndim == 4:  # a dense layer kept as a convolution over the whole map
            array = array.reshape(array.shape[0], -1)
        if array.ndim == 2:
            array = array.T
            if target.flattened and array.shape == want:
                h, w, c = target.flattened
                array = array.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(want)
    return array if array.shape == want else None


def _fused(
    model: Any, target: _Target, weights: Mapping[str, np.ndarray], claimed: set[str]
) -> tuple[np.ndarray, str] | None:
    """Values of a batch norm that the file has fused into the convolution before it.

    With mean 0 and variance 1 - epsilon it adds the fused bias and changes nothing else. Where the
    model's convolution has a bias of its own (``claimed``), that one takes the fused bias.
    """
    module, _, leaf = target.path.rpartition("/")
    prefix = target.names[0].rpartition(".")[0]
    bias_name = keymaps.fused_bias(prefix)
    if bias_name is None or bias_name not in weights or f"{prefix}.weight" in weights:
        return None
    bias = weights[bias_name]
    if bias.shape != target.shape:
        return None
    epsilon = _module(model, module).epsilon
    if bias_name in claimed:
        bias = np.zeros_like(bias)
    value = {"bias": bias, "mean": 0.0, "scale": 1.0, "var": 1.0 - epsilon}[leaf]
    return np.broadcast_to(np.asarray(value, np.float32), target.shape), bias_name


def _module(model: Any, path: str) -> Any:
    for part in path.split("/"):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def _is_own(weights: Mapping[str, Any]) -> bool:
    """Whether the names are our paths: PyTorch's have dots."""
    return any("/" in name for name in weights)


def _match_own(
    model: Any, weights: Mapping[str, np.ndarray], skip: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    state = tree.flatten(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    wanted = {p: tuple(v.shape) for p, v in state.items() if not tree.match_any(skip, p)}
    problems = [f"missing in the file: {p}" for p in wanted if p not in weights]
    problems += [f"not in the model: {n} {weights[n].shape}" for n in weights if n not in state]
    problems += [
        f"{p}: shape {weights[p].shape} doesn't fit {shape}"
        for p, shape in wanted.items()
        if p in weights and weights[p].shape != shape
    ]
    return {p: weights[p] for p in wanted if p in weights}, problems


def _match(
    model: Any, weights: Mapping[str, np.ndarray], rules: keymaps.Rules, skip: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    if _is_own(weights):
        return _match_own(model, weights, skip)
    arrays: dict[str, np.ndarray] = {}
    problems: list[str] = []
    used: set[str] = set()
    targets = _targets(model, rules)
    claimed = {name for target in targets for name in target.names}
    for target in targets:
        used.update(target.names)
        if tree.match_any(skip, target.path):
            continue
        absent = [n for n in target.names if n not in weights]
        if absent:
            fused = _fused(model, target, weights, claimed)
            if fused is not None:
                arrays[target.path] = fused[0]
                used.add(fused[1])
                continue
            problems += [f"missing in the file: {n} (for {target.path})" for n in absent]
            continue
        parts = [_layout(weights[n], target) for n in target.names]
        wrong = [n for n, part in zip(target.names, parts, strict=True) if part is None]
        if wrong:
            problems += [
                f"{n}: shape {weights[n].shape} doesn't fit {target.path} {target.shape}"
                for n in wrong
            ]
            continue
        stacked = "/repeated/" in target.path
        arrays[target.path] = np.stack(parts) if stacked else parts[0]  # type: ignore[arg-type]
    problems += [f"not in the model: {n} {weights[n].shape}" for n in weights if n not in used]
    return arrays, problems


def best_layout(
    model: Any,
    weights: Mapping[str, np.ndarray],
    layouts: Sequence[keymaps.Layout] | None,
    skip: Sequence[str],
    variant: Callable[[keymaps.Layout], Any] | None = None,
) -> tuple[keymaps.Layout, dict[str, np.ndarray]]:
    """The naming layout that fits, and the arrays by the model's paths; all mismatches if none.

    ``variant`` gives the model that a layout is tried on; the model itself by default.
    """
    name = model.provenance.name if model.provenance is not None else ""
    layouts = (keymaps.Layout(),) if _is_own(weights) else layouts or keymaps.layouts_of(name)
    variant = variant or (lambda layout: model)
    tried = [(layout, *_match(variant(layout), weights, layout.rules, skip)) for layout in layouts]
    layout, arrays, problems = min(tried, key=lambda t: len(t[2]))
    if problems:
        shown = "\n  ".join(problems[:40])
        more = f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
        what = f"model {name!r}" if name else "the model"
        raise ValueError(
            f"the weights don't fit {what}: {len(problems)} mismatches\n  {shown}{more}"
        )
    return layout, arrays


def load_weights(
    model: Any,
    weights: Mapping[str, np.ndarray],
    *,
    layouts: Sequence[keymaps.Layout] | None = None,
    skip: str | Sequence[str] = (),
) -> None:
    """Sets a model's parameters and statistics from PyTorch-layout arrays, in place.

    Args:
      model: a model of the registry.
      weights: arrays by PyTorch name, or by our path in our layout (`save_weights`).
      layouts: naming layouts to try, see `cnnjax.models.keymaps`; by default those of the model.
      skip: globs of the model's paths to leave as they are, e.g. ``"fc/*"``.

    Raises:
      ValueError: lists every missing, superfluous and misshapen array, or names the field in which
        the port that the weights come from differs; the model is unchanged.
    """
    layout, arrays = best_layout(
        model, weights, layouts, (skip,) if isinstance(skip, str) else skip
    )
    for field, value in layout.fields:
        if getattr(model.config, field) != value:
            raise ValueError(
                f"these weights need {field}={value!r}, the model has "
                f"{getattr(model.config, field)!r}; create it so, or use load_pretrained"
            )
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    # np.array copies: JAX must not alias memory that the caller may change
    new = tree.map_with_path(
        lambda path, leaf: (
            jnp.asarray(np.array(arrays[path]), leaf.dtype) if path in arrays else leaf
        ),
        state,
    )
    nnx.update(model, new)
