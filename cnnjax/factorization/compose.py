"""The kernel that a chain of convolutions amounts to, and chains fitted to data by gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from cnnjax.factorization.chain import Chain, chain_apply
from cnnjax.typing import AnyArray


def compose_chain(chain: Chain, kernel_size: Sequence[int], groups: int = 1) -> Float[Array, "..."]:
    """The kernel (kh, kw, i/groups, o) that computes what the chain does.

    Exact for every linear chain of these shapes, also at the borders of zero-padded images.

    Args:
      chain: kernels and geometry; strides, padding and dilation don't matter.
      kernel_size: (kh, kw) of the result.
      groups: of the layer that the chain replaces.
    """
    kh, kw = kernel_size
    plain = tuple(
        dataclasses.replace(s, strides=(1, 1), padding="VALID", dilation=(1, 1))
        for s in chain.specs
    )
    inputs = chain.kernels[0].shape[2] * chain.specs[0].groups
    # the answers to an impulse on each input channel are the kernel's taps, turned around
    impulses = jnp.zeros((inputs, 2 * kh - 1, 2 * kw - 1, inputs))
    impulses = impulses.at[jnp.arange(inputs), kh - 1, kw - 1, jnp.arange(inputs)].set(1.0)
    answers = chain_apply(Chain(chain.kernels, plain, orders=chain.orders), impulses)
    full = answers[:, ::-1, ::-1].transpose(1, 2, 0, 3)
    if groups == 1:
        return full
    outputs = full.shape[-1]
    blocks = full.reshape(kh, kw, groups, inputs // groups, groups, outputs // groups)
    own = blocks[:, :, jnp.arange(groups), :, jnp.arange(groups)]  # (g, kh, kw, i, o)
    return jnp.moveaxis(own, 0, 3).reshape(kh, kw, inputs // groups, outputs)


@functools.partial(jax.jit, static_argnames=("steps", "batch", "relu"))
def _descend(key, chain, x, z, steps, rate, batch, relu):
    def error(chain, x, z):
        y = chain_apply(chain, x)
        if relu:
            y, z = jax.nn.relu(y), jax.nn.relu(z)
        return jnp.mean((y - z) ** 2)

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, key):
        chain, state = carry
        rows = jax.random.choice(key, x.shape[0], (batch,), replace=False)
        grads = jax.grad(error)(chain, x[rows], z[rows])
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(chain, updates), state), None

    keys = jax.random.split(key, steps)
    (fitted, _), _ = jax.lax.scan(step, (chain, optimizer.init(chain)), keys)
    before, after = error(chain, x, z), error(fitted, x, z)
    better = after < before
    kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), fitted, chain)
    return kept, before, jnp.minimum(before, after)


def data_reconstruct(
    key: Array,
    chain: Chain,
    x: Float[AnyArray, "n h w i"],
    z: Float[AnyArray, "m h2 w2 o"],
    *,
    steps: int = 300,
    rate: float = 1e-3,
    batch: int = 32,
    relu: bool = False,
) -> tuple[Chain, Array, Array]:
    """All factors of a chain fitted to data by Adam: ``min mean |chain(x) - z|^2``.

    Args:
      key: of the mini-batches.
      chain: the start: the solution on the weights.
      x: inputs, those of the network compressed so far (then later layers absorb earlier errors).
      z: answers of the original layer on the original inputs, before its non-linearity.
      steps: of Adam, with a learning rate that decays to zero.
      rate: its learning rate.
      batch: images in a step.
      relu: compare behind a ReLU.

    Returns:
      The chain, its mean squared error before, and after. Never worse than the start.

    Raises:
      ValueError: fewer images than ``batch``, or different numbers of them.

    Reference:
      Jaderberg et al., BMVC 2014, arXiv 1405.3866, section 3.2.
    """
    if x.shape[0] != z.shape[0] or x.shape[0] < batch:
        raise ValueError(
            f"{x.shape[0]} inputs and {z.shape[0]} answers: equal numbers of at least {batch} "
            "images (batch=) are needed"
        )
    fields: Any = (jnp.asarray(x), jnp.asarray(z))
    return _descend(key, chain, *fields, steps, rate, batch, relu)
