"""Everything that a network needs in one coded tree: parameters and running statistics.

A file of parameters alone is enough for a network without batch normalization; with it, the running
statistics must travel too, or be absorbed into the affine parameters that follow them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax import tree as treelib
from cnnjax.coding.coded import is_coded, nest_like

PyTree = Any
_STORED = (nnx.Param, nnx.BatchStat)


def variables(model: nnx.Module) -> PyTree:
    """Parameters and running statistics of a model as one nested dict of its own arrays."""
    return nnx.to_pure_dict(nnx.state(model, _STORED))


def complete(coded: PyTree, model: nnx.Module) -> PyTree:
    """A coded tree with all of a model's variables: codes where there are, the model's elsewhere.

    Args:
      coded: a coded tree of the model's parameters, or of a part of them.
      model: gives the leaves that are not coded, running statistics included.

    Raises:
      ValueError: a coded tensor that the model has not, or of another shape.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(coded, is_leaf=is_coded)
    nodes = {treelib.path_string(path): node for path, node in leaves if is_coded(node)}
    flat = treelib.flatten(jax.device_get(variables(model)))
    for path, node in nodes.items():
        if path not in flat or tuple(flat[path].shape) != node.shape:
            have = tuple(flat[path].shape) if path in flat else "nothing"
            raise ValueError(f"{path}: coded with shape {node.shape}, the model has {have}")
    return nest_like({path: nodes.get(path, leaf) for path, leaf in flat.items()})


def restore(model: nnx.Module, tree: PyTree) -> nnx.Module:
    """A copy of the model with the variables of an expanded file.

    Args:
      model: of the same architecture; untouched.
      tree: ``expand(unpack(file).coded)``: its parameters, or its parameters and statistics.

    Raises:
      ValueError: the tree has other paths or shapes than the model.
    """
    stats = treelib.flatten(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    given = treelib.flatten(tree)
    kinds = _STORED if any(path in given for path in stats) else nnx.Param
    graphdef, state, rest = nnx.split(model, kinds, ...)
    pure = nnx.to_pure_dict(state)
    treelib.check_same_structure(pure, tree, what="the file's tree", of="the model")
    nnx.replace_by_pure_dict(
        state,
        treelib.map_with_path(lambda path, old: jax.numpy.asarray(given[path], old.dtype), pure),
    )
    return nnx.merge(graphdef, state, rest, copy=True)


def absorb_statistics(model: nnx.Module) -> nnx.Module:
    """A copy whose BatchNorms have mean 0 and variance 1, and the same outputs in evaluation mode.

    Scale and bias take the statistics over, so a file holds two numbers a channel instead of four.
    The copy is for inference: in training mode a BatchNorm divides by the batch's own deviation,
    and then its new scale would be wrong. BatchNorms without scale or bias stay as they are.
    """
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, state), copy=True)
    for _, module in nnx.iter_graph(model):
        if not isinstance(module, nnx.BatchNorm) or module.scale is None or module.bias is None:
            continue
        mean, var, scale, bias = (
            np.asarray(v[...], np.float64)
            for v in (module.mean, module.var, module.scale, module.bias)
        )
        factor = scale / np.sqrt(var + module.epsilon)
        new = {
            "scale": factor * np.sqrt(1 + module.epsilon),
            "bias": bias - mean * factor,
            "mean": np.zeros_like(mean),
            "var": np.ones_like(var),
        }
        for name, value in new.items():
            variable = getattr(module, name)
            variable[...] = jax.numpy.asarray(value, variable[...].dtype)
    return model
