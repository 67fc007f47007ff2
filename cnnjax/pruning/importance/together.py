"""Any set of scores from one jitted pass over the data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax.pruning.importance import activations, curvature, gradients, registry

PyTree = Any
GRADIENTS = {"taylor": "gate_taylor", "fisher": "gate_square", "fisher_weight": "square"}
ACTIVATIONS = ("apoz", "hrank")
CURVATURE = ("obd",)


def compute(
    params: PyTree,
    names: Iterable[str],
    batches: Iterable[Any] = (),
    *,
    loss: Callable[[PyTree, Any], Any] | None = None,
    outputs: Callable[[PyTree, Any], Any] | None = None,
    collect: Callable[[PyTree, Any], Any] | None = None,
    key: jax.Array | None = None,
    chunk: int = 16,
) -> dict[str, PyTree]:
    """Registered scores by name; gradients, curvature and activations come from one pass.

    Each batch goes through one compiled function, whatever the set of names, and is read once.

    Args:
      params: any Flax tree.
      names: of `names()`; scores registered elsewhere are called with the parameters alone.
      batches: pytrees with a leading axis of examples; streamed. Unused by scores of the weights.
      loss: ``(params, example) -> scalar``, for ``taylor``, ``fisher``, ``fisher_weight``.
      outputs: ``(params, example) -> (classes,)`` before the softmax, for ``obd`` (Gauss-Newton).
      collect: ``(params, batch) -> {kernel path: activations}``, for ``apoz`` and ``hrank``.
      key: for ``random``.
      chunk: examples whose gradients are held at once.

    Returns:
      ``{name: scores}``, each as the function of that name gives it.

    Raises:
      ValueError: an unknown name, a function or key that a name needs and that is missing, or no
        example.
    """
    names = tuple(dict.fromkeys(names))
    given = {"loss": loss, "outputs": outputs, "collect": collect, "key": key}
    for name in names:
        registry.get(name)
        need = _need(name)
        if need and given[need] is None:
            raise ValueError(f"the score {name!r} needs {need}=")
    want = tuple(GRADIENTS[n] for n in names if n in GRADIENTS)
    kinds = tuple(n for n in names if n in ACTIVATIONS)
    curved = outputs if "obd" in names else None
    total, count = None, 0
    if want or kinds or curved:
        for batch in batches:
            count += jax.tree.leaves(batch)[0].shape[0]
            new = _sums(params, batch, loss, want, curved, collect, kinds, chunk)
            total = new if total is None else jax.tree.map(jnp.add, total, new)
        if total is None or not count:
            raise ValueError("no example: the batches are empty")
    found = total or {}
    means = {n: {p: x / count for p, x in s.items()} for n, s in found.get("gradients", {}).items()}
    active = activations.finished(found["activations"], kinds) if kinds else {}
    out = {}
    for name in names:
        if name in GRADIENTS:
            out[name] = gradients.score(name, params, means[GRADIENTS[name]])
        elif name in ACTIVATIONS:
            out[name] = active[name]
        elif name == "obd":
            diagonal = jax.tree.map(lambda x: x / count, found["curvature"])
            out[name] = curvature.obd_scores(params, diagonal)
        else:
            more = (key,) if name == "random" else ()
            out[name] = registry.get(name)(params, *more)
    return out


def _need(name: str) -> str | None:
    if name in GRADIENTS:
        return "loss"
    if name in CURVATURE:
        return "outputs"
    if name in ACTIVATIONS:
        return "collect"
    return "key" if name == "random" else None


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _sums(
    params: PyTree, batch: Any, loss: Any, want: tuple[str, ...], outputs: Any, collect: Any,
    kinds: tuple[str, ...], chunk: int,
) -> dict[str, Any]:  # fmt: skip
    out: dict[str, Any] = {}
    if want:
        out["gradients"] = gradients.sums(params, batch, loss, want, chunk)
    if outputs is not None:
        out["curvature"] = curvature.gauss_newton_sums(params, batch, outputs, "softmax", chunk)
    if kinds:
        out["activations"] = activations.sums(params, batch, collect, kinds)
    return out
