"""What the masked training stages share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax import pruning, training
from cnnjax.pipeline.context import Recipe

PyTree = Any


def mask_averages(recipe: Recipe) -> training.Hooks:
    """Hooks of the recipe that keep removed weights at zero in the moving averages too."""

    def post(state: training.TrainState, context: Any, metrics: Any) -> training.TrainState:
        del context, metrics
        if state.ema is None:
            return state
        mask = pruning.get_mask(state.opt_state)
        kept = jax.tree.map(lambda e, m: jnp.where(m, e, 0), state.ema["params"], mask)
        return state.replace(ema={**state.ema, "params": kept})

    return training.Hooks(
        loss=training.classification_loss(recipe.label_smoothing), post_update=post
    )


def params_of(model: nnx.Module) -> PyTree:
    """The model's parameters as a nested plain dict (its own arrays)."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def with_params(model: nnx.Module, params: PyTree) -> nnx.Module:
    """A copy of the model with other parameters of the same shapes."""
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state, rest, copy=True)


@jax.jit
def cut_state(state: training.TrainState, mask: PyTree) -> training.TrainState:
    """The state with everything that belongs to removed weights at zero."""

    def zero(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), tree, mask)

    ema = state.ema
    if ema is not None:
        ema = {**ema, "params": zero(ema["params"])}
    return dataclasses.replace(
        state,
        params=zero(state.params),
        opt_state=pruning.set_mask(state.opt_state, mask),
        ema=ema,
    )
