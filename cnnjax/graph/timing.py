"""Time and energy of a function on the present device."""

from __future__ import annotations

import dataclasses
import glob
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

# 45 nm, pJ per 32-bit operation: the table that Han et al. 2015 (arXiv 1506.02626) print
_PJ_MULTIPLY, _PJ_ADD, _PJ_DRAM = 3.7, 0.9, 640.0


@dataclasses.dataclass(frozen=True)
class Latency:
    """Wall-clock times of one call, in seconds.

    Attributes:
      median, p90, best: over the timed calls, after warm-up.
      compile: tracing and compilation; 0-ish when the compilation cache holds the program.
      throughput: examples per second at the median.
      batch: examples in one call.
      calls: how many calls were timed.
      device: kind of the device that ran it.
    """

    median: float
    p90: float
    best: float
    compile: float
    throughput: float
    batch: int
    calls: int
    device: str

    def to_json(self) -> dict[str, Any]:
        """All figures as a JSON-able dict."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"median {1e3 * self.median:.3f} ms, p90 {1e3 * self.p90:.3f} ms, "
            f"{self.throughput:.1f} examples/s (batch {self.batch}, {self.calls} calls, "
            f"{self.device}); compiled in {self.compile:.2f} s"
        )


@dataclasses.dataclass(frozen=True)
class Energy:
    """Energy of one call.

    Attributes:
      joules: per call.
      source: ``"nvml"`` or ``"rapl"`` (measured), or ``"proxy"`` (estimated from counts).
      note: what the figure includes.
    """

    joules: float
    source: str
    note: str

    @property
    def measured(self) -> bool:
        """False for the proxy."""
        return self.source != "proxy"


def prepare(fn: nnx.Module | Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], float]:
    """Compiles a call; returns ``(run, seconds to compile)``; ``run()`` waits for the result."""
    if isinstance(fn, nnx.Module):
        graphdef, state = nnx.split(fn)

        def program(state: Any, *args: Any) -> Any:
            return nnx.merge(graphdef, state, copy=True)(*args)

        args = (state, *args)
    else:
        program = fn
    start = time.perf_counter()
    compiled = jax.jit(program).lower(*args).compile()
    seconds = time.perf_counter() - start
    args = jax.tree.map(lambda x: jax.device_put(x), args)
    return lambda: jax.block_until_ready(compiled(*args)), seconds


def latency(
    fn: nnx.Module | Callable[..., Any],
    *args: Any,
    calls: int = 30,
    warmup: int = 3,
    seconds: float = 10.0,
    batch: int | None = None,
) -> Latency:
    """Times a jitted call of ``fn(*args)`` on the default device.

    Args:
      fn: an NNX module or a function of arrays.
      *args: concrete arguments.
      calls: timed calls.
      warmup: calls before.
      seconds: stop timing after this long (at least 3 calls are timed).
      batch: examples in one call; the first axis of the first argument by default.

    Raises:
      ValueError: if ``calls`` < 1 or ``warmup`` < 0.
    """
    only = latencies({"": fn}, *args, calls=calls, warmup=warmup, seconds=seconds, batch=batch)
    return only[""]


def latencies(
    fns: Mapping[str, nnx.Module | Callable[..., Any]],
    *args: Any,
    calls: int = 30,
    warmup: int = 3,
    seconds: float = 10.0,
    batch: int | None = None,
) -> dict[str, Latency]:
    """Times several networks on the same arguments, in turns: one call of each after the other.

    So a disturbance of the machine falls on all of them, and their ratios mean something.

    Args:
      fns: name -> NNX module or function of arrays.
      *args, calls, warmup, batch: as for `latency`.
      seconds: stop timing after this long for each (at least 3 calls of each are timed).

    Raises:
      ValueError: if ``calls`` < 1 or ``warmup`` < 0.
    """
    if calls < 1 or warmup < 0:
        raise ValueError(f"calls must be >= 1 and warmup >= 0, got {calls} and {warmup}")
    ready = {name: prepare(fn, *args) for name, fn in fns.items()}
    for _ in range(warmup):
        for run, _ in ready.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in fns}
    end = time.perf_counter() + seconds * len(ready)
    for i in range(calls):
        for name, (run, _) in ready.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if i >= 2 and time.perf_counter() > end:
            break
    if batch is None:
        batch = _batch(args)
    return {
        name: Latency(
            median=float(np.median(taken)),
            p90=float(np.percentile(taken, 90)),
            best=min(taken),
            compile=ready[name][1],
            throughput=batch / float(np.median(taken)),
            batch=batch,
            calls=len(taken),
            device=jax.devices()[0].device_kind,
        )
        for name, taken in times.items()
    }


def _batch(args: tuple[Any, ...]) -> int:
    shapes = [np.shape(x) for x in jax.tree.leaves(args)]
    return shapes[0][0] if shapes and shapes[0] else 1


def proxy_energy(macs: int, nbytes: int) -> Energy:
    """The estimate ``MACs * (multiply + add) + bytes / 4 * DRAM`` at 45 nm (Han et al. 2015).

    Args:
      macs: multiply-accumulates of one call.
      nbytes: bytes moved from and to memory, e.g. parameters plus activations.
    """
    joules = 1e-12 * (macs * (_PJ_MULTIPLY + _PJ_ADD) + nbytes / 4 * _PJ_DRAM)
    return Energy(joules, "proxy", "estimate: 45 nm, 4.6 pJ per MAC, 160 pJ per byte of DRAM")


def energy(
    fn: nnx.Module | Callable[..., Any],
    *args: Any,
    macs: int | None = None,
    nbytes: int | None = None,
    seconds: float = 2.0,
) -> Energy:
    """Energy of one call: NVML's or RAPL's counter around repeated calls, else the proxy.

    A counter measures the whole GPU or CPU package, so nothing else should run meanwhile.

    Args:
      fn: an NNX module or a function of arrays.
      *args: concrete arguments.
      macs, nbytes: counts of one call for the proxy, e.g. from `profile`.
      seconds: how long to repeat the call (counters tick every millisecond to every 0.1 s).

    Raises:
      ValueError: if there is no counter and the counts for the proxy are missing.
    """
    counter = _counter()
    if counter is None:
        if macs is None or nbytes is None:
            raise ValueError(
                "this machine has no energy counter that can be read (NVML, RAPL); pass macs= and "
                "nbytes= for the proxy"
            )
        return proxy_energy(macs, nbytes)
    read, source = counter
    run, _ = prepare(fn, *args)
    run()
    before, start, calls = read(), time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        run()
        calls += 1
    return Energy((read() - before) / calls, source, f"whole device, mean of {calls} calls")


def _counter() -> tuple[Callable[[], float], str] | None:
    """(a function that reads joules, its name) of the present device, or None."""
    if jax.default_backend() == "gpu":
        try:
            import pynvml  # pyright: ignore[reportMissingImports]

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception:  # no library, no driver, or a card without the counter
            return None
        return lambda: 1e-3 * pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), "nvml"
    files = sorted(glob.glob("/sys/class/powercap/intel-rapl:*/energy_uj"))
    packages = [f for f in files if f.split("/")[-2].count(":") == 1]

    def read() -> float:
        total = 0.0
        for name in packages:
            with open(name) as file:
                total += 1e-6 * int(file.read())
        return total

    try:
        read()
    except OSError:
        return None
    return (read, "rapl") if packages else None
