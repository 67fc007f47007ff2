"""Scores from gradients: one pass over the data gives any set of them together.

What the pass needs is ``loss(params, example) -> scalar`` of one example; gradients are taken for
each example and squared (or made absolute) before they are averaged. A *gate* is a virtual factor 1
on everything that makes an output channel: its filter, bias, and for a normalization its scale and
shift. Under ReLU without normalization in between the gate's gradient is the paper's
``sum_ij a_ij dL/da_ij`` of the feature map. Before a BatchNorm a kernel's gate is 0 (its scale does
not matter) and the map's gate is that of the normalization's scale and shift: let `select_channels`
combine them by ``reduce="sum"``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax import tree
from cnnjax.errors import did_you_mean
from cnnjax.pruning.importance.registry import register

PyTree = Any
Loss = Callable[[PyTree, Any], Any]
STATISTICS = ("gradient", "square", "taylor", "gate_square", "gate_taylor")


def gradient_statistics(
    params: PyTree,
    loss: Loss,
    batches: Iterable[Any],
    want: Iterable[str] = STATISTICS,
    *,
    chunk: int = 16,
) -> dict[str, PyTree]:
    """Means over all examples, in one jitted pass; the batches are streamed.

    Args:
      params: any Flax tree.
      loss: ``(params, example) -> scalar`` for one example (no batch axis).
      batches: pytrees with a leading axis of examples; use one size, each new one compiles.
      want: of ``gradient`` (mean g), ``square`` (mean g^2), ``taylor`` (mean |w g|), and per output
        channel ``gate_square`` (mean s^2) and ``gate_taylor`` (mean |s|) with ``s`` the gate's
        gradient: the sum of ``w g`` over the channel's weights.
      chunk: examples whose gradients are held at once.

    Returns:
      ``{name: {path: array}}``; gates have a kernel's or a scale's path and one number a channel.

    Raises:
      ValueError: an unknown statistic, or no example.
    """
    want = tuple(want)
    for name in want:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}.{did_you_mean(name, STATISTICS)}")
    total, count = None, 0
    for batch in batches:
        count += jax.tree.leaves(batch)[0].shape[0]
        new = sums(params, batch, loss, want, chunk)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    if total is None or not count:
        raise ValueError("no example: the batches are empty")
    return jax.tree.map(lambda x: x / count, total)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def sums(params: PyTree, batch: Any, loss: Loss, want: tuple[str, ...], chunk: int) -> Any:
    """The jitted part of `gradient_statistics`: sums over a batch."""
    flat = tree.flatten(params)

    def one(example: Any) -> Any:
        grads = tree.flatten(jax.grad(loss)(params, example))
        product = {p: flat[p] * g for p, g in grads.items()}
        gates = _gates(product) if {"gate_square", "gate_taylor"} & set(want) else {}
        parts = {
            "gradient": grads,
            "square": {p: jnp.square(g) for p, g in grads.items()},
            "taylor": {p: jnp.abs(x) for p, x in product.items()},
            "gate_square": {p: jnp.square(s) for p, s in gates.items()},
            "gate_taylor": {p: jnp.abs(s) for p, s in gates.items()},
        }
        return {name: parts[name] for name in want}

    n = jax.tree.leaves(batch)[0].shape[0]
    size = min(chunk, n)
    whole = n // size * size
    head = jax.tree.map(lambda a: a[:whole].reshape(n // size, size, *a.shape[1:]), batch)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        new = jax.vmap(one)(part)
        return jax.tree.map(lambda t, x: t + jnp.sum(x, axis=0), total, new), None

    example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batch)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, example))
    total, _ = jax.lax.scan(add, zeros, head)
    if whole < n:
        total, _ = add(total, jax.tree.map(lambda a: a[whole:], batch))
    return total


def _gates(product: Mapping[str, Any]) -> dict[str, Any]:
    """Sums over each output channel; a bias joins the kernel or scale beside it."""
    out = {}
    for path, x in product.items():
        parent, _, name = path.rpartition("/")
        if x.ndim < 2 and name != "scale":
            continue
        s = jnp.sum(x, axis=tuple(range(x.ndim - 1)))
        bias = product.get(f"{parent}/bias" if parent else "bias")
        out[path] = s + bias if bias is not None and bias.shape == s.shape else s
    return out


@register("taylor")
def taylor(params: PyTree, loss: Loss, batches: Iterable[Any], *, chunk: int = 16) -> PyTree:
    """First-order Taylor score of each output channel: mean of ``|sum w dL/dw|`` over examples.

    Molchanov, Tyree, Karras, Aila, Kautz, "Pruning convolutional neural networks for resource
    efficient inference", ICLR 2017, arXiv 1611.06440.

    Args:
      params: any Flax tree.
      loss: of one example, see `gradient_statistics`.
      batches: see `gradient_statistics`.
      chunk: examples whose gradients are held at once.

    Returns:
      ``{path: (o,)}`` nested, for kernels and normalization scales.
    """
    found = gradient_statistics(params, loss, batches, ("gate_taylor",), chunk=chunk)
    return score("taylor", params, found["gate_taylor"])


@register("fisher")
def fisher(
    params: PyTree,
    loss: Loss,
    batches: Iterable[Any],
    *,
    costs: Mapping[str, Any] | None = None,
    chunk: int = 16,
) -> PyTree:
    """Fisher pruning of feature maps: ``Delta_k = 1/(2N) sum_n g_nk^2``, the loss it would cost.

    Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense networks and Fisher
    pruning", arXiv 1801.05787.

    Args:
      params: any Flax tree.
      loss: negative log likelihood of one example, see `gradient_statistics`.
      batches: see `gradient_statistics`.
      costs: ``{path: saved MACs per channel}`` (a number or one per channel): the score becomes the
        damage per saved MAC; paths left out get no score.
      chunk: examples whose gradients are held at once.

    Returns:
      ``{path: (o,)}`` nested, for kernels and normalization scales.

    Raises:
      KeyError: costs of a path that has no gate.
      ValueError: costs that are not positive.
    """
    found = gradient_statistics(params, loss, batches, ("gate_square",), chunk=chunk)
    scores = {p: 0.5 * s for p, s in found["gate_square"].items()}
    return tree.nest(scores if costs is None else per_cost(scores, costs))


@register("fisher_weight")
def fisher_weight(params: PyTree, loss: Loss, batches: Iterable[Any], *, chunk: int = 16) -> PyTree:
    """``w^2 / (2N) sum_n (dL_n/dw)^2`` of every weight (Theis et al.; OBD by empirical Fisher)."""
    found = gradient_statistics(params, loss, batches, ("square",), chunk=chunk)["square"]
    return score("fisher_weight", params, found)


def score(name: str, params: PyTree, mean: Mapping[str, Any]) -> PyTree:
    """``taylor``, ``fisher`` or ``fisher_weight`` from the mean of its statistic."""
    if name == "taylor":
        return tree.nest(dict(mean))
    if name == "fisher":
        return tree.nest({p: 0.5 * s for p, s in mean.items()})
    flat = tree.flatten(params)
    return tree.nest(
        {p: 0.5 * jnp.square(flat[p]) * h for p, h in mean.items() if jnp.ndim(h) >= 2}
    )


def per_cost(scores: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, Any]:
    """Scores divided by what removing a channel saves.

    Raises:
      KeyError: costs of a path without a score.
      ValueError: costs that are not positive.
    """
    out = {}
    for path, cost in costs.items():
        if path not in scores:
            raise KeyError(f"no score of {path!r} to divide.{did_you_mean(path, scores)}")
        cost = jnp.asarray(cost, jnp.float32)
        if not bool(jnp.all(cost > 0)):
            raise ValueError(f"the cost of {path} must be positive")
        out[path] = scores[path] / cost
    return out
