"""Where a figure was measured: kinds of hardware and versions, no names of machines."""

from __future__ import annotations

import os
import platform
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """Backend, device kind and count, CPU cores available, versions of what matters."""
    import flax
    import optax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_cores": cores,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
    }
