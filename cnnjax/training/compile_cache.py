"""JAX's persistent compilation cache: the second start of a program compiles nothing."""

from __future__ import annotations

import os
import pathlib

import jax


def default_cache_dir() -> pathlib.Path:
    """``$XDG_CACHE_HOME/cnnjax/xla``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "cnnjax" / "xla"


def enable_compilation_cache(
    path: str | os.PathLike[str] | bool | None = None, *, min_seconds: int | float = 0.2
) -> pathlib.Path | None:
    """Turns the persistent compilation cache on (scripts call this first) or off.

    Args:
      path: folder; None or True: ``$JAX_COMPILATION_CACHE_DIR`` if set, else
        `default_cache_dir`; False: off.
      min_seconds: programs that compile faster are not stored.

    Returns:
      The folder in use, None if off.

    Raises:
      OSError: if the folder cannot be made.
    """
    if path is False:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if path is None or path is True:
        path = os.environ.get("JAX_COMPILATION_CACHE_DIR") or default_cache_dir()
    folder = pathlib.Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder
