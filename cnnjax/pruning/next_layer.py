"""Data-driven channel pruning of a whole model: scores and least squares from the next layers.

    scores = pruning.next_layer_scores(model, graph, batches, method="lasso", ratio=0.5)
    keep = pruning.select_channels(graph, scores, ratio=0.5)
    small = pruning.shrink(model, graph, keep)
    small = pruning.reconstruct(model, small, graph, keep, batches)

Which layers read which channels, through shortcuts, concatenations, flattening and conv-groups, is
the graph's knowledge; activations are captured inside one jitted function for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import tree
from cnnjax.errors import did_you_mean
from cnnjax.graph import Graph, Layer, trace
from cnnjax.graph.capture import capture
from cnnjax.pruning import reconstruction as rec
from cnnjax.pruning.keep import Keep
from cnnjax.pruning.shrink import cut

METHODS = ("lasso", "thinet")


def next_layer_scores(
    model: nnx.Module,
    graph: Graph,
    batches: Sequence[Any],
    *,
    method: str = "lasso",
    ratio: float = 0.5,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
) -> dict[str, Any]:
    """Scores of channels from how well the layers that read them do without them.

    ``lasso``: ``|beta_i| * ||Z_i||`` at the strength that leaves ``1 - ratio`` of the channels (He
    et al. 2017); ``thinet``: place in the greedy order of removal (Luo et al. 2017). Channels that
    several layers read (a residual stream) get the mean of what those say.

    Args:
      model: the network, in evaluation mode.
      graph: of the model.
      batches: inputs, reused for every layer, so no one-pass iterator; no labels are needed.
      method: one of `METHODS`.
      ratio: fraction of channels to be removed, in [0, 1); the lasso aims at it.
      include: globs of the paths of the *reading* layers.
      exclude: globs of such paths.

    Returns:
      ``{path of a producing variable: one score per channel}`` for `select_channels`.

    Raises:
      ValueError: unknown method, a ratio out of range, globs without a match, no layer that reads
        prunable channels.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}.{did_you_mean(method, METHODS)}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the fraction of channels to remove, in [0, 1), got {ratio}")
    readers = [
        layer
        for layer in graph.layers
        if _supported(layer) and layer.in_labels is not None and (layer.in_labels >= 0).any()
    ]
    paths = [layer.path for layer in readers]
    if not paths:
        raise ValueError("no layer reads channels that can be pruned")
    tree.check_patterns(include, paths, what="layer")
    tree.check_patterns(exclude, paths, what="layer")
    said = np.zeros(graph.num_atoms)
    votes = np.zeros(graph.num_atoms)
    for layer in readers:
        if not tree.match_any(include, layer.path) or tree.match_any(exclude, layer.path):
            continue
        atoms, values = _scores_of(model, layer, batches, method, ratio)
        np.add.at(said, atoms, values / max(values.max(), 1e-30))
        np.add.at(votes, atoms, 1)
    mean = said / np.maximum(votes, 1)
    out = {}
    for group in graph.groups:
        if not votes[group.atoms].all():
            continue
        for path, axis in group.producers:
            if path in out or len(graph.shapes[path]) < 2 or axis != len(graph.shapes[path]) - 1:
                continue
            labels = graph.axes[path, axis].labels
            scored = (labels >= 0) & (votes[np.maximum(labels, 0)] > 0)
            # channels that nothing was said about stay first
            out[path] = np.where(scored, mean[np.maximum(labels, 0)], mean.max())
    return out


def _scores_of(
    model: nnx.Module, layer: Layer, batches: Sequence[Any], method: str, ratio: float
) -> tuple[np.ndarray, np.ndarray]:
    """(atoms, scores) of one reading layer's input channels."""
    moments = collect(model, model, layer, layer, batches)
    kernel = _kernel(model, layer)
    labels = np.asarray(layer.in_labels)
    atoms, ids = np.unique(labels[labels >= 0], return_inverse=True)
    channel = np.full(len(labels), -1)
    channel[labels >= 0] = ids
    q = jnp.zeros(len(atoms))
    gram = jnp.zeros((len(atoms), len(atoms)))
    for part, rows, mine in zip(moments, _lowered(kernel, layer.groups), _columns(layer, channel)):
        g, v = rec.interaction(part, rows, mine, len(atoms))
        gram, q = gram + g, q + v
    if method == "thinet":
        order = np.asarray(rec.thinet_order(gram))
        scores = np.empty(len(atoms))
        scores[order] = np.arange(1, len(atoms) + 1)
        return atoms, scores
    gone = math.ceil(Fraction(repr(float(ratio))) * len(atoms))
    beta = np.asarray(rec.lasso_select(gram, q, max(1, len(atoms) - gone)))
    size = np.sqrt(np.maximum(np.asarray(jnp.diagonal(gram)), 0))
    # channels that the lasso dropped are ranked by their size, below all that it kept
    kept, dropped = np.abs(beta) * size, size * (beta == 0)
    floor = kept[kept > 0].min(initial=np.inf)
    floor = floor if np.isfinite(floor) else 1.0
    return atoms, kept + 0.5 * floor * dropped / max(dropped.max(), 1e-30)


def reconstruct(
    model: nnx.Module,
    small: nnx.Module,
    graph: Graph,
    keep: Keep | np.ndarray,
    batches: Sequence[Any],
    *,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    shortcuts: Mapping[str, tuple[str, str]] | None = None,
    ridge: float = 1e-6,
) -> Any:
    """Refits every layer that lost input channels, from the first to the last.

    Inputs come from the pruned network as it is by then, targets from the original network, so that
    errors don't accumulate. Kernel and bias are the least-squares optimum.

    Args:
      model: the original, in evaluation mode.
      small: from `shrink`, in evaluation mode; untouched.
      graph: of the original.
      keep: the decision.
      batches: inputs, reused for every layer, so no one-pass iterator.
      include: globs of the layers' paths to refit.
      exclude: globs of such paths.
      shortcuts: ``{layer: (module, "input" or "output")}``: for the last layer of a residual branch
        the module that carries the shortcut's value; the target then also makes up for its error
        (He et al.: ``Y_1 - Y_1' + Y_2``).
      ridge: see `reconstruction.least_squares`.

    Returns:
      A new module.

    Raises:
      ValueError: nothing to refit; too few samples (says how many are missing).
    """
    alive = np.asarray(keep.alive if isinstance(keep, Keep) else keep, bool)
    index = cut(model, graph, alive).index
    now = {layer.path: layer for layer in trace(small, *graph.inputs).layers if layer.path}
    chosen = [
        layer
        for layer in graph.layers
        if _supported(layer)
        and layer.call == 0
        and len(layer.kernel_shape) - 2 in _cut(index, layer)
    ]
    if not chosen:
        raise ValueError("nothing to refit: no layer lost input channels")
    paths = [layer.path for layer in chosen]
    tree.check_patterns(include, paths, what="layer")
    tree.check_patterns(exclude, paths, what="layer")
    graphdef, state = nnx.split(small)
    out = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    for layer in chosen:
        if not tree.match_any(include, layer.path) or tree.match_any(exclude, layer.path):
            continue
        kept = _cut(index, layer).get(len(layer.kernel_shape) - 1)
        short = (shortcuts or {}).get(layer.path)
        new = now[layer.path]
        module = _module(out, layer.path)
        bias = getattr(module, "bias", None) is not None
        moments = collect(model, out, layer, new, batches, kept=kept, bias=bias, shortcut=short)
        fits = [rec.least_squares(m, ridge=ridge) for m in moments]
        biases = [f[-1] for f in fits]
        fits = [f[:-1] if bias else f for f in fits]
        shape = module.kernel[...].shape
        kernel = jnp.concatenate([f.reshape(*shape[:-1], -1) for f in fits], axis=-1)
        module.kernel[...] = kernel.astype(module.kernel[...].dtype)
        if bias:
            module.bias[...] = jnp.concatenate(biases).astype(module.bias[...].dtype)
    return out


def collect(
    model: nnx.Module,
    small: nnx.Module,
    layer: Layer,
    new: Layer,
    batches: Iterable[Any],
    *,
    kept: Any = None,
    bias: bool = False,
    shortcut: tuple[str, str] | None = None,
) -> list[rec.Moments]:
    """Moments of one layer, for each conv-group: inputs of ``small``, outputs of ``model``.

    Args:
      model: the original.
      small: the network whose inputs are taken (may be the original).
      layer: of the original's graph.
      new: the same layer of the small network's graph.
      batches: inputs; streamed.
      kept: output channels that the small layer has left; None: all.
      bias: add a column of ones (else the original's bias is taken from the outputs).
      shortcut: see `reconstruct`.

    Raises:
      ValueError: no batch, an empty one, or values that are not finite.
    """
    origin = {layer.path: "output"}
    current = {layer.path: "input"}
    if shortcut is not None:
        origin[shortcut[0]] = current[shortcut[0]] = shortcut[1]
    arrays = nnx.split(model), nnx.split(small)
    own = getattr(_module(model, layer.path), "bias", None)
    constant = None if own is None or bias else own[...]

    @jax.jit
    def add(states: Any, moments: Any, batch: Any) -> Any:
        big, little = (nnx.merge(g, s) for (g, _), s in zip(arrays, states))
        _, target = capture(big, origin)(batch)
        _, given = capture(little, current)(batch)
        y, x = target[layer.path], given[layer.path]
        if constant is not None:
            y = y - constant
        if kept is not None:
            y = jnp.take(y, jnp.asarray(kept), axis=-1)
        if shortcut is not None:
            gap = target[shortcut[0]]
            gap = gap if kept is None else jnp.take(gap, jnp.asarray(kept), axis=-1)
            y = y + gap - given[shortcut[0]]
        groups = new.groups
        xs = jnp.split(x, groups, axis=-1)
        ys = jnp.split(y.reshape(-1, y.shape[-1]), groups, axis=-1)
        out = []
        for i, (a, b) in enumerate(zip(xs, ys)):
            if new.kind == "dense":
                rows = a.reshape(-1, a.shape[-1])
            else:
                rows = rec.patches(
                    a,
                    new.kernel_shape[:-2],
                    strides=new.stride,
                    padding=new.padding,
                    dilation=new.dilation,
                )
            if bias:
                rows = jnp.concatenate([rows, jnp.ones((rows.shape[0], 1), rows.dtype)], axis=1)
            part = rec.Moments.zeros(rows.shape[1], b.shape[1]) if moments is None else moments[i]
            out.append(part.add(rows, b))
        return out

    moments = None
    states = tuple(s for _, s in arrays)
    for batch in batches:
        if any(0 in np.shape(x) for x in jax.tree.leaves(batch)):
            shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
            raise ValueError(f"a batch of shapes {shapes} holds nothing: give one image at least")
        moments = add(states, moments, batch)
    if moments is None:
        raise ValueError("no batch to collect activations from")
    # a sum that holds a NaN or an infinity stays so
    if not all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(moments)):
        raise ValueError(
            f"what {layer.path!r} reads or computes is not finite: look for NaN or infinity in the "
            "batches and the parameters"
        )
    return moments


def _supported(layer: Layer) -> bool:
    if layer.kernel is None or layer.kind not in ("conv", "dense"):
        return False
    return (layer.kind == "dense" and len(layer.kernel_shape) == 2) or len(layer.kernel_shape) == 4


def _cut(index: Mapping[str, Any], layer: Layer) -> Mapping[int, Any]:
    return index.get(str(layer.kernel), {})


def _module(model: nnx.Module, path: str) -> Any:
    for keys, module in nnx.iter_modules(model):
        if "/".join(map(str, keys)) == path:
            return module
    raise KeyError(f"no module {path!r}")


def _kernel(model: nnx.Module, layer: Layer) -> Any:
    return _module(model, layer.path).kernel[...]


def _lowered(kernel: Any, groups: int) -> list[Any]:
    """(rows, outputs) of each conv-group."""
    rows = kernel.reshape(-1, kernel.shape[-1])
    return jnp.split(rows, groups, axis=1)


def _columns(layer: Layer, channel: np.ndarray) -> list[np.ndarray]:
    """The channel of every patch column, for each conv-group."""
    window = math.prod(layer.kernel_shape[:-2])
    return [np.tile(part, window) for part in np.split(channel, layer.groups)]
