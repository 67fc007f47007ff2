"""A user's factory, importable by the tests and by the processes that they start."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx


class Small(nnx.Module):
    """Two convolutions with BatchNorm and dropout, a lambda and a numpy attribute."""

    def __init__(self, width, *, rngs):
        self.conv1 = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), dtype=jnp.bfloat16, rngs=rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)
        self.act = lambda x: nnx.relu(x)
        self.table = np.arange(4)

    def __call__(self, x):
        x = self.act(self.norm(self.conv1(x)))
        x = self.drop(x) + self.conv2(x).astype(x.dtype)
        return self.head(x.mean((1, 2))) + self.table


def make(width=6, *, rngs):
    return Small(width, rngs=rngs)


def make_other(width=6, *, rngs):
    return nnx.Linear(width, 4, rngs=rngs)
