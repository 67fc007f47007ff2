"""Winograd convolution F(2x2,3x3) and F(4x4,3x3), and the sparse Winograd-ReLU layer.

Lavin and Gray, "Fast algorithms for convolutional neural networks", arXiv 1509.09308; Liu, Pool,
Han, Dally, "Efficient sparse-Winograd convolutional neural networks", arXiv 1802.06367.

The transforms destroy the sparsity of kernels and activations. The Winograd-ReLU form makes the
transformed weights the parameters and applies the ReLU to the transformed tiles, so both factors of
every multiplication can be zero:

    S = A^T [ sum_c W[:, :, c, o] * relu(B^T d_c B) ] A

It is another function than any spatial convolution after a ReLU: train it from scratch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

Padding = str  # "SAME" or "VALID"
_HIGHEST = jax.lax.Precision.HIGHEST

_MATRICES = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [
            [1, 1, 1, 1, 1, 0],
            [0, 1, -1, 2, -2, 0],
            [0, 1, 1, 4, 4, 0],
            [0, 1, -1, 8, -8, 1],
        ],
    ),
}


def matrices(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(B^T, G, A^T)`` of F(m x m, 3 x 3) in float64; m is 2 or 4."""
    if m not in _MATRICES:
        raise ValueError(f"the output tile must be 2 or 4, got {m}")
    bt, g, at = (np.array(rows, np.float64) for rows in _MATRICES[m])
    return bt, g, at


def output_size(size: int, padding: Padding) -> int:
    """Height or width of the output of a 3x3 convolution with stride 1."""
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding must be 'SAME' or 'VALID', got {padding!r}")
    out = size if padding == "SAME" else size - 2
    if out < 1:
        raise ValueError(f"an input of {size} pixels is too small for a 3x3 kernel ({padding})")
    return out


def tiles(
    x: Float[Array, "n h w c"], m: int, padding: Padding = "SAME"
) -> Float[Array, "a a n th tw c"]:
    """Transformed input tiles ``B^T d B`` of a 3x3 convolution with stride 1.

    Args:
      x: (n, h, w, c).
      m: outputs per tile and side; tiles are a = m + 2 wide and overlap by 2.
      padding: "SAME" or "VALID"; the last tiles are filled up with zeros.

    Returns:
      (a, a, n, ceil(ho / m), ceil(wo / m), c).
    """
    bt = jnp.asarray(matrices(m)[0], x.dtype)
    edge = 1 if padding == "SAME" else 0
    counts = [-(-output_size(size, padding) // m) for size in x.shape[1:3]]
    pads = [(edge, t * m + 2 - size - edge) for t, size in zip(counts, x.shape[1:3])]
    x = jax.lax.pad(
        x, jnp.zeros((), x.dtype), [(0, 0, 0), *((a, b, 0) for a, b in pads), (0, 0, 0)]
    )
    th, tw = counts
    rows = jnp.stack([x[:, i : i + m * (th - 1) + 1 : m] for i in range(m + 2)])
    rows = jnp.einsum("pi,inhwc->pnhwc", bt, rows, precision=_HIGHEST)
    both = jnp.stack([rows[:, :, :, j : j + m * (tw - 1) + 1 : m] for j in range(m + 2)])
    return jnp.einsum("qj,jpnhwc->pqnhwc", bt, both, precision=_HIGHEST)


def transform_kernel(kernel: Float[Array, "3 3 ci o"], m: int) -> Float[Array, "a a ci o"]:
    """``G g G^T`` of every (input, output) pair; a = m + 2."""
    g = jnp.asarray(matrices(m)[1], kernel.dtype)
    return jnp.einsum("pi,qj,ijco->pqco", g, g, kernel, precision=_HIGHEST)


def _outputs(
    transformed: Any, weights: Any, height: int, width: int, m: int, precision: Any
) -> jax.Array:
    """Products summed over channels, then ``A^T (.) A``, put together and cropped."""
    at = jnp.asarray(matrices(m)[2], transformed.dtype)
    # one matrix product per tile position
    product = jnp.einsum("pqnhwc,pqco->pqnhwo", transformed, weights, precision=precision)
    out = jnp.einsum("ip,jq,pqnhwo->nhiwjo", at, at, product, precision=_HIGHEST)
    n, th, _, tw, _, o = out.shape
    return out.reshape(n, th * m, tw * m, o)[:, :height, :width]


def _check_channels(x: Any, weights: Any, side: int) -> None:
    if weights.ndim != 4 or weights.shape[:2] != (side, side) or weights.shape[2] != x.shape[-1]:
        raise ValueError(
            f"weights of shape {weights.shape} for an input of {x.shape[-1]} channels; expected "
            f"({side}, {side}, {x.shape[-1]}, outputs)"
        )


def conv(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "3 3 ci o"],
    *,
    m: int = 2,
    padding: Padding = "SAME",
    precision: Any = _HIGHEST,
) -> Float[Array, "n ho wo o"]:
    """The 3x3 convolution with stride 1 by Winograd's algorithm: the numbers of the direct one.

    F(2x2) takes 2.25 and F(4x4) 4 times fewer multiplications (transforms apart); F(4x4) loses
    about a digit of precision.

    Args:
      x: (n, h, w, c).
      kernel: (3, 3, c, o).
      m: 2 or 4 outputs per tile and side.
      padding: "SAME" (one zero on each side) or "VALID".
      precision: of the channel sums.
    """
    _check_channels(x, kernel, 3)
    height, width = (output_size(size, padding) for size in x.shape[1:3])
    weights = transform_kernel(kernel, m)
    return _outputs(tiles(x, m, padding), weights, height, width, m, precision)


def winograd_relu(
    x: Float[Array, "n h w c"],
    weights: Float[Array, "a a ci o"],
    *,
    mask: Any = None,
    padding: Padding = "SAME",
    precision: Any = None,
) -> Float[Array, "n ho wo o"]:
    """The Winograd-ReLU convolution of maps that had no ReLU yet.

    Args:
      x: (n, h, w, c), before the activation.
      weights: (a, a, c, o) in the Winograd domain; a is 4 (F(2x2)) or 6 (F(4x4)).
      mask: optional 0/1 array like ``weights``.
      padding: "SAME" or "VALID".
      precision: of the channel sums.
    """
    m = weights.shape[0] - 2
    matrices(m)
    _check_channels(x, weights, m + 2)
    if mask is not None:
        weights = weights * jnp.asarray(mask, weights.dtype)
    height, width = (output_size(size, padding) for size in x.shape[1:3])
    active = jax.nn.relu(tiles(x, m, padding))
    return _outputs(active, weights, height, width, m, precision)


def initial_variance(m: int, channels: int) -> float:
    """Variance of Winograd-domain weights at initialisation.

    F(2x2): ``2 * (9/32) / (16 c)`` as in the authors' code. F(4x4): what gives the same output
    variance for white inputs (computed from the matrices; our choice, the paper has none).
    """

    def gain(m: int) -> float:
        bt, _, at = matrices(m)
        # var of output p, q = c * var(W) * s_p s_q / 2 with s_p = sum_i at[p, i]^2 |bt[i]|^2
        s = np.square(at) @ np.square(bt).sum(axis=1)
        return float(np.mean(s)) ** 2 / 2

    published = 2 * (9 / 32) / (16 * channels)
    return published * gain(2) / gain(m)


class WinogradReLU(nnx.Module):
    """Winograd-ReLU layer: ReLU and 3x3 convolution in one; its kernel is (a, a, in, out).

    Input maps come *without* a ReLU before. Prune ``kernel`` by magnitude like any other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        m: int = 2,
        padding: Padding = "SAME",
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        if in_features < 1 or out_features < 1:
            raise ValueError(f"features must be positive, got {in_features} and {out_features}")
        matrices(m)
        self.in_features, self.out_features = in_features, out_features
        self.m, self.padding = m, padding
        scale = float(np.sqrt(initial_variance(m, in_features)))
        shape = (m + 2, m + 2, in_features, out_features)
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(self, x: Any) -> jax.Array:
        """(n, h, w, in) before the activation -> (n, ho, wo, out)."""
        kernel = jnp.asarray(self.kernel[...], x.dtype)
        out = winograd_relu(x, kernel, padding=self.padding)
        return out if self.bias is None else out + jnp.asarray(self.bias[...], out.dtype)
