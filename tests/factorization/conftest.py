"""Layers get their numbers from NumPy: JAX's truncated normal compiles seconds for each shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


def _lecun(key, shape, dtype=jnp.float32):
    """Normal numbers of the default initializer's variance."""
    seed = np.asarray(jax.random.key_data(key)).astype(np.uint32).tolist()
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(numbers / np.sqrt(max(1, np.prod(shape[:-1]))), dtype)


@pytest.fixture(scope="module")
def numpy_kernels():
    """The default ``kernel_init`` of NNX layers, where nothing is traced."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (nnx.Conv, nnx.Linear):
            defaults: Any = kind.__init__.__kwdefaults__
            before = defaults["kernel_init"]

            def init(key, shape, dtype=jnp.float32, before=before):
                drawn = before if isinstance(key, jax.core.Tracer) else _lecun
                return drawn(key, shape, dtype)

            patch.setitem(defaults, "kernel_init", init)
        yield
