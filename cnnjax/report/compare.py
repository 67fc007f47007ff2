"""Several networks side by side: accuracy, counts, bytes, latency, throughput, energy.

What the survey asks of an evaluation, in one call. Times are taken in turns, one call of each
network after the other, so a disturbance of the machine falls on all of them; ratios are to the
first network. Masks lower effective MACs and file sizes, never dense MACs; only a smaller network
is expected to be faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import coding, graph
from cnnjax.report.cost import measure
from cnnjax.report.tables import human, text_table


def compare(
    networks: Mapping[str, nnx.Module],
    images: Any,
    labels: Any = None,
    *,
    batches: Sequence[int] = (1, 32),
    calls: int = 30,
    coded: Mapping[str, bytes] | None = None,
    energy: bool = True,
) -> dict[str, dict[str, Any]]:
    """Measures networks on the same images, on the present device.

    Args:
      networks: name -> NNX module in evaluation mode; the first is what the others are compared to.
      images: ``(n, h, w, c)`` float; as preprocessed for the networks, at least ``max(batches)``.
      labels: ``(n,)`` integers, or None: no accuracy.
      batches: images in one timed call; the first is also that of the energy figure.
      calls: timed calls of each network, in turns, after two for warming up.
      coded: name -> bytes of the network's compressed file (`cnnjax.coding.pack`), where there is
        one.
      energy: measure or estimate the energy of a call.

    Returns:
      name -> counts of `measure`, and: ``top1``, ``top5``, ``top1_change`` (shares of 1; top-5 only
      from six classes on); ``coded`` (bytes dense, CSR, index + codebook, Huffman, file);
      ``latency``: batch -> ``median``, ``p90``, ``best`` (seconds), ``throughput`` (images/s),
      ``compile`` (seconds), ``speedup``; ``energy``: ``joules`` a call and its ``source`` ("proxy"
      is an estimate from counts); ``macs_ratio``, ``params_ratio`` (first / this); ``device``.

    Raises:
      ValueError: no network, too few images, labels of another length, a file of no network.
    """
    images = np.asarray(images)
    if not networks:
        raise ValueError("compare needs at least one network, got none")
    if images.ndim < 2 or not batches or min(batches) < 1 or len(images) < max(batches):
        raise ValueError(
            f"the timed calls take {tuple(batches)} images, got images of shape {images.shape}; "
            "give at least that many, or smaller batches"
        )
    if labels is not None and np.shape(labels) != (len(images),):
        raise ValueError(f"{len(images)} images but labels of shape {np.shape(labels)}")
    if strange := sorted(set(coded or {}) - set(networks)):
        raise ValueError(f"coded holds {strange}, the networks are {list(networks)}")
    rows: dict[str, dict[str, Any]] = {}
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    for name, model in networks.items():
        rows[name] = row = {**measure(model, one), "device": jax.devices()[0].device_kind}
        if labels is not None:
            row |= _accuracy(model, images, np.asarray(labels), max(batches))
        if coded and name in coded:
            row["coded"] = coding.report(coded[name]).as_dict()["bytes"]
        if energy:
            profile = graph.profile(
                model, jax.ShapeDtypeStruct((batches[0], *images.shape[1:]), images.dtype)
            )
            moved = profile.param_bytes + profile.activation_total
            used = graph.energy(
                model, images[: batches[0]], macs=batches[0] * profile.macs, nbytes=moved
            )
            row["energy"] = {"joules": used.joules, "source": used.source, "note": used.note}
    for batch in batches:
        timed = graph.latencies(networks, images[:batch], calls=calls, warmup=2)
        for name, times in timed.items():
            rows[name].setdefault("latency", {})[batch] = times.to_json()
    first = next(iter(rows.values()))
    for row in rows.values():
        row["macs_ratio"] = first["macs"] / max(row["macs"], 1)
        row["params_ratio"] = first["params"] / max(row["params"], 1)
        if labels is not None:
            row["top1_change"] = row["top1"] - first["top1"]
        for batch in batches:
            row["latency"][batch]["speedup"] = (
                first["latency"][batch]["median"] / row["latency"][batch]["median"]
            )
    return rows


def _accuracy(
    model: nnx.Module, images: np.ndarray, labels: np.ndarray, batch: int
) -> dict[str, float]:
    graphdef, state = nnx.split(model)

    @jax.jit
    def ranks(state: Any, x: Any, y: Any) -> Any:
        logits = nnx.merge(graphdef, state, copy=True)(x)
        own = jnp.take_along_axis(logits, y[:, None], 1)
        return jnp.sum(logits > own, axis=1), logits.shape[1]

    batch = min(256, max(batch, 32), len(images))
    found, classes = [], 0
    for start in range(
        0, len(images), batch
    ):  # the last batch reaches back: one shape, one program
        low = min(start, len(images) - batch)
        rank, classes = ranks(state, images[low : low + batch], labels[low : low + batch])
        found.append(np.asarray(rank)[start - low :])
    rank = np.concatenate(found)
    out = {"top1": float(np.mean(rank == 0))}
    if int(classes) > 5:
        out["top5"] = float(np.mean(rank < 5))
    return out


def comparison_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What `compare` found, for the terminal: one line a network, one speed column a batch."""
    batches = list(next(iter(rows.values()))["latency"])
    header = ["network", "top-1 %", "params", "non-zeros", "MACs", "effective", "bytes", "file"]
    header += [f"ms at {b}" for b in batches] + [f"speed-up at {b}" for b in batches] + ["energy"]
    table = []
    for name, row in rows.items():
        used = row.get("energy")
        mark = "" if used is None or used["source"] != "proxy" else " (proxy)"
        table.append(
            [
                name,
                f"{100 * row['top1']:.2f}" if "top1" in row else "-",
                human(row["params"]),
                human(row["nonzeros"]),
                human(row["macs"]),
                human(row["effective_macs"]),
                f"{row['bytes']:,}",
                f"{row['coded']['file']:,}" if "coded" in row else "-",
                *(f"{1e3 * row['latency'][b]['median']:.2f}" for b in batches),
                *(f"{row['latency'][b]['speedup']:.2f}x" for b in batches),
                "-" if used is None else f"{1e3 * used['joules']:.3g} mJ{mark}",
            ]
        )
    return text_table(header, table)
