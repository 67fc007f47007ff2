"""Tensor-train factors of a convolution kernel (beyond the survey)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.factorization.matrix import check_rank, working
from cnnjax.typing import AnyArray


@functools.partial(jax.jit, static_argnames="ranks")
def tensor_train(
    tensor: Float[AnyArray, ...], ranks: tuple[int, ...]
) -> list[Float[Array, "_ _ _"]]:
    """TT-SVD: cores G_k (r_{k-1}, n_k, r_k), ``T[i1,...,iN] = G1[:,i1] G2[:,i2] ... GN[:,iN]``.

    Args:
      tensor: N-way array.
      ranks: the N-1 inner ranks; each at most the smaller side of its unfolding, given the rank
        before.

    Raises:
      ValueError: for a wrong number of ranks or one out of range (names the maximum).

    Reference:
      Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33(5), 2011.
    """
    tensor = working(tensor)
    shape = tensor.shape
    if len(ranks) != len(shape) - 1:
        raise ValueError(f"{len(ranks)} ranks for {len(shape)} modes; expected {len(shape) - 1}")
    cores, rest, left = [], tensor.reshape(1, -1), 1
    for mode, rank in enumerate(ranks):
        matrix = rest.reshape(left * shape[mode], -1)
        check_rank(rank, min(matrix.shape), f"tensor_train bond {mode}")
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        cores.append(u[:, :rank].reshape(left, shape[mode], rank))
        rest, left = s[:rank, None] * vt[:rank], rank
    cores.append(rest.reshape(left, shape[-1], 1))
    return cores


def compose_tensor_train(cores: Sequence[Float[AnyArray, "_ _ _"]]) -> Float[Array, ...]:
    """The full tensor of tensor-train cores."""
    out = jnp.asarray(cores[0])
    for core in cores[1:]:
        out = jnp.tensordot(out, core, axes=([-1], [0]), precision="highest")
    return out[0, ..., 0]


def tt_conv_cores(
    kernel: Float[AnyArray, "kh kw i o"],
    in_factors: Sequence[int],
    out_factors: Sequence[int],
    ranks: tuple[int, ...],
) -> list[Array]:
    """Tensor train of a kernel over the modes (kh*kw, i1*o1, ..., id*od).

    Args:
      kernel: (kh, kw, i, o) with ``i = prod(in_factors)``, ``o = prod(out_factors)``.
      in_factors: d numbers.
      out_factors: d numbers.
      ranks: d inner ranks.

    Reference:
      Garipov et al., "Ultimate tensorization: compressing convolutional and FC layers alike",
      2016, arXiv 1611.03214.
    """
    _check_factors(kernel.shape, in_factors, out_factors)
    return tensor_train(_interleave(jnp.asarray(kernel), in_factors, out_factors), ranks)


def compose_tt_conv(
    cores: Sequence[Array],
    kernel_size: tuple[int, int],
    in_factors: Sequence[int],
    out_factors: Sequence[int],
) -> Float[Array, "kh kw i o"]:
    """The kernel of `tt_conv_cores`."""
    d = len(in_factors)
    pairs = [n for pair in zip(in_factors, out_factors) for n in pair]
    tensor = compose_tensor_train(cores).reshape(*kernel_size, *pairs)
    order = [0, 1, *range(2, 2 + 2 * d, 2), *range(3, 2 + 2 * d, 2)]
    i, o = int(np.prod(in_factors)), int(np.prod(out_factors))
    return tensor.transpose(order).reshape(*kernel_size, i, o)


def _check_factors(shape: Sequence[int], ins: Sequence[int], outs: Sequence[int]) -> None:
    if len(ins) != len(outs) or not ins:
        raise ValueError(f"{len(ins)} input and {len(outs)} output factors: expected equal numbers")
    if int(np.prod(ins)) != shape[2] or int(np.prod(outs)) != shape[3]:
        raise ValueError(
            f"factors {tuple(ins)} and {tuple(outs)} do not multiply to the kernel's {shape[2]} "
            f"inputs and {shape[3]} outputs"
        )


def _interleave(kernel: Array, ins: Sequence[int], outs: Sequence[int]) -> Array:
    kh, kw = kernel.shape[:2]
    d = len(ins)
    split = kernel.reshape(kh * kw, *ins, *outs)
    order = [0, *(axis for k in range(d) for axis in (1 + k, 1 + d + k))]
    return split.transpose(order).reshape(kh * kw, *(a * b for a, b in zip(ins, outs)))
