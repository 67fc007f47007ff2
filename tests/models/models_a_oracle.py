"""Counting and random values for the tests of the classical, residual and dense families."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import models, tree


def macs(jaxpr: Any) -> int:
    """Multiply-accumulates of a jaxpr's convolutions and products; a scan counts every turn."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        out = eqn.outvars[0].aval.shape if eqn.outvars else ()
        if name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += math.prod(out) * math.prod(kernel) // features
        elif re.fullmatch("cnnjax_(depthwise|grouped|pointwise|dense)_conv", name):
            total += math.prod(out) * math.prod(eqn.invars[1].aval.shape[:-1])
        elif name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += math.prod(out) * math.prod(left[i] for i in contracted)
        else:
            inner = [
                getattr(part, "jaxpr", part)
                for value in eqn.params.values()
                for part in (value if isinstance(value, tuple | list) else (value,))
                if hasattr(getattr(part, "jaxpr", part), "eqns")
            ]
            turns = eqn.params["length"] if name == "scan" else 1
            total += turns * sum(macs(j) for j in inner)
    return total


def counts(name: str, **fields: Any) -> tuple[int, int]:
    """(parameters, MACs at batch 1 and the standard input), without computing anything."""
    model = models.abstract(name, **fields)
    model.eval()
    graphdef, state = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, *models.input_shape(name, **fields)), np.float32)
    traced = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, image)
    return tree.count(nnx.state(model, nnx.Param)), macs(traced.jaxpr)


def fill(model: Any, seed: int = 0) -> Any:
    """Random parameters and statistics from NumPy; random streams stay as they are."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> Any:
        x = rng.standard_normal(leaf.shape).astype(np.float32)
        last = path.rpartition("/")[2]
        if last in ("var", "scale"):
            return 0.5 + 0.5 * np.abs(x)
        if last == "kernel":
            return x * np.float32(math.sqrt(2.0 / math.prod(leaf.shape[:-1])))
        return 0.1 * x

    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    # JAX arrays: Flax would write batch statistics into NumPy arrays in place
    nnx.update(model, jax.tree.map(jnp.asarray, tree.map_with_path(draw, state)))
    return model
