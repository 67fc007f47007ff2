"""What result files of the benchmarks say of the machine, and how they are written."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from typing import Any

import jax

from cnnjax import files


def machine() -> dict[str, Any]:
    """Backend, device, architecture, cores of this process, version of JAX."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }


def write(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes a result file by one rename; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(record, indent=1) + "\n")
