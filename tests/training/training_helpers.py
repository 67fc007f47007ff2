"""Tiny networks and an in-memory data iterator for the tests of training (also in subprocesses)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

CHANNELS, SIZE, CLASSES = 4, 6, 5


def _kernel(key, shape, dtype=jnp.float32, out_sharding=None):
    """A cheap, fixed initializer: no random-number compilation, numpy only."""
    del key, out_sharding
    rng = np.random.default_rng(int(np.prod(shape)))
    fan = np.prod(shape[:-1])
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(fan), dtype)


class TinyConv(nnx.Module):
    """Convolution, BatchNorm, dropout, a list with one linear layer."""

    def __init__(self, *, rngs: nnx.Rngs, dropout: float = 0.3, norm: bool = True) -> None:
        self.conv = nnx.Conv(1, CHANNELS, (3, 3), kernel_init=_kernel, rngs=rngs)
        self.norm = nnx.BatchNorm(CHANNELS, momentum=0.9, rngs=rngs) if norm else None
        self.conv2 = nnx.Conv(CHANNELS, CHANNELS, (3, 3), kernel_init=_kernel, rngs=rngs)
        self.norm2 = nnx.BatchNorm(CHANNELS, momentum=0.9, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.head = nnx.List([nnx.Linear(CHANNELS, CLASSES, kernel_init=_kernel, rngs=rngs)])

    def __call__(self, x):
        for conv, norm in ((self.conv, self.norm), (self.conv2, self.norm2)):
            x = conv(x)
            x = jax.nn.relu(x if norm is None else norm(x))
        x = jnp.mean(x, axis=(1, 2))
        if self.dropout is not None:
            x = self.dropout(x)
        return self.head[0](x)


class TinyMLP(nnx.Module):
    """Two linear layers, neither BatchNorm nor dropout."""

    def __init__(self, *, rngs: nnx.Rngs, hidden: int = 8) -> None:
        self.first = nnx.Linear(SIZE * SIZE, hidden, kernel_init=_kernel, rngs=rngs)
        self.second = nnx.Linear(hidden, CLASSES, kernel_init=_kernel, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x.reshape(x.shape[0], -1))))


def arrays(n: int = 96, seed: int = 0):
    """Images ``(n, 6, 6, 1)`` whose brightest column tells the class, and labels."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n)
    image = rng.normal(size=(n, SIZE, SIZE, 1)).astype(np.float32)
    image[np.arange(n), :, label, 0] += 1.5
    return {"image": image, "label": label.astype(np.int32)}


class ArrayIterator:
    """Endless shuffled batches of arrays in memory; the position is one integer."""

    def __init__(self, data, batch: int, seed: int = 0, *, part: int = 0, parts: int = 1) -> None:
        self.data, self.batch, self.seed, self.index = data, batch, seed, 0
        self.part, self.parts = part, parts
        self.per_epoch = len(data["label"]) // batch

    def __iter__(self):
        return self

    def __next__(self):
        epoch, i = divmod(self.index, self.per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.data["label"]))
        rows = order[i * self.batch : (i + 1) * self.batch]
        share = self.batch // self.parts  # this process's rows, in the order of the whole batch
        rows = rows[self.part * share : (self.part + 1) * share]
        self.index += 1
        return {k: v[rows] for k, v in self.data.items()}

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def digest(tree) -> str:
    """Hash of the bytes of all leaves."""
    import hashlib

    h = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        h.update(np.asarray(leaf).tobytes())
    return h.hexdigest()
