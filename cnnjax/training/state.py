"""The state of training as one pytree, and the static side of a network.

A network is ``(graphdef, state)``. `split_network` takes an NNX module apart once: the graph
definitions of its training and evaluation modes go to a `Network` (static, closed over by the
jitted steps), the arrays to plain nested dicts. Random-number variables (dropout, stochastic
depth) are not state here: every step derives fresh keys from ``(seed, step)``, so a resumed run
draws exactly what the uninterrupted run drew.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes, and that a checkpoint holds.

    Attributes:
      step: number of finished steps, int32 scalar.
      params: trainable arrays, nested plain dict (any pytree with a ``reparam`` hook).
      stats: all other variables (BatchNorm statistics...), nested plain dict.
      key: base random key; constant, steps fold their number into it.
      opt_state: state of the optax transformation.
      ema: ``{"params": ..., "stats": ...}`` moving averages, or None.
      extra: any pytree a method wants to keep along (masks, gates, a teacher's arrays).
    """

    step: Any
    params: PyTree
    stats: PyTree
    key: Any
    opt_state: PyTree
    ema: PyTree = None
    extra: PyTree = None

    def replace(self, **changes: Any) -> TrainState:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Network:
    """The static side of a network: its structure in both modes.

    Attributes:
      train: graph definition with dropout on and BatchNorm on batch statistics.
      eval: graph definition with dropout off and BatchNorm on running statistics.
      rngs: shapes of the random-number variables, nested dict of `jax.ShapeDtypeStruct`.
    """

    train: Any
    eval: Any
    rngs: PyTree

    def model(
        self,
        params: PyTree,
        stats: PyTree,
        *,
        key: Any = None,
        train: bool = False,
        dtype: Any = None,
    ) -> nnx.Module:
        """The NNX module with these arrays; never shares variables with another merge.

        Args:
          params: nested dict of the trainable arrays.
          stats: nested dict of the other arrays.
          key: base key of the random-number variables; fixed if None.
          train: mode.
          dtype: to compute in: parameters are cast, statistics are not; None: as they are.
        """
        rngs = derive_rngs(self.rngs, jax.random.key(0) if key is None else key)
        graphdef = self.train if train else self.eval
        # copy=True: variables must be created at the trace level of the caller (inside grad)
        if dtype is None:
            return nnx.merge(graphdef, params, rngs, stats, copy=True)
        model = nnx.merge(graphdef, cast_floats(params, dtype), rngs, stats, copy=True)
        return set_compute_dtype(model, dtype)


def derive_rngs(template: PyTree, key: Any) -> PyTree:
    """Random-number variables for one step: keys split off ``key``, counts at zero."""
    leaves, treedef = jax.tree.flatten(template)
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    sizes = [math.prod(leaf.shape) if k else 0 for leaf, k in zip(leaves, is_key)]
    # one operation for all: some networks hold a hundred streams
    keys = jax.random.split(key, sum(sizes)) if any(sizes) else None
    out, start = [], 0
    for leaf, size in zip(leaves, sizes):
        if size and keys is not None:
            out.append(keys[start : start + size].reshape(leaf.shape))
            start += size
        else:
            out.append(jnp.zeros(leaf.shape, leaf.dtype))
    return jax.tree.unflatten(treedef, out)


def set_mode(model: nnx.Module, *, train: bool) -> nnx.Module:
    """A copy of the module in training or evaluation mode; the argument is untouched."""
    model = nnx.merge(*nnx.split(model))
    # attributes of any module (a user's stochastic depth), then modules that define `set_view`
    if train:
        model.train()
    else:
        model.eval()
    return nnx.view(
        model, deterministic=not train, use_running_average=not train, raise_if_not_found=False
    )


def set_compute_dtype(model: nnx.Module, dtype: Any) -> nnx.Module:
    """Lets every layer without a dtype of its own compute in ``dtype``; changes the module.

    Casting parameters and inputs is not enough: a normalization layer would promote its output to
    the float32 of its running statistics.
    """
    for _, module in list(nnx.iter_graph(model)):
        if isinstance(module, nnx.Module) and getattr(module, "dtype", 0) is None:
            module.dtype = jnp.dtype(dtype)
    return model


def cast_floats(tree: PyTree, dtype: Any) -> PyTree:
    """Casts the floating leaves of a tree; integers and keys stay."""
    return jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def split_network(model: nnx.Module) -> tuple[Network, PyTree, PyTree]:
    """Takes a module apart.

    Args:
      model: an NNX module; concrete or abstract (leaves `jax.ShapeDtypeStruct`).

    Returns:
      ``(network, params, stats)``; the arrays are the module's own, not copies.

    Raises:
      TypeError: if ``model`` is not an NNX module.
      ValueError: if it has no parameters.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"expected a flax.nnx.Module, got {type(model).__name__}")
    graphdefs = {}
    params = rngs = stats = None
    for train in (True, False):
        graphdef, params, rngs, _, stats = nnx.split(
            set_mode(model, train=train), nnx.Param, nnx.RngState, nnx.Intermediate, ...
        )
        graphdefs[train] = graphdef
    params = nnx.to_pure_dict(params)
    if not jax.tree.leaves(params):
        raise ValueError(f"{type(model).__name__} has no parameters (nnx.Param) to train")
    rngs = jax.tree.map(_abstract, nnx.to_pure_dict(rngs))
    return Network(graphdefs[True], graphdefs[False], rngs), params, nnx.to_pure_dict(stats)


def model_stats(model: nnx.Module) -> PyTree:
    """The module's variables that are neither parameters, random state nor sown values."""
    _, _, stats = nnx.split(
        model, nnx.Any(nnx.Param, nnx.RngState, nnx.Intermediate), nnx.Everything()
    )
    return nnx.to_pure_dict(stats)


@jax.jit
def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def create_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    ema: bool = False,
    extra: PyTree = None,
    params: PyTree = None,
) -> tuple[Network, TrainState]:
    """The network's static side and a fresh training state.

    The arrays are copied: a donated step never deletes the arrays of ``model``.

    Args:
      model: an NNX module with initialized parameters.
      optimizer: optax transformation, see `build_optimizer`.
      seed: of the keys for dropout and the like.
      ema: whether to keep moving averages of parameters and statistics.
      extra: free slot for methods.
      params: trainable pytree if it is not the module's own parameters (``reparam`` hook).

    Returns:
      ``(network, state)``.
    """
    network, own, stats = split_network(model)
    params = own if params is None else params
    params, stats, extra = _copy((params, stats, extra))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=stats,
        key=jax.random.key(seed),
        # copied: jit hands an argument that comes back unchanged over as the same buffer, and
        # one buffer cannot be donated twice
        opt_state=jax.jit(lambda p: jax.tree.map(jnp.copy, optimizer.init(p)))(params),
        ema=_copy({"params": params, "stats": stats}) if ema else None,
        extra=extra,
    )
    return network, state


def state_to_model(
    network: Network, state: TrainState, *, ema: bool = False, train: bool = False
) -> nnx.Module:
    """A module with the state's arrays (copies), e.g. to analyse or shrink a trained network.

    Raises:
      ValueError: if ``ema`` is asked of a state that keeps no averages.
    """
    params, stats = averaged(state) if ema else (state.params, state.stats)
    params, stats = _copy((params, stats))
    return network.model(params, stats, key=state.key, train=train)


def averaged(state: TrainState) -> tuple[PyTree, PyTree]:
    """Moving averages ``(params, stats)`` of the state.

    Raises:
      ValueError: if the state keeps none.
    """
    if state.ema is None:
        raise ValueError("the state keeps no moving averages; create it with ema=True")
    return state.ema["params"], state.ema["stats"]
