"""One pass through a network that stops at every response, lets it be changed, and goes on.

The network's program is carried out operation by operation over all calibration batches side by
side. A layer's response is thus computed once from what the layers before it answer *now*, instead
of running the network anew for each layer: the cost of a whole reconstruction is that of one
forward pass, and no program is compiled per layer. The feature maps of all batches at the present
layer are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxpr_as_fun

from cnnjax import graph as graphs
from cnnjax.factorization.sites import Site, in_evaluation
from cnnjax.tree import flatten


class OnePass:
    """A forward pass over several batches with stops.

    Args:
      model: any NNX network, run in evaluation mode.
      sites: where to stop, in order (see `find_sites`).
      batches: inputs, all of one shape.
      kernels: other kernels of some layers, ``{layer path: kernel of the same shape}``.
    """

    def __init__(
        self,
        model: nnx.Module,
        sites: Sequence[Site],
        batches: Sequence[Any],
        kernels: Mapping[str, Any],
    ) -> None:
        graphdef, state = nnx.split(in_evaluation(model))
        leaves, structure = jax.tree.flatten(state)
        paths = list(flatten(state))
        taps = {site.tap: "output" for site in sites}

        def run(leaves: Any, x: Any) -> Any:
            inner = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves), copy=True)
            found = graphs.capture(inner, taps)(x)[1]
            return [found[site.tap] for site in sites]

        closed = jax.make_jaxpr(run)(leaves, batches[0])
        self._program = closed.jaxpr
        self._taps = {site.path: v for site, v in zip(sites, self._program.outvars)}
        replaced = {f"{path}/kernel": kernel for path, kernel in kernels.items()}
        inputs = self._program.invars
        shared = dict(zip(self._program.constvars, closed.consts))
        for var, path, leaf in zip(inputs, paths, leaves):
            shared[var] = jnp.asarray(replaced[path], leaf.dtype) if path in replaced else leaf
        self._shared = shared
        self._batches = [{inputs[-1]: jnp.asarray(x)} for x in batches]
        self._inner: dict[int, Callable[..., Any]] = {}
        self._next = 0
        self._last_use: dict[Any, int] = {}
        for index, eqn in enumerate(self._program.eqns):
            self._last_use |= {v: index for v in eqn.invars if not hasattr(v, "val")}

    def until(self, site: Site) -> list[Any]:
        """Runs on to a response and returns it for each batch."""
        var = self._taps[site.path]
        eqns = self._program.eqns
        while any(var not in batch for batch in self._batches):
            eqn = eqns[self._next]
            inputs = [v for v in eqn.invars if not hasattr(v, "val")]
            dead = [v for v in inputs if self._last_use[v] == self._next and v is not var]
            for batch in self._batches:
                self._carry_out(eqn, batch)
                for v in dead:
                    batch.pop(v, None)
            self._next += 1
        return [batch[var] for batch in self._batches]

    def put(self, site: Site, change: Callable[[Any], Any]) -> None:
        """Lets the network go on with ``change(response)`` in the place of the response."""
        var = self._taps[site.path]
        for batch in self._batches:
            batch[var] = change(batch[var]).astype(batch[var].dtype)

    def _carry_out(self, eqn: Any, batch: dict[Any, Any]) -> None:
        values = [
            v.val if hasattr(v, "val") else batch[v] if v in batch else self._shared[v]
            for v in eqn.invars
        ]
        inner = eqn.params.get("call_jaxpr")
        if inner is None:
            out = eqn.primitive.bind(*values, **eqn.params)
        else:
            # a function with its own derivative: carried out as it is
            run = self._inner.setdefault(id(inner), jax.jit(jaxpr_as_fun(inner)))
            out = run(*values)
        many = eqn.primitive.multiple_results
        for var, value in zip(eqn.outvars, out if many else [out]):
            batch[var] = value
