"""Latency of a decision: measured on the shrunk network, or predicted from a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.graph import Graph, Layer, latency
from cnnjax.pruning.costs import Cost, CostModel
from cnnjax.pruning.shrink import shrink


def measured_latency(
    model: nnx.Module, graph: Graph, *inputs: Any, calls: int = 20, warmup: int = 2
) -> Cost:
    """A cost for ``select_channels(latency=..., cost=...)``: shrinks, compiles, and measures.

    Every decision is measured once and remembered.

    Args:
      model: the original, with numbers or abstract.
      graph: of the model.
      *inputs: example inputs; those of ``graph`` by default.
      calls, warmup: of each measurement.

    Returns:
      ``alive -> seconds`` (the median).
    """
    blank = surgery.abstract(nnx.view(
        model, deterministic=True, use_running_average=True, raise_if_not_found=False
    ))  # fmt: skip
    args = tuple(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), i)
                 for i in inputs or graph.inputs)  # fmt: skip
    known: dict[bytes, float] = {}

    def cost(alive: np.ndarray) -> float:
        key = np.packbits(alive).tobytes()
        if key not in known:
            small = shrink(blank, graph, alive)
            filled = surgery.map_leaves(small, lambda _, x: _ones(x))
            known[key] = latency(filled, *args, calls=calls, warmup=warmup).median
        return known[key]

    return cost


def _ones(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.ones(x.shape, x.dtype)


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of each kind of layer at several widths; a cost for `select_channels`.

    Attributes:
      points: fractions of the widths at which the layers were measured, rising to 1.
      seconds: for each layer of the graph (kind, shapes and stride as text) a nested list of
        (input fraction, output fraction).
      device: where it was measured.
    """

    points: tuple[float, ...]
    seconds: Mapping[str, list[list[float]]]
    device: str

    def cost(self, graph: Graph) -> Cost:
        """``alive -> seconds``: the sum over the layers, interpolated between the points.

        Raises:
          ValueError: if a layer of the graph is not in the table.
        """
        layers = [layer for layer in graph.layers if _key(layer) is not None]
        missing = [layer.path for layer in layers if _key(layer) not in self.seconds]
        if missing:
            raise ValueError(f"the latency table lacks the layer {missing[0]!r}; measure it anew")
        model = CostModel(graph)
        tables = [np.asarray(self.seconds[str(_key(layer))]) for layer in layers]

        def seconds(alive: np.ndarray) -> float:
            left = model.widths(alive)
            total = 0.0
            for layer, table in zip(layers, tables):
                total += _interpolate(self.points, table, *left[str(layer.kernel)])
            return total

        return seconds

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict."""
        return {**dataclasses.asdict(self), "seconds": dict(self.seconds)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `to_json`."""
        return cls(tuple(data["points"]), data["seconds"], data["device"])


def latency_table(
    graph: Graph, *, points: tuple[float, ...] = (0.25, 0.5, 1.0), calls: int = 10
) -> LatencyTable:
    """Measures every distinct convolution and dense layer of a graph at several widths.

    Args:
      graph: of the network; its inputs' batch and image size are what is measured.
      points: fractions of input and output widths, rising to 1.
      calls: of each measurement.

    Raises:
      ValueError: if ``points`` don't rise to 1.
    """
    if list(points) != sorted(set(points)) or not points or points[-1] != 1 or points[0] <= 0:
        raise ValueError(f"points must rise from above 0 to 1, got {points}")
    found: dict[str, list[list[float]]] = {}
    for layer in graph.layers:
        key = _key(layer)
        if key is None or key in found:
            continue
        times = np.array([[_time(layer, a, b, calls) for b in points] for a in points])
        # a narrower layer is not slower: what looks like it is noise
        times = np.maximum.accumulate(np.maximum.accumulate(times, axis=0), axis=1)
        found[key] = times.tolist()
    return LatencyTable(tuple(map(float, points)), found, jax.devices()[0].device_kind)


def _key(layer: Layer) -> str | None:
    if layer.kind not in ("conv", "dense") or layer.kernel is None or layer.in_axis is None:
        return None
    return (
        f"{layer.kind} {layer.input_shape} {layer.kernel_shape} stride {layer.stride} dilation "
        f"{layer.dilation} padding {layer.padding} groups {layer.groups}"
    )


def _time(layer: Layer, a: float, b: float, calls: int) -> float:
    *taps, per_group, outs = layer.kernel_shape
    groups = layer.groups
    depthwise = groups > 1 and per_group == 1
    if depthwise:
        # one width: the layer's channels
        multiplier = outs // groups
        groups = max(1, round(min(a, b) * groups))
        ins, outs = groups, groups * multiplier
    else:
        ins = groups * max(1, round(a * per_group))
        outs = groups * max(1, round(b * outs / groups))
    kernel = jnp.zeros((*taps, ins // groups, outs))
    batch, rest = layer.input_shape[0], math.prod(layer.input_shape[1:])
    old = per_group * layer.groups
    if layer.kind == "dense":
        x = jnp.zeros((batch * rest // old, ins))
        return latency(lambda x, k: x @ k, x, kernel, calls=calls, warmup=1).median
    axis = layer.in_axis or 0
    spatial = [n for d, n in enumerate(layer.input_shape) if d not in (0, axis)]
    x = jnp.zeros((batch, *spatial, ins))
    dims = ("NHWC", "HWIO", "NHWC") if len(spatial) == 2 else None
    if dims is None:
        letters = "DHW"[-len(spatial) :]
        dims = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def run(x: Any, k: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x,
            k,
            layer.stride,
            layer.padding,
            rhs_dilation=layer.dilation,
            dimension_numbers=dims,
            feature_group_count=groups,
        )

    return latency(run, x, kernel, calls=calls, warmup=1).median


def _interpolate(points: tuple[float, ...], table: np.ndarray, a: float, b: float) -> float:
    rows = [float(np.interp(b, points, row)) for row in table]
    return float(np.interp(a, points, rows))
