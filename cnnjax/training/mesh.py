"""Data parallelism: a one-axis mesh, replicated state, batches split over the devices.

Under ``jax.jit`` the program is written for the global batch, so BatchNorm statistics and losses
are global without further code. One process runs per host; each loads its own share of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh ``('data',)`` over all devices of all processes, or over the given ones."""
    devices = jax.devices() if devices is None else list(devices)
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Fresh copies of the arrays, whole on every device of the mesh.

    With several processes every process must pass the same values.
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    impls = [jax.random.key_impl(leaf) if k else None for leaf, k in zip(leaves, is_key)]
    # host values: with several processes jit takes no arrays that live on one device
    host = [np.asarray(jax.random.key_data(x) if k else x) for x, k in zip(leaves, is_key)]

    def wrap(values: list[Any]) -> list[Any]:
        return [
            v if impl is None else jax.random.wrap_key_data(v, impl=impl)
            for v, impl in zip(values, impls)
        ]

    out = jax.jit(wrap, out_shardings=NamedSharding(mesh, PartitionSpec()))(host)
    return jax.tree.unflatten(treedef, out)


def shard_batch(batch: PyTree, mesh: Mesh, *, stacked: bool = False) -> PyTree:
    """Global arrays of this process's share of a batch.

    Args:
      batch: host arrays ``(n_local, ...)``; ``(k, n_local, ...)`` if ``stacked``.
      mesh: from `data_mesh`.
      stacked: the batch axis is the second one (several steps in one call).

    Returns:
      Arrays ``(n_global, ...)`` or ``(k, n_global, ...)`` split over the axis ``data``.

    Raises:
      ValueError: if the rows do not divide over this process's devices.
    """
    axis = int(stacked)
    spec = PartitionSpec(None, "data") if stacked else PartitionSpec("data")
    sharding = NamedSharding(mesh, spec)
    local = max(len(mesh.local_devices), 1)

    def put(a: Any) -> Any:
        a = np.asarray(a)
        if a.shape[axis] % local:
            raise ValueError(
                f"a batch of {a.shape[axis]} rows on this process does not divide over its "
                f"{local} devices; choose a multiple, or pad it (pad_batch)"
            )
        return jax.make_array_from_process_local_data(sharding, a)

    return jax.tree.map(put, batch)


def pad_batch(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Pads a host batch to ``size`` rows with zeros and gives ``weight`` 0 to the padding.

    Raises:
      ValueError: if the batch is already larger.
    """
    n = len(next(iter(batch.values())))
    if n > size:
        raise ValueError(f"a batch of {n} rows cannot be padded to {size}")
    out = dict(batch)
    out.setdefault("weight", np.ones(n, np.float32))
    if n == size:
        return out
    return {
        k: np.concatenate([v, np.zeros((size - n, *np.shape(v)[1:]), np.asarray(v).dtype)])
        for k, v in out.items()
    }


def _from_environment(name: str, value: int | None) -> int | None:
    if value is not None or name not in os.environ:
        return value
    text = os.environ[name]
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r}; expected a number")
    return int(text)


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process to a run over several hosts; call it before anything else of JAX.

    Without arguments the cluster is detected (TPU pod slices, Slurm...), unless the environment
    says where it is: ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``. On
    CPU the collectives run over Gloo.

    Args:
      coordinator: ``host:port`` of process 0.
      num_processes: how many processes run.
      process_id: number of this process.

    Raises:
      ValueError: if only some of the three are given, or a number is not one.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _from_environment("JAX_NUM_PROCESSES", num_processes)
    process_id = _from_environment("JAX_PROCESS_ID", process_id)
    given = [coordinator is not None, num_processes is not None, process_id is not None]
    if any(given) and not all(given):
        raise ValueError(
            f"coordinator {coordinator!r}, num_processes {num_processes!r}, process_id "
            f"{process_id!r}: give all three (or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID), or none where JAX can detect the cluster"
        )
    # only CPU devices read this setting
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes, process_id)
