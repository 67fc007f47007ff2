"""Net2WiderNet: more channels, the same function, for any network that the graph can read.

A group of channels is widened as a whole: every axis that carries it (kernels, biases, BatchNorm's
vectors, both arms of a residual sum, the slice of a concatenation) is indexed by one mapping, and
every axis that is contracted away divides by the number of copies. Where the copies sit is what
the widened program itself says: it is traced, and the original must be what is left of it when the
copies are removed (`cnnjax.graph.label_check`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.distillation.growth import Widening, plan_widening
from cnnjax.distillation.sameness import prove_same
from cnnjax.errors import did_you_mean
from cnnjax.graph import Graph
from cnnjax.tree import flatten, map_with_path

PyTree = Any

# powers of 1/copies of what optax keeps, by the name of the field
ORDERS: Mapping[str, int] = {
    "mu": 1,
    "trace": 1,
    "acc_grads": 1,
    "nu": 2,
    "nu_max": 2,
    "sum_of_squares": 2,
}
_VALUES = ("params", "stats", "ema")


def widen(
    key: Any,
    model: nnx.Module,
    graph: Graph,
    path: str,
    width: int,
    *,
    noise: float = 0.0,
    check: bool = True,
) -> tuple[Any, Widening]:
    """A wider model that computes the same function.

    Holds for any element-wise activation, BatchNorm, pooling, flattening, residual sums,
    concatenation, depthwise and grouped convolution. Refused, because copies change the result:
    statistics over channels (LayerNorm, GroupNorm, local response normalization, softmax over
    channels) and products of two activations over the widened channels.

    Args:
      key: of the random choice of the channels to copy, and of the noise.
      model: the NNX module that ``graph`` was traced from; untouched.
      graph: from `cnnjax.graph.trace`.
      path: a group's name, or the path of a layer or variable whose outputs to widen
        (``"layer1/0/conv1"``, ``"layer1/0/conv1/kernel"``).
      width: channels of the group afterwards, at least as many as now.
      noise: standard deviation, in units of each kernel's own, of what is added to the copies in
        the kernels that produce them: breaks the symmetry where there is no dropout.
      check: compare both networks on random numbers (without the noise), to 1e-5.

    Returns:
      ``(model, widening)``: a new module of the same class whose record can be saved, and what
      `widen_tree` needs.

    Raises:
      KeyError: no such path.
      ValueError: a smaller width, a fixed axis, a case that isn't exact, or a program whose
        channel counts don't follow its kernels.

    Reference:
      Chen, Goodfellow, Shlens, "Net2Net: accelerating learning via knowledge transfer", ICLR 2016,
      arXiv 1511.05641, section 2.2.
    """
    if not noise >= 0:
        raise ValueError(f"noise is {noise}; a standard deviation is not negative")
    rng = _generator(key)
    taken = surgery.parts(model)
    widening = plan_widening(taken, model, graph, path, width, rng)
    changed = sorted({p for p, _ in widening.moves})
    if not changed:
        return surgery.copy(model), widening
    abstract = any(isinstance(a, jax.ShapeDtypeStruct) for a in taken.leaves.values())
    if abstract:
        raise ValueError("widen needs a model with numbers; its leaves are abstract")
    fresh = {p: jnp.asarray(widening.apply(p, taken.leaves[p])) for p in changed}
    wide = surgery.rebuild(taken, fresh, why="widen")
    if check:
        what = f"widening {widening.group!r} to {width} channels"
        prove_same(model, wide, graph.inputs, carry=widening.apply, only=changed, what=what)
    if noise:
        wide = surgery.fill(wide, _noisy(rng, model, fresh, widening, noise))
    return wide, widening


def widen_tree(
    tree: PyTree, widening: Widening, *, orders: Mapping[str, int] | None = None
) -> PyTree:
    """Widens what goes with the model: optimizer state, moving averages.

    A leaf belongs to the variable whose path its own path ends with. What precedes it says how it
    scales: in an optax state ``mu`` and ``trace`` are first moments of gradients (each copy gets
    1/copies of the old gradient, so divided by the copies where the layer was widened), ``nu`` is
    a second moment (divided by their square); parameters and averages of them are values.

    Args:
      tree: any tree with the model's paths inside.
      widening: from `widen`.
      orders: additional ``{field name: power}``; 0 is a value.

    Raises:
      ValueError: a field of unknown kind, another shape, or no leaf of the model's.
    """
    known = {**ORDERS, **dict.fromkeys(_VALUES, 0), **(orders or {})}
    met = 0

    def one(path: str, leaf: Any) -> Any:
        nonlocal met
        parts = path.split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        owner = next((t for t in tails if t in widening.shapes), None)
        if owner is None or not hasattr(leaf, "shape"):
            return leaf
        if tuple(leaf.shape) != widening.shapes[owner]:
            raise ValueError(
                f"{path} has shape {tuple(leaf.shape)}, its variable {owner!r} had "
                f"{widening.shapes[owner]}; make this part of the tree anew"
            )
        head = [p for p in parts[: len(parts) - len(owner.split("/"))] if not p.isdigit()]
        named = [p for p in head if p in known]
        if head and not named:
            raise ValueError(
                f"{path}: does {head[-1]!r} hold values or moments of gradients? Give "
                f"orders={{{head[-1]!r}: 0 or the power}}.{did_you_mean(head[-1], known)}"
            )
        met += 1
        if not any(p == owner for p, _ in widening.moves):
            return leaf
        return jnp.asarray(widening.apply(owner, leaf, known[named[-1]] if named else 0))

    out = map_with_path(one, tree)
    if not met:
        raise ValueError("no leaf of the tree belongs to a variable of the widened model")
    return out


def _generator(key: Any) -> np.random.Generator:
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return np.random.default_rng(np.asarray(data).ravel().tolist())


def _noisy(
    rng: np.random.Generator,
    model: nnx.Module,
    fresh: Mapping[str, Any],
    widening: Widening,
    noise: float,
) -> dict[str, Any]:
    params = flatten(nnx.state(model, nnx.Param))
    out = dict(fresh)
    for (path, axis), move in widening.moves.items():
        leaf = np.asarray(out[path])
        if move.consumer or leaf.ndim < 2 or path not in params or not move.fresh.any():
            continue
        shape = [1] * leaf.ndim
        shape[axis] = -1
        size = noise * float(np.std(np.asarray(params[path], np.float64)))
        added = size * rng.standard_normal(leaf.shape) * move.fresh.reshape(shape)
        out[path] = jnp.asarray((leaf + added).astype(leaf.dtype))
    return out
