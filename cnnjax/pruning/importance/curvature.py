"""Scores from second derivatives: optimal brain damage with five ways to the Hessian's diagonal.

LeCun, Denker, Solla, "Optimal brain damage", NIPS 2, 1990. At a minimum and with a diagonal Hessian
deleting ``w_k`` costs ``0.5 h_kk w_k^2``. All diagonals are means over examples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax import tree
from cnnjax.errors import did_you_mean
from cnnjax.pruning.importance.gradients import gradient_statistics
from cnnjax.pruning.importance.registry import register

PyTree = Any
KINDS = ("gauss_newton", "fisher", "hutchinson")
OUTPUT_LOSSES = ("softmax", "squared")
_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda a: a,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


def obd_scores(params: PyTree, diagonal: PyTree) -> PyTree:
    """``0.5 max(h, 0) w^2`` of every kernel.

    Args:
      params: any Flax tree.
      diagonal: the Hessian's diagonal, a tree of the same structure; exact diagonals may have
        negative entries, which count as no curvature.

    Raises:
      ValueError: a diagonal of other paths or shapes.
    """
    tree.check_same_structure(params, diagonal, what="Hessian diagonal")
    flat, diag = tree.flatten(params), tree.flatten(diagonal)
    return tree.nest(
        {
            p: 0.5 * jnp.maximum(diag[p], 0) * jnp.square(w)
            for p, w in flat.items()
            if jnp.ndim(w) >= 2
        }
    )


@register("obd")
def obd(
    params: PyTree,
    fn: Callable[..., Any],
    batches: Iterable[Any],
    *,
    kind: str = "gauss_newton",
    **options: Any,
) -> PyTree:
    """Optimal brain damage: `obd_scores` of one of the diagonals.

    Args:
      params: trained, any Flax tree.
      fn: ``(params, inputs) -> outputs`` of one example for ``gauss_newton``; ``(params, example)
        -> loss`` of one example for ``fisher``; ``(params, batch) -> mean loss`` for
        ``hutchinson``.
      batches: what ``fn`` takes, with a leading axis of examples.
      kind: one of `KINDS`; for `mlp_diagonal` call `obd_scores` on its result.
      **options: of the diagonal's function.

    Raises:
      ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown curvature {kind!r}.{did_you_mean(kind, KINDS)}")
    if kind == "gauss_newton":
        diagonal = gauss_newton_diagonal(params, fn, batches, **options)
    elif kind == "fisher":
        flat = gradient_statistics(params, fn, batches, ("square",), **options)["square"]
        diagonal = tree.map_with_path(lambda path, _: flat[path], params)
    else:
        diagonal = hutchinson_diagonal(params, fn, batches, **options)
    return obd_scores(params, diagonal)


def gauss_newton_diagonal(
    params: PyTree,
    outputs: Callable[[PyTree, Any], Any],
    batches: Iterable[Any],
    *,
    loss: str = "softmax",
    chunk: int = 16,
) -> PyTree:
    """Exact diagonal of ``E[J^T H_L J]``, non-negative, without labels.

    For softmax cross-entropy ``H_L = diag(p) - p p^T = sum_c p_c (e_c - p)(e_c - p)^T``: one
    backward pass per class. For ``squared``, ``E = sum (d - x)^2``: ``H_L = 2 I``.

    Args:
      params: any Flax tree.
      outputs: ``(params, inputs) -> (classes,)`` of one example, before the softmax.
      batches: inputs with a leading axis of examples.
      loss: one of `OUTPUT_LOSSES`.
      chunk: examples at once; each holds as many gradients as there are classes.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: unknown loss, or no example.
    """
    if loss not in OUTPUT_LOSSES:
        raise ValueError(f"unknown output loss {loss!r}.{did_you_mean(loss, OUTPUT_LOSSES)}")
    total, count = None, 0
    for batch in batches:
        count += jax.tree.leaves(batch)[0].shape[0]
        new = gauss_newton_sums(params, batch, outputs, loss, chunk)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    if total is None or not count:
        raise ValueError("no example: the batches are empty")
    return jax.tree.map(lambda x: x / count, total)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def gauss_newton_sums(params: PyTree, batch: Any, outputs: Any, loss: str, chunk: int) -> PyTree:
    """The jitted part of `gauss_newton_diagonal`: the sum over a batch."""

    def one(x: Any) -> PyTree:
        z, back = jax.vjp(lambda p: outputs(p, x), params)
        if loss == "softmax":
            p = jax.nn.softmax(z)
            # rows sqrt(p_c) (e_c - p): the sum of their outer products is H_L
            factor = jnp.sqrt(p)[:, None] * (jnp.eye(z.size, dtype=z.dtype) - p[None])
        else:
            factor = jnp.sqrt(jnp.asarray(2.0, z.dtype)) * jnp.eye(z.size, dtype=z.dtype)
        rows = jax.vmap(lambda v: back(v)[0])(factor)
        return jax.tree.map(lambda g: jnp.sum(jnp.square(g), axis=0), rows)

    each = jax.lax.map(one, batch, batch_size=chunk)
    return jax.tree.map(lambda g: jnp.sum(g, axis=0), each)


def hutchinson_diagonal(
    params: PyTree,
    loss: Callable[[PyTree, Any], Any],
    batches: Iterable[Any],
    *,
    key: jax.Array,
    samples: int = 16,
) -> PyTree:
    """``E_v[v * (H v)]`` with random signs v: unbiased for the true Hessian's diagonal.

    Args:
      params: any Flax tree.
      loss: ``(params, batch) -> mean loss``.
      batches: what the loss takes; each batch weighs by its number of examples.
      key: PRNG key.
      samples: sign vectors per batch, at least 1.

    Raises:
      ValueError: no batch or no sample.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")

    total, count = None, 0
    for i, batch in enumerate(batches):
        n = jax.tree.leaves(batch)[0].shape[0]
        new = _hutchinson(params, batch, jax.random.fold_in(key, i), loss, samples)
        new = jax.tree.map(lambda x, n=n: n * x, new)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        count += n
    if total is None:
        raise ValueError("no example: the batches are empty")
    return jax.tree.map(lambda x: x / count, total)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _hutchinson(params: PyTree, batch: Any, key: Any, loss: Any, samples: int) -> PyTree:
    leaves, treedef = jax.tree.flatten(params)

    def one(total: PyTree, k: Any) -> tuple[PyTree, None]:
        keys = jax.random.split(k, len(leaves))
        signs = [jax.random.rademacher(q, w.shape, w.dtype) for q, w in zip(keys, leaves)]
        v = jax.tree.unflatten(treedef, signs)
        _, hv = jax.jvp(lambda p: jax.grad(loss)(p, batch), (params,), (v,))
        return jax.tree.map(lambda t, a, b: t + a * b / samples, total, v, hv), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(one, zeros, jax.random.split(key, samples))[0]


def mlp_diagonal(
    layers: Sequence[tuple[Float[Array, ...], Float[Array, ...]]],
    x: Float[Array, "n i"],
    target: Float[Array, "n o"],
    *,
    activation: str = "tanh",
    output: str = "linear",
    levenberg_marquardt: bool = False,
) -> list[tuple[Array, Array]]:
    """LeCun's backward sweep of second derivatives through a dense net, ``E = sum (d - x)^2``.

    ``d2E/dw_ij^2 = x_j^2 d2E/da_i^2``; hidden units ``f'(a)^2 sum_l w_li^2 d2E/da_l^2 + f''(a)
    dE/dx``. Exact with one hidden layer; for deeper nets it drops the off-diagonal terms between
    units of a layer, as the paper does.

    Args:
      layers: ``(kernel (in, out), bias (out,))`` in order.
      x: inputs.
      target: d.
      activation: of hidden layers: ``tanh``, ``relu``, ``sigmoid`` or ``linear``.
      output: of the last layer.
      levenberg_marquardt: drop the terms with f'': non-negative.

    Returns:
      ``(kernel, bias)`` diagonals in order, means over the examples.

    Raises:
      ValueError: unknown activation, or layers and data that do not fit.
    """
    for name in (activation, output):
        if name not in _ACTIVATIONS:
            raise ValueError(f"unknown activation {name!r}.{did_you_mean(name, _ACTIVATIONS)}")
    widths = [x.shape[-1], *(b.shape[0] for _, b in layers)]
    for i, (w, _) in enumerate(layers):
        if tuple(w.shape) != (widths[i], widths[i + 1]):
            raise ValueError(
                f"kernel {i} has shape {tuple(w.shape)}, expected {(widths[i], widths[i + 1])}"
            )
    fs = [_ACTIVATIONS[activation]] * (len(layers) - 1) + [_ACTIVATIONS[output]]

    def derivatives(f: Any, a: Array) -> tuple[Array, Array]:
        first = jax.vmap(jax.vmap(jax.grad(f)))(a)
        return first, jax.vmap(jax.vmap(jax.grad(jax.grad(f))))(a)

    inputs, sums = [x], []
    for (w, b), f in zip(layers, fs):
        a = jnp.matmul(inputs[-1], w, precision=jax.lax.Precision.HIGHEST) + b
        sums.append(a)
        inputs.append(f(a))
    gone = 0.0 if levenberg_marquardt else 1.0
    f1, f2 = derivatives(fs[-1], sums[-1])
    slope = -2 * (target - inputs[-1])  # dE/dx of the outputs
    curve = 2 * f1**2 + gone * f2 * slope  # d2E/da2
    out = []
    n = x.shape[0]
    for i in range(len(layers) - 1, -1, -1):
        out.append((jnp.einsum("nj,ni->ji", inputs[i] ** 2, curve) / n, curve.mean(axis=0)))
        if i == 0:
            break
        w = layers[i][0]
        slope = (slope * f1) @ w.T  # dE/dx of the layer below
        second = curve @ (w**2).T
        f1, f2 = derivatives(fs[i - 1], sums[i - 1])
        curve = f1**2 * second + gone * f2 * slope
    return out[::-1]
