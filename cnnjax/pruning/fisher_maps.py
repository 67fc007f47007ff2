"""Fisher pruning of feature maps with a price on computation (Theis et al.), map by map.

Every removable channel (an *atom* of the graph: maps tied by residual sums or concatenation are
one) gets a virtual factor 1. Its squared gradient, of each example on its own, says what removing
the channel would cost; the graph says what it would save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.graph import Graph
from cnnjax.pruning.costs import CostModel
from cnnjax.tree import flatten, map_with_path

PyTree = Any
Loss = Callable[[PyTree, Any], Any]


def gate_axes(graph: Graph) -> dict[str, int]:
    """The axis of each variable on which a factor scales whole channels.

    Where a normalization makes a channel its scale and shift are scaled, and the kernel before it
    is not (in evaluation mode that would count the channel twice); elsewhere kernel and bias.
    """
    found: dict[str, int] = {}
    for (path, d), axis in graph.axes.items():
        if path in graph.parameters and not axis.consumer and axis.table is None and axis.prunable:
            found.setdefault(path, d)
    scaled = {p.rpartition("/")[0] for p in found if p.rpartition("/")[2] == "scale"}
    behind = set()
    for layer in graph.layers:
        norm = graph.bn_of(layer.path) if layer.kernel and layer.path else None
        if norm is not None and norm.path in scaled:
            behind.add(layer.path)
    return {p: d for p, d in found.items() if p.rpartition("/")[0] not in behind}


def gated_params(params: PyTree, graph: Graph, gates: Any) -> PyTree:
    """Parameters whose channels are multiplied by their gates; ones change nothing.

    Args:
      params: of the graph's network.
      graph: from `cnnjax.graph.trace`.
      gates: (num_atoms,).
    """
    axes = gate_axes(graph)
    gates = jnp.asarray(gates)
    gates = gates.astype(jnp.promote_types(gates.dtype, jnp.float32))
    spare = jnp.append(gates, 1.0)  # of positions that are fixed: -1

    def one(path: str, leaf: Any) -> Any:
        if path not in axes:
            return leaf
        shape = [1] * leaf.ndim
        shape[axes[path]] = -1
        return leaf * spare[graph.axes[path, axes[path]].labels].reshape(shape).astype(leaf.dtype)

    return map_with_path(one, params)


def map_fisher(
    params: PyTree, graph: Graph, loss: Loss, batches: Iterable[Any], *, chunk: int = 16
) -> np.ndarray:
    """``Delta_k = 1/(2N) sum_n g_nk^2`` of every channel: the loss that removing it would cost.

    ``g_nk`` is the gradient of example n's loss by the channel's gate, one gate for all the layers
    that write to a shared channel (they are summed before squaring).

    Args:
      params: of the graph's network.
      graph: from `cnnjax.graph.trace`.
      loss: ``(params, example) -> scalar`` of one example, normalization in evaluation mode; with
        a teacher's soft targets the Fisher information of the distillation loss.
      batches: pytrees with a leading axis of examples, all of one size.
      chunk: examples at a time.

    Returns:
      float64 (num_atoms,).

    Raises:
      ValueError: no example.

    Reference:
      Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense networks and Fisher
      pruning", 2018, arXiv 1801.05787, equations 5 and 6.
    """
    sums = fisher_sums(graph, loss, chunk=chunk)
    total, count = np.zeros(graph.num_atoms), 0
    for batch in batches:
        count += jax.tree.leaves(batch)[0].shape[0]
        total += np.asarray(sums(params, batch), np.float64)
    if not count:
        raise ValueError("no example: the batches are empty")
    return 0.5 * total / count


def fisher_sums(graph: Graph, loss: Loss, *, chunk: int = 16) -> Callable[[PyTree, Any], Any]:
    """The jitted part of `map_fisher`: ``(params, batch) -> sum_n g_nk^2``, (num_atoms,)."""

    @jax.jit
    def sums(params: PyTree, batch: Any) -> Any:
        def one(example: Any) -> Any:
            kinds = {
                x.dtype for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)
            }
            ones = jnp.ones(graph.num_atoms, jnp.result_type(jnp.float32, *kinds))
            g = jax.grad(lambda m: loss(gated_params(params, graph, m), example))(ones)
            return jnp.square(g)

        n = jax.tree.leaves(batch)[0].shape[0]
        return jnp.sum(jax.lax.map(one, batch, batch_size=min(chunk, n)), axis=0)

    return sums


def fisher_select(
    graph: Graph,
    scores: Any,
    *,
    beta: float | str = 0.0,
    alive: Any = None,
    macs: float | None = None,
    count: int | None = None,
    min_width: int = 1,
) -> tuple[np.ndarray, list[int]]:
    """Removes channels one at a time: the smallest ``Delta L + beta Delta C`` goes.

    ``Delta C < 0`` is what a removal saves now, in multiply-accumulates, its own layer's and its
    readers', renewed after every removal.

    Args:
      graph: without constraints on the removable channels (no grouped convolutions).
      scores: (num_atoms,), from `map_fisher`.
      beta: price of a multiply-accumulate, or ``"auto"``: the smallest ``-Delta L / Delta C`` goes.
      alive: (num_atoms,) what is left; None: everything.
      macs: stop at or below so many, or such a share of the whole network's (up to 1).
      count: stop after so many removals.
      min_width: channels that every group keeps.

    Returns:
      ``(alive, order)``: what is left, and the atoms in the order in which they went.

    Raises:
      ValueError: neither ``macs`` nor ``count``, a negative price, a budget out of reach, or
        channels under constraints.
    """
    if macs is None and count is None:
        raise ValueError("give macs or count: when to stop")
    if isinstance(beta, str):
        if beta != "auto":
            raise ValueError(f"beta is {beta!r}; expected a price or 'auto'")
    elif not beta >= 0:
        raise ValueError(f"beta is {beta}; the price of computation is not negative")
    groups = [g for g in graph.groups if g.statistic is None]
    tied = [g.name for g in groups if g.constraints]
    if tied:
        raise ValueError(
            f"{tied[0]!r}: its channels must keep equal numbers in several parts, one at a time "
            "can't go; use select_channels"
        )
    model = CostModel(graph)
    left = graph.alive() if alive is None else np.array(alive, bool)
    limit = None if macs is None else macs * model.macs(graph.alive()) if macs <= 1 else macs
    damage, order = np.asarray(scores, np.float64), []
    # each group's channels in the order in which they go, as far as it may
    queues = [mine[np.lexsort((mine, damage[mine]))][: max(0, len(mine) - min_width)]
              for mine in (g.atoms[left[g.atoms]] for g in groups)]  # fmt: skip
    heads = np.array([q[0] for q in queues if len(q)], np.int64)
    rests = [iter(q[1:].tolist()) for q in queues if len(q)]
    cost = model.macs(left)
    while (limit is None or cost > limit) and (count is None or len(order) < count):
        if not len(heads):
            if limit is None:
                break
            raise ValueError(f"macs={macs:g} is out of reach: the narrowest network has {cost:.6g}")
        # channels of one group cost the same: its next one stands for all
        after = model.macs_without(left, heads)
        saved = np.maximum(cost - after, 1e-9)
        auto = beta == "auto"
        value = damage[heads] / saved if auto else damage[heads] - float(beta) * saved
        best = int(np.argmin(value))
        left[heads[best]] = False
        order.append(int(heads[best]))
        cost = float(after[best])
        following = next(rests[best], None)
        if following is None:
            heads, rests = np.delete(heads, best), rests[:best] + rests[best + 1 :]
        else:
            heads[best] = following
    return left, order


def channel_mask(params: PyTree, graph: Graph, alive: Any) -> PyTree:
    """Bool tree like the parameters: False on everything that makes a removed channel."""
    alive = np.append(np.asarray(alive, bool), True)
    flat = {p: np.ones(np.shape(leaf), bool) for p, leaf in flatten(params).items()}
    for (path, d), axis in graph.axes.items():
        if path in flat and axis.prunable and axis.table is None and not axis.consumer:
            shape = [1] * flat[path].ndim
            shape[d] = -1
            flat[path] = flat[path] & alive[axis.labels].reshape(shape)
    return map_with_path(lambda path, leaf: jnp.asarray(flat[path]), params)
