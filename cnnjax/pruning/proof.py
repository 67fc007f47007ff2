"""The numeric proof: the shrunk network equals the original with the removed channels gated.

Gating is independent of slicing. In the full network, every position that belongs to a removed
channel is multiplied by zero, first on the axes that *read* channels (a kernel's input axis): what
a removed channel holds then reaches nobody, whatever its activation makes of zero. Where channels
are also multiplied with each other without a kernel between (attention), the axes that *make* them
(a kernel's outputs, bias, scale) are gated too, and the networks are compared again.

The comparison runs on perturbed numbers, so that zero-initialised scales hide nothing: every
variable gets some noise, the same in both networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax.graph import Graph
from cnnjax.graph.tracing import functional
from cnnjax.tree import flatten

Program = Callable[[Mapping[str, Any], tuple[Any, ...]], Any]

TOLERANCE = 1e-5
_LOW_PRECISION = 5e-2  # where the model itself computes in 16 bits


class ProofError(ValueError):
    """A shrunk network whose numbers differ from the gated original's."""


def prove_equal(
    full: Program,
    small: Program,
    leaves: Mapping[str, Any],
    graph: Graph,
    alive: np.ndarray,
    cut: Callable[[str, Any], Any],
    *,
    inputs: tuple[Any, ...] | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> float:
    """Runs both networks in evaluation mode on random numbers and compares all outputs.

    Args:
      full: the original as a function of ``{path: array}`` and a tuple of inputs; see `program_of`.
      small: the shrunk network, likewise.
      leaves: the original's variables by path.
      graph: of the original.
      alive: the decision.
      cut: ``cut(path, array)``: how the shrunk network's arrays follow from the original's.
      inputs: example inputs or their shapes; those of ``graph`` by default.
      seed: of the random numbers.
      tolerance: largest difference, relative to the largest output.

    Returns:
      The largest relative difference.

    Raises:
      ProofError: if the outputs differ by more than the tolerance.
    """
    rng = np.random.default_rng(seed)
    noisy = {p: _noisy(rng, leaf) for p, leaf in leaves.items()}
    args = tuple(jax.tree.map(lambda x: _random(rng, x), i) for i in inputs or graph.inputs)
    halves = {p: cut(p, leaf) for p, leaf in noisy.items()}
    run, low = _compiled(small, halves, args)
    got = run(halves)
    allowed = max(tolerance, _LOW_PRECISION) if low else tolerance
    run, _ = _compiled(full, noisy, args)
    worst = np.inf
    for producers in (False, True):
        gated = {p: gate(p, leaf, graph, alive, producers=producers) for p, leaf in noisy.items()}
        worst = min(worst, _difference(got, run(gated)))
        if worst <= allowed:
            return worst
    raise ProofError(
        f"the shrunk network differs from the gated one by {worst:.2e} of its largest output "
        f"(allowed: {allowed:.0e}); please report the model. check=False skips this check"
    )


def program_of(model: nnx.Module) -> Program:
    """An NNX module in evaluation mode as a function of ``{path: array}`` and inputs."""
    fn, state = functional(model)
    paths, treedef = list(flatten(state)), jax.tree.structure(state)

    def run(leaves: Mapping[str, Any], args: tuple[Any, ...]) -> Any:
        return fn(jax.tree.unflatten(treedef, [leaves[p] for p in paths]), *args)

    return run


def _compiled(
    program: Program, leaves: Mapping[str, Any], args: tuple[Any, ...]
) -> tuple[Callable[[Mapping[str, Any]], list[np.ndarray]], bool]:
    """The program as a function of its variables, and whether it computes in 16 bits.

    It is run once or twice: on a CPU most of the time would go into optimizing what is compiled.
    """
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(program).trace(dict(leaves), args)
        lowered = traced.lower()
        quick: Any = None
        if jax.default_backend() == "cpu":
            quick = {"xla_backend_optimization_level": 0}
        compiled = lowered.compile(compiler_options=quick)

    def run(values: Mapping[str, Any]) -> list[np.ndarray]:
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(compiled(dict(values), args))]

    return run, _low_precision(str(traced.jaxpr))


def gate(path: str, leaf: Any, graph: Graph, alive: np.ndarray, *, producers: bool = False) -> Any:
    """A variable of the full network with zeros where it reads (or also makes) removed channels."""
    if path not in graph.shapes or not _is_float(leaf):
        return leaf
    out = np.asarray(leaf)
    for d in range(out.ndim):
        axis = graph.axes[path, d]
        if not axis.prunable or not (producers or axis.consumer or axis.table is not None):
            continue
        mask = axis.alive(alive)
        shape = [1] * out.ndim
        if axis.table is not None:
            assert axis.table_axis is not None
            # one row for each conv-group -> one column for each output
            per = out.shape[axis.table_axis] // len(mask)
            mask = np.repeat(mask, per, axis=0)
            shape[axis.table_axis], shape[d] = mask.shape
            mask = mask.T if d < axis.table_axis else mask
        else:
            shape[d] = len(mask)
        out = out * mask.reshape(shape).astype(out.dtype)
    return out


def _low_precision(program: str) -> bool:
    return "bf16[" in program or "f16[" in program.replace("bf16[", "")


def _difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not np.isfinite(x).all() or not np.isfinite(y).all():
            return np.inf
        if x.size:
            worst = max(worst, float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)))
    return worst


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _noisy(rng: np.random.Generator, leaf: Any) -> Any:
    """The variable with noise of a tenth of its size; non-negative ones (variances) stay so."""
    if not _is_float(leaf):
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
    # indices, flags: valid whatever they index
    return rng.integers(0, 2, shape).astype(dtype)
