"""Whether two networks compute the same function, on random numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.graph.tracing import functional

TOLERANCE = 1e-5
_LOW_PRECISION = 3e-2


def prove_same(
    model: nnx.Module,
    other: nnx.Module,
    inputs: tuple[Any, ...],
    *,
    carry: Callable[[str, Any], Any],
    only: Collection[str],
    what: str,
    seed: int = 0,
) -> float:
    """Compares evaluation-mode outputs after the original's variables got noise.

    Args:
      model: the original.
      other: has the same variables by path, some transformed.
      inputs: abstract or concrete examples; random numbers of their shapes are used.
      carry: ``(path, array of the original) -> array of the other``.
      only: the paths to which ``carry`` applies.
      what: was done, for the message.
      seed: of the noise and the inputs.

    Returns:
      The largest difference relative to the largest output.

    Raises:
      ValueError: if it exceeds 1e-5 (3e-2 where the network computes in 16 bits).
    """
    rng = np.random.default_rng(seed)
    full = {p: _noisy(rng, leaf) for p, leaf in surgery.leaves(model).items()}
    args = tuple(jax.tree.map(lambda x: _random(rng, x), i) for i in inputs)
    grown = {p: carry(p, leaf) if p in only else leaf for p, leaf in full.items()}
    a, low = run(model, full, args)
    b, _ = run(other, grown, args)
    worst = difference(b, a)
    if not worst <= (_LOW_PRECISION if low else TOLERANCE):
        raise ValueError(
            f"{what} changes the function (outputs differ by {worst:.1e} of the largest): the "
            "network has an operation over channels for which this isn't exact"
        )
    return worst


def run(
    model: nnx.Module, leaves: dict[str, Any], args: tuple[Any, ...]
) -> tuple[list[np.ndarray], bool]:
    """Evaluation-mode outputs, and whether the network computes in 16 bits."""
    fn, state = functional(model)
    paths, treedef = list(surgery.leaves(model)), jax.tree.structure(state)
    outs, low = evaluate(fn, jax.tree.unflatten(treedef, [leaves[p] for p in paths]), *args)
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(outs)], low


def evaluate(fn: Callable[..., Any], *args: Any) -> tuple[Any, bool]:
    """``fn(*args)`` once, in full precision, and whether anything in it has 16 bits.

    Operation by operation where they repeat (deep residual networks; networks that are compared
    share them, too), else compiled as a whole: whichever compiles less.
    """
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(fn).trace(*args)
        eqns = traced.jaxpr.jaxpr.eqns
        kinds = {(e.primitive, *(str(v.aval) for v in (*e.invars, *e.outvars))) for e in eqns}
        if len(kinds) < 0.3 * len(eqns):
            out = fn(*args)
        else:
            out = traced.lower().compile()(*args)
    return out, "f16[" in str(traced.jaxpr)


def difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Largest difference relative to the largest output of ``b``; inf for shapes, inf or NaN."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not np.isfinite(x).all() or not np.isfinite(y).all():
            return np.inf
        if x.size:
            worst = max(worst, float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)))
    return worst


def _noisy(rng: np.random.Generator, leaf: Any) -> Any:
    """Noise of a tenth of the variable's size; non-negative variables (variances) stay so."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    value = np.asarray(leaf, np.float64)
    size = 0.1 * max(float(np.sqrt(np.mean(value**2))) if value.size else 0.0, 0.1)
    noise = size * rng.standard_normal(value.shape)
    if value.size and value.min() >= 0:
        noise = np.abs(noise)
    return (value + noise).astype(leaf.dtype)


def _random(rng: np.random.Generator, x: Any) -> Any:
    shape, dtype = tuple(x.shape), jnp.dtype(x.dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)
