"""What a network costs: parameters, non-zeros, bytes, multiply-accumulates.

Counting rules: a convolution is ``Ho * Wo * kh * kw * C * O / groups`` MACs and a dense layer
``in * out`` per position, padding counted like data, batch size as given. *Effective* MACs leave
out the products with a weight that is zero; a dense kernel library does not skip them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from cnnjax import training, tree

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """MACs of one convolution or matrix product.

    Attributes:
      path: of the parameter that it multiplies with, None if neither side is one.
      macs: multiply-accumulates, zeros included.
    """

    path: str | None
    macs: int


def layer_costs(model: Any, example: Any) -> list[LayerCost]:
    """Every convolution and matrix product of a forward pass, read off its jaxpr (no FLOPs).

    Args:
      model: NNX module, concrete or abstract.
      example: input ``(n, h, w, c)``, an array or a `jax.ShapeDtypeStruct`.
    """
    network, params, stats = training.split_network(model)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, stats))

    def forward(params: PyTree, stats: PyTree, x: Any) -> Any:
        return network.model(params, stats, train=False)(x)

    closed = jax.make_jaxpr(forward)(*abstract, example)
    paths = list(tree.flatten(params))
    names: dict[Any, str] = dict(zip(closed.jaxpr.invars, paths))
    out: list[LayerCost] = []
    _walk(closed.jaxpr, names, 1, out)
    return out


# operations that hand a kernel on with the same weights in it
_SAME = ("convert_element_type", "transpose", "reshape", "copy", "squeeze", "expand_dims", "rev")


def _walk(jaxpr: Any, names: dict[Any, str], times: int, out: list[LayerCost]) -> None:
    def name(atom: Any) -> str | None:
        return None if hasattr(atom, "val") else names.get(atom)

    for eqn in jaxpr.eqns:
        kind = eqn.primitive.name
        if kind in _SAME and name(eqn.invars[0]):
            names[eqn.outvars[0]] = names[eqn.invars[0]]
        elif kind == "conv_general_dilated":
            spec = eqn.params["dimension_numbers"]
            kernel = eqn.invars[1].aval.shape
            outputs = math.prod(eqn.outvars[0].aval.shape)
            per = math.prod(kernel) // kernel[spec.rhs_spec[0]]
            out.append(LayerCost(name(eqn.invars[1]), times * outputs * per))
        elif kind == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            size = math.prod(eqn.invars[0].aval.shape[a] for a in contracted)
            macs = times * size * math.prod(eqn.outvars[0].aval.shape)
            out.append(LayerCost(name(eqn.invars[1]) or name(eqn.invars[0]), macs))
        elif kind == "scan":
            _inner(eqn, eqn.params["jaxpr"], names, times * eqn.params["length"], out)
        elif kind == "cond":
            _inner(eqn, eqn.params["branches"][-1], names, times, out, skip=1)
        else:
            for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
                if key in eqn.params:
                    _inner(eqn, eqn.params[key], names, times, out)
                    break


def _inner(
    eqn: Any, inner: Any, names: dict[Any, str], times: int, out: list[LayerCost], skip: int = 0
) -> None:
    jaxpr = getattr(inner, "jaxpr", inner)
    own = {
        var: names[atom]
        for var, atom in zip(jaxpr.invars, eqn.invars[skip:])
        if not hasattr(atom, "val") and atom in names
    }
    _walk(jaxpr, own, times, out)
    for var, outer in zip(jaxpr.outvars, eqn.outvars):
        if not hasattr(var, "val") and var in own:
            names[outer] = own[var]


def sparse_bytes(params: PyTree) -> int:
    """Bytes when each kernel is stored dense or as CSR, whichever is smaller.

    A kernel is the matrix ``(h * w * c, o)`` by rows; CSR takes its values in their own dtype, a
    16- or 32-bit column index per value (by ``o``) and a 32-bit pointer per row and one.
    """
    total = 0
    for leaf in jax.tree.leaves(params):
        leaf = np.asarray(leaf)
        dense = leaf.nbytes
        if leaf.ndim >= 2:
            columns = leaf.shape[-1]
            index = 2 if columns <= 1 << 16 else 4
            rows = leaf.size // columns
            stored = int(np.count_nonzero(leaf)) * (leaf.itemsize + index) + 4 * (rows + 1)
            dense = min(dense, stored)
        total += dense
    return total


def measure(model: Any, example: Any) -> dict[str, Any]:
    """Counts of a network.

    Args:
      model: NNX module with arrays.
      example: one image as a batch of one, array or `jax.ShapeDtypeStruct`.

    Returns:
      ``params``, ``nonzeros``, ``bytes`` (dense, in the parameters' dtypes), ``sparse_bytes``,
      ``macs``, ``effective_macs``, ``compression`` (params / nonzeros).
    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    host = jax.device_get(params)
    flat = tree.flatten(host)
    density = {k: np.count_nonzero(v) / max(v.size, 1) for k, v in flat.items()}
    layers = layer_costs(model, example)
    effective = sum(x.macs * (density[x.path] if x.path else 1.0) for x in layers)
    nonzeros = tree.nonzeros(host)
    return {
        "params": tree.count(params),
        "nonzeros": nonzeros,
        "bytes": tree.nbytes(params),
        "sparse_bytes": sparse_bytes(host),
        "macs": sum(x.macs for x in layers),
        "effective_macs": round(effective),
        "compression": tree.count(params) / max(nonzeros, 1),
    }
