"""Compact feature maps through circulant matrices (Wang et al.)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnnjax.factorization.matrix import check_rank, einsum, matmul, working
from cnnjax.typing import AnyArray


def circulant_matrix(r: Float[AnyArray, "d"]) -> Float[Array, "d d"]:
    """``R[j, k] = r[(j - k) mod d]``."""
    r = jnp.asarray(r)
    d = r.shape[0]
    return r[(jnp.arange(d)[:, None] - jnp.arange(d)[None]) % d]


def circulant_product(r: Float[AnyArray, "d"], y: Float[AnyArray, "*n d"]) -> Array:
    """``R y`` along the last axis in d log d steps, ``R = circulant_matrix(r)``."""
    spectrum = jnp.fft.rfft(jnp.asarray(r))
    return jnp.fft.irfft(spectrum * jnp.fft.rfft(jnp.asarray(y)), n=r.shape[0])


def nearest_circulant(matrix: Float[AnyArray, "d d"]) -> Float[Array, "d"]:
    """First column of the Frobenius-nearest circulant: the means of the wrapped diagonals."""
    m = jnp.asarray(matrix)
    d = m.shape[0]
    k = jnp.arange(d)
    return m[(k[:, None] + k[None]) % d, k[None]].mean(1)


def orthogonal_circulant(phases: Float[AnyArray, "p"], d: int) -> Float[Array, "d"]:
    """A real r whose circulant matrix is orthogonal, from its free phases.

    The spectrum has modulus one; the zero frequency (and Nyquist's, for even d) is real and takes
    the sign of the cosine of its phase.

    Args:
      phases: (d // 2 + 1,).
      d: length.
    """
    spectrum = jnp.exp(1j * jnp.asarray(phases))

    def sign(phase):
        return jnp.where(jnp.cos(phase) >= 0, 1.0, -1.0)

    spectrum = spectrum.at[0].set(sign(phases[0]))
    if d % 2 == 0:
        spectrum = spectrum.at[-1].set(sign(phases[-1]))
    return jnp.fft.irfft(spectrum, n=d)


def retained_energy(
    r: Float[AnyArray, "d"], moment: Float[AnyArray, "d d"], signs: Float[AnyArray, "d"], k: int
) -> Float[Array, ""]:
    """Share of the energy in the first k entries of ``R D y``: ``tr(R_k D C D R_k^T) / tr C``."""
    rows = circulant_matrix(r)[:k] * signs
    return jnp.sum(matmul(rows, moment) * rows) / jnp.trace(moment)


@functools.partial(jax.jit, static_argnames=("k", "steps", "restarts"))
def _learn(key, moment, signs, k, steps, restarts, rate):
    d = moment.shape[0]

    def energy(phases):
        return retained_energy(orthogonal_circulant(phases, d), moment, signs, k)

    def climb(key):
        start = jax.random.uniform(key, (d // 2 + 1,), moment.dtype, -jnp.pi, jnp.pi)

        # Adam in three lines: the energy's scale varies with the data
        def step(carry, index):
            phases, m, v = carry
            g = jax.grad(energy)(phases)
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
            correction = jnp.sqrt(1 - 0.99 ** (index + 1)) / (1 - 0.9 ** (index + 1))
            decay = 0.5 * (1 + jnp.cos(jnp.pi * index / steps))
            return (phases + rate * decay * correction * m / (jnp.sqrt(v) + 1e-12), m, v), None

        zero = jnp.zeros_like(start)
        (phases, _, _), _ = jax.lax.scan(step, (start, zero, zero), jnp.arange(steps))
        return phases, energy(phases)

    phases, energies = jax.vmap(climb)(jax.random.split(key, restarts))
    best = jnp.argmax(energies)
    return orthogonal_circulant(phases[best], d), energies[best]


def circulant_learn(
    key: Array,
    moment: Float[AnyArray, "d d"],
    k: int,
    *,
    signs: Float[AnyArray, "d"] | None = None,
    steps: int = 300,
    restarts: int = 5,
    rate: float = 0.1,
) -> tuple[Float[Array, "d"], Float[Array, ""]]:
    """Learns an orthogonal circulant code: maximises the energy of the first k entries of R D y.

    Gradient ascent over the free phases of ``fft(r)``, best of ``restarts``, run side by side. The
    retained energy stays below that of PCA with k components: structure has its price.

    Args:
      key: random key.
      moment: (d, d) mean of y y^T over samples and positions.
      k: code length, 1 to d.
      signs: (d,) of +-1, the random flips D; None is all +1.
      steps: of ascent.
      restarts: random starts.
      rate: step size.

    Returns:
      (r, retained share of the energy).

    Reference:
      Wang, Xu, Xu, Tao, "Beyond filters: compact feature map for portable deep model", ICML 2017.
      The paper's exact objective is not reproduced; energy retention is our formulation.
    """
    moment = working(moment)
    check_rank(k, moment.shape[0], "circulant_learn code")
    signs = jnp.ones(moment.shape[0], moment.dtype) if signs is None else working(signs)
    return _learn(key, moment, signs, k, steps, restarts, rate)


@functools.partial(jax.jit, static_argnames=("k", "damping"))
def circulant_reconfigure(
    kernel: Float[AnyArray, "kh kw i o"],
    bias: Float[AnyArray, "o"],
    next_kernel: Float[AnyArray, "kh2 kw2 o p"],
    r: Float[AnyArray, "o"],
    signs: Float[AnyArray, "o"],
    moment: Float[AnyArray, "o o"],
    k: int,
    damping: float = 1e-6,
) -> tuple[Float[Array, "kh kw i k"], Float[Array, "k"], Float[Array, "kh2 kw2 k p"]]:
    """Makes a layer emit the k code channels, and the next layer read them.

    The layer's kernel is multiplied by ``R_k D`` (exact for linear responses), the next layer's by
    the least-squares decoder ``E = argmin ||y - E code||^2``.

    Args:
      kernel: (kh, kw, i, o).
      bias: (o,).
      next_kernel: (kh2, kw2, o, p).
      r: (o,) from `circulant_learn`.
      signs: (o,).
      moment: (o, o) mean of y y^T of the responses.
      k: code length.
      damping: relative ridge of the decoder.
    """
    check_rank(k, kernel.shape[-1], "circulant_reconfigure code")
    code = circulant_matrix(working(r))[:k] * signs
    inner = matmul(matmul(code, moment), code.T)
    ridge = damping * jnp.trace(inner) / k
    decoder = jnp.linalg.solve(
        inner + ridge * jnp.eye(k, dtype=inner.dtype), matmul(code, working(moment))
    )
    return (
        einsum("abio,ko->abik", kernel, code),
        matmul(code, working(bias)),
        einsum("abop,ko->abkp", next_kernel, decoder),
    )
