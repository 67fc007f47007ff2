"""Compact feature maps: a network's layers emit fewer channels, a circulant code of their maps.

Unlike a factorization this joins neighbours: a layer's filters become those of the code, and every
layer that reads its maps gets filters that decode on the fly. The result is an ordinary, narrower
network of the same depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import graph as graphs
from cnnjax import surgery
from cnnjax.factorization.circulant import circulant_learn, circulant_matrix
from cnnjax.factorization.rules import Basis
from cnnjax.factorization.sites import (
    Batches,
    Site,
    find_sites,
    images,
    in_evaluation,
    response_moments,
)
from cnnjax.factorization.survey import matched_layers
from cnnjax.tree import glob_match


@dataclasses.dataclass(frozen=True)
class CompactLayer:
    """What became of one layer.

    Attributes:
      path: of the layer.
      channels: (before, after).
      energy: share of the responses' energy in the code, as learned.
      best_energy: what as many principal components would keep.
      decoder_error: relative error of the maps decoded by each reader, by path.
    """

    path: str
    channels: tuple[int, int]
    energy: float
    best_energy: float
    decoder_error: dict[str, float]


def compact_maps(
    model: nnx.Module,
    widths: Mapping[str, int | float],
    batches: Batches,
    *,
    example: Any,
    steps: int = 300,
    restarts: int = 5,
    damping: float = 1e-8,
    key: Any = None,
) -> tuple[nnx.Module, list[CompactLayer]]:
    """A network whose layers emit circulant codes of their feature maps.

    Layer by layer from the input: an orthogonal circulant matrix is learned on the layer's
    responses (behind its BatchNorm), the layer is made to emit the first channels of the code, and
    each layer that reads it gets the kernel of its own composed with the least-squares decoder from
    the maps that now arrive (behind ReLU and pooling) to those of the network before. Fine-tune
    afterwards.

    Args:
      model: any NNX network; untouched.
      widths: ``{path glob: channels that are left}``, a count or a share in (0, 1]; the first match
        counts. Residual streams and other channels that more than one layer writes can't be coded.
      batches: inputs, arrays or mappings with ``"image"``; iterated several times.
      example: an input.
      steps: of learning a code.
      restarts: random starts of it.
      damping: relative ridge of the decoders.
      key: random key; default ``key(0)``.

    Returns:
      (network, what became of each layer).

    Raises:
      ValueError: for a glob that matches no layer, a width out of range (names the maximum), or
        channels that can't be coded (says why).

    Reference:
      Wang, Xu, Xu, Tao, "Beyond filters: compact feature map for portable deep model", ICML 2017.
    """
    if not widths:
        raise ValueError("widths is empty: name at least one glob, e.g. {'conv1': 0.5}")
    key = jax.random.key(0) if key is None else key
    # any rule will do to find the layers that the globs name
    named = [p for p, _, _ in matched_layers(model, dict.fromkeys(widths, Basis()))]
    wanted = {p: next(w for g, w in widths.items() if glob_match(g, p)) for p in named}
    out, done = model, []
    for index, site in enumerate(find_sites(model, list(wanted), example)):
        layer: Any = surgery.module_at(out, site.path)
        width = _width(wanted[site.path], layer.kernel.shape[-1], site.path)
        out, row = _compact(
            out,
            site,
            width,
            batches,
            example,
            jax.random.fold_in(key, index),
            {"steps": steps, "restarts": restarts},
            damping,
        )
        done.append(row)
    return out, done


def _width(width: int | float, channels: int, path: str) -> int:
    if isinstance(width, float):
        if not 0 < width <= 1:
            raise ValueError(f"{path}: width is the share {width}; expected one in (0, 1]")
        return max(1, round(width * channels))
    if not 1 <= width <= channels:
        raise ValueError(f"{path}: width is {width}; expected 1 to {channels}")
    return width


def _compact(
    model: nnx.Module,
    site: Site,
    width: int,
    batches: Batches,
    example: Any,
    key: Any,
    learning: dict[str, int],
    damping: float,
) -> tuple[nnx.Module, CompactLayer]:
    layer: Any = surgery.module_at(model, site.path)
    channels = layer.kernel.shape[-1]
    readers = _readers(model, site, example, channels)
    found = response_moments(model, [site], batches)[site.path]
    mean = np.asarray(found.y_mean, np.float64)
    covariance = np.asarray(found.yy, np.float64) / float(found.count)
    second = covariance + np.outer(mean, mean)
    sign_key, code_key = jax.random.split(key)
    signs = np.where(np.asarray(jax.random.bernoulli(sign_key, 0.5, (channels,))), 1.0, -1.0)
    r, energy = circulant_learn(
        code_key, second.astype(np.float32), width, signs=signs.astype(np.float32), **learning
    )
    code = np.asarray(circulant_matrix(r), np.float64)[:width] * signs
    values = _coded(model, site, code, mean, covariance)
    narrow = {path: 0 * _narrowed(kernel, np.ones((channels, width))) for path, kernel in readers}
    coded = surgery.rebuild(model, {**values, **narrow}, why="compact maps")
    products = _products(model, coded, [p.rsplit("/", 1)[0] for p, _ in readers], batches, channels)
    decoded, errors = {}, {}
    for path, kernel in readers:
        name = path.rsplit("/", 1)[0]
        zz, yz, yy = (np.asarray(a, np.float64) for a in products[name])
        inner = zz + damping * np.trace(zz) / width * np.eye(width)
        decoder = np.linalg.solve(inner, yz.T).T  # (channels, width)
        lost = yy - 2 * np.sum(decoder * yz) + np.sum((decoder @ zz) * decoder)
        errors[name] = float(np.sqrt(max(lost, 0.0) / max(float(yy), 1e-30)))
        decoded[path] = _narrowed(kernel, decoder)
    best = np.linalg.eigvalsh(second)[::-1]
    row = CompactLayer(
        site.path,
        (channels, width),
        float(energy),
        float(best[:width].sum() / max(best.sum(), 1e-30)),
        errors,
    )
    return surgery.fill(coded, decoded), row


def _readers(
    model: nnx.Module, site: Site, example: Any, channels: int
) -> list[tuple[str, jax.Array]]:
    """(path, kernel) of every kernel that reads the layer's channels; raises if others do."""
    examples = example if isinstance(example, tuple) else (example,)
    read = graphs.trace(model, *examples)
    kernel = f"{site.path}/kernel"
    own = read.axis(kernel, -1)
    where = f"{site.path}: its {channels} channels can't be coded"
    if (own.labels < 0).any():
        raise ValueError(f"{where}: they are fixed, {own.reason}")
    leaves = surgery.leaves(model)
    mine = (f"{site.path}/", f"{site.norm}/" if site.norm else f"{site.path}/")
    out = []
    for (path, axis), found in read.axes.items():
        labels = found.labels if found.table is None else found.table
        if not np.isin(own.atoms, labels).any() or (path == kernel and axis == own.axis):
            continue
        if path.startswith(mine) and not found.consumer:
            continue
        inputs = found.consumer and found.table is None and path.endswith("/kernel")
        if not inputs or axis != len(read.shapes[path]) - 2:
            raise ValueError(f"{where}: {path} (axis {axis}) goes along with them")
        if not (labels == np.resize(own.labels, len(labels))).all():
            raise ValueError(f"{where}: {path} reads them in another order, or others beside them")
        out.append((path, leaves[path]))
    if not out:
        raise ValueError(f"{where}: no kernel reads them")
    return out


def _narrowed(kernel: Any, decoder: np.ndarray) -> jax.Array:
    """A reader's kernel behind a decoder (channels, width); flattened maps place by place."""
    k = np.asarray(kernel, np.float64)
    channels, width = decoder.shape
    parts = k.reshape(*k.shape[:-2], -1, channels, k.shape[-1])
    made = np.einsum("...mcp,ck->...mkp", parts, decoder)
    return jnp.asarray(made.reshape(*k.shape[:-2], -1, k.shape[-1]), kernel.dtype)


def _coded(
    model: nnx.Module, site: Site, code: np.ndarray, mean: np.ndarray, covariance: np.ndarray
) -> dict[str, jax.Array]:
    """The leaves of a layer (and of its BatchNorm) that make it emit the code of its responses."""
    layer: Any = surgery.module_at(model, site.path)
    kernel = np.asarray(layer.kernel[...], np.float64)
    bias = np.zeros(kernel.shape[-1]) if layer.bias is None else np.asarray(layer.bias[...])
    dtype = layer.kernel.dtype
    if getattr(layer, "feature_group_count", 1) != 1:
        raise ValueError(f"{site.path}: grouped convolutions can't be coded")
    if site.norm is None:
        values = {f"{site.path}/kernel": kernel @ code.T}
        if layer.bias is not None:
            values[f"{site.path}/bias"] = code @ bias
        return {p: jnp.asarray(v, dtype) for p, v in values.items()}
    norm: Any = surgery.module_at(model, site.norm)
    old = {k: np.asarray(getattr(norm, k)[...], np.float64) for k in ("mean", "var", "scale")}
    gain = old["scale"] / np.sqrt(old["var"] + norm.epsilon)
    shift = np.asarray(norm.bias[...], np.float64) + gain * (bias - old["mean"])
    # the BatchNorm becomes the identity plus the code's shift, in training as in evaluation
    centre, spread = code @ (mean - shift), np.einsum("kc,cd,kd->k", code, covariance, code)
    values = {
        f"{site.path}/kernel": kernel * gain @ code.T,
        f"{site.norm}/mean": centre,
        f"{site.norm}/var": np.maximum(spread, 0.0),
        f"{site.norm}/scale": np.sqrt(np.maximum(spread, 0.0) + norm.epsilon),
        f"{site.norm}/bias": centre + code @ shift,
    }
    if layer.bias is not None:
        values[f"{site.path}/bias"] = np.zeros(len(code))
    return {p: jnp.asarray(v, dtype) for p, v in values.items()}


def _products(
    model: nnx.Module, coded: nnx.Module, readers: list[str], batches: Batches, channels: int
) -> dict[str, tuple[Any, Any, Any]]:
    """Sums of z z^T, y z^T and y^T y over the readers' inputs, before (y) and coded (z)."""
    taps = dict.fromkeys(readers, "input")
    (first, state), (second, other) = (nnx.split(in_evaluation(m)) for m in (model, coded))

    @jax.jit
    def sums(state: Any, other: Any, x: Any) -> Any:
        y = graphs.capture(nnx.merge(first, state, copy=True), taps)(x)[1]
        z = graphs.capture(nnx.merge(second, other, copy=True), taps)(x)[1]
        out = {}
        for path in readers:
            width = channels * z[path].shape[-1] // y[path].shape[-1]
            a, b = y[path].reshape(-1, channels), z[path].reshape(-1, width)
            multiply = lambda p, q: jnp.matmul(p.T, q, precision="highest")  # noqa: E731
            out[path] = (multiply(b, b), multiply(a, b), jnp.sum(a * a))
        return out

    total: Any = None
    for x in images(batches):
        more = sums(state, other, x)
        total = more if total is None else jax.tree.map(jnp.add, total, more)
    return total
