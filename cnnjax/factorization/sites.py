"""Where a layer *answers* inside a network: behind its BatchNorm, before its ReLU.

Reconstruction needs to know, of each layer, which BatchNorm alone reads it (its affine map belongs
to the response) and whether a ReLU follows at once (the error that counts is then behind it). Both
are read off the network's program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import graph as graphs
from cnnjax import surgery
from cnnjax.factorization.response import (
    ResponseMoments,
    add_moments,
    empty_moments,
    sample_positions,
)

Batches = Iterable[Any]


@dataclasses.dataclass(frozen=True)
class Site:
    """The response of one layer.

    Attributes:
      path: of the convolution or dense layer.
      norm: path of the BatchNorm behind it, whose output is the response; None: its own output.
      relu: whether a ReLU alone reads the response.
      size: (height, width) of the layer's input; (1, 1) for dense layers.
    """

    path: str
    norm: str | None
    relu: bool
    size: tuple[int, int] = (1, 1)

    @property
    def tap(self) -> str:
        """The module whose output is the response."""
        return self.norm or self.path


def in_evaluation(model: nnx.Module) -> nnx.Module:
    """A view of the model in evaluation mode."""
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


def images(batches: Batches) -> Iterator[Any]:
    """The inputs of batches (arrays, or mappings with ``"image"``), from the beginning."""
    if hasattr(batches, "reset"):
        batches.reset()  # pyright: ignore[reportAttributeAccessIssue]
    for batch in batches:
        yield jnp.asarray(batch["image"] if isinstance(batch, Mapping) else batch)


def check_samples(path: str, samples: int, outputs: int) -> None:
    """Raises ValueError where responses are too few to say which directions matter."""
    if samples < outputs:
        raise ValueError(
            f"{path}: {samples} samples for {outputs} outputs: at least {outputs} are "
            f"needed ({10 * outputs} are advisable); give more images or positions"
        )


def find_sites(model: nnx.Module, paths: Sequence[str], example: Any) -> tuple[Site, ...]:
    """The sites of layers, in the order in which the network computes their responses.

    Args:
      model: any NNX network, read in evaluation mode.
      paths: of convolutions and dense layers.
      example: an input (array or ``ShapeDtypeStruct``, or a tuple of them).

    Raises:
      ValueError: if the network never applies a layer, or more than once.
    """
    examples = example if isinstance(example, tuple) else (example,)
    read = graphs.trace(model, *examples)
    applied = [layer.path for layer in read.layers]
    for path in paths:
        if applied.count(path) != 1:
            raise ValueError(
                f"{path} is applied {applied.count(path)} times; a layer can be reconstructed "
                "where the network applies it once"
            )
    ordered = sorted(paths, key=applied.index)
    norms = {}
    found = surgery.modules(model)
    for path in ordered:
        norm = read.bn_of(path)
        alone = norm is not None and len(read.prev_layers(norm.path)) == 1
        if norm is not None and alone and applied.count(norm.path) == 1:
            module = found.get(norm.path)
            if isinstance(module, nnx.BatchNorm) and module.scale is not None:
                norms[path] = norm.path if module.bias is not None else None
    shapes = {layer.path: layer.input_shape for layer in read.layers}
    sizes = {p: (shapes[p][1], shapes[p][2]) for p in ordered if len(shapes[p]) == 4}
    return tuple(
        dataclasses.replace(site, size=sizes.get(site.path, (1, 1)))
        for site in _read_program(model, ordered, norms, examples)
    )


def _read_program(
    model: nnx.Module, paths: Sequence[str], norms: Mapping[str, str | None], examples: tuple
) -> tuple[Site, ...]:
    taps = dict.fromkeys(paths, "output") | {n: "both" for n in norms.values() if n}
    program, values = graphs.captured_program(in_evaluation(model), taps, *examples)
    made = {id(v): i for i, eqn in enumerate(program.eqns) for v in eqn.outvars}
    sites, order = [], []
    for path in paths:
        own, norm = values[path], norms.get(path)
        relu = _relu_reads(program, own)
        # a BatchNorm that reads something else (behind the ReLU, say) is not part of the response
        if norm is not None and not relu and values[norm][0] is own:
            sites.append(Site(path, norm, _relu_reads(program, values[norm][1])))
            order.append(made[id(values[norm][1])])
        else:
            sites.append(Site(path, None, relu))
            order.append(made[id(own)])
    return tuple(site for _, site in sorted(zip(order, sites), key=lambda pair: pair[0]))


def _relu_reads(program: Any, value: Any) -> bool:
    """Whether ``max(value, 0)`` is all that a program does with a value."""
    readers = [eqn for eqn in program.eqns if any(v is value for v in eqn.invars)]
    if len(readers) != 1:
        return False
    eqn = readers[0]
    position = next(i for i, v in enumerate(eqn.invars) if v is value)
    if eqn.primitive.name == "max":
        other = eqn.invars[1 - position]
        return hasattr(other, "val") and bool(np.all(np.asarray(other.val) == 0))
    for name in ("call_jaxpr", "jaxpr"):
        inner = eqn.params.get(name)
        if inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            same = len(inner.invars) == len(eqn.invars)
            return same and _relu_reads(inner, inner.invars[position])
    return False


def gather_responses(
    model: nnx.Module, sites: Sequence[Site], batches: Batches, key: Any, positions: int
) -> dict[str, Any]:
    """Responses at random positions: ``{layer path: (samples, outputs)}``.

    Images and feature maps pass batch by batch; the samples alone are kept. The same key draws the
    same positions in every network with maps of the same sizes.

    Args:
      model: any NNX network, run in evaluation mode.
      sites: whose responses.
      batches: inputs (n, ...) or mappings with ``"image"``; may be iterated again.
      key: of the positions.
      positions: of each image's map; dense layers have one answer per input.
    """
    run, state = _responses(model, sites)

    @jax.jit
    def draw(state: Any, x: Any, key: Any) -> Any:
        return {p: _rows(key, y, positions) for p, y in run(state, x).items()}

    parts: dict[str, list[Any]] = {site.path: [] for site in sites}
    for index, x in enumerate(images(batches)):
        for path, rows in draw(state, x, jax.random.fold_in(key, index)).items():
            parts[path].append(rows)
    if not next(iter(parts.values()), [0]):
        raise ValueError("no batches: responses need at least one")
    return {path: jnp.concatenate(rows) for path, rows in parts.items()}


def response_moments(
    model: nnx.Module, sites: Sequence[Site], batches: Batches
) -> dict[str, ResponseMoments]:
    """Means and covariances of the responses over *all* positions, accumulated on the device."""
    run, state = _responses(model, sites)

    @jax.jit
    def more(state: Any, moments: Any, x: Any) -> Any:
        found = {p: y.reshape(-1, y.shape[-1]) for p, y in run(state, x).items()}
        return {p: add_moments(moments[p], y, y) for p, y in found.items()}

    moments: Any = None
    for x in images(batches):
        if moments is None:
            shapes = jax.eval_shape(run, state, x)
            moments = {p: empty_moments(y.shape[-1]) for p, y in shapes.items()}
        moments = more(state, moments, x)
    if moments is None:
        raise ValueError("no batches: responses need at least one")
    return moments


def captured_sums(
    model: nnx.Module,
    taps: Mapping[str, str],
    sums: Callable[[dict[str, Any]], Any],
    batches: Batches,
) -> Any:
    """Sums over all batches of ``sums({path: values})``, one jitted pass, kept on the device.

    Args:
      model: run in evaluation mode.
      taps: ``{path: "input" or "output"}``.
      sums: from the captured values of a batch to a pytree of sums.
      batches: inputs, arrays or mappings with ``"image"``.

    Raises:
      ValueError: no batches.
    """
    graphdef, state = nnx.split(in_evaluation(model))

    @jax.jit
    def more(state: Any, x: Any) -> Any:
        return sums(graphs.capture(nnx.merge(graphdef, state, copy=True), dict(taps))(x)[1])

    total: Any = None
    for x in images(batches):
        found = more(state, x)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("no batches: second moments need at least one")
    return total


def spectra(moments: ResponseMoments, groups: int = 1) -> np.ndarray:
    """Descending eigenvalues of a covariance, for `pca_energy_ranks`.

    Args:
      moments: of one layer.
      groups: of its outputs, in order; the result is then the mean over their spectra.
    """
    n = moments.yy.shape[0] // groups
    blocks = [np.s_[g * n : (g + 1) * n, g * n : (g + 1) * n] for g in range(groups)]
    yy = np.asarray(moments.yy, np.float64) / max(float(moments.count), 1.0)
    values = np.mean([np.linalg.eigvalsh(yy[block]) for block in blocks], axis=0)
    return np.maximum(values[::-1], 0.0)


def _responses(model: nnx.Module, sites: Sequence[Site]) -> tuple[Any, Any]:
    graphdef, state = nnx.split(in_evaluation(model))

    def run(state: Any, x: Any) -> dict[str, Any]:
        inner = nnx.merge(graphdef, state, copy=True)
        found = graphs.capture(inner, {site.tap: "output" for site in sites})(x)[1]
        return {site.path: found[site.tap] for site in sites}

    return run, state


def _rows(key: Any, y: Any, positions: int) -> Any:
    return sample_positions(key, y, positions) if y.ndim == 4 else y.reshape(-1, y.shape[-1])


def sampled(responses: Sequence[Any], key: Any, positions: int) -> Any:
    """What `gather_responses` keeps of one layer's responses, given batch by batch."""
    rows = [_rows(jax.random.fold_in(key, i), y, positions) for i, y in enumerate(responses)]
    return jnp.concatenate(rows)
