"""Densities over the pixels of an image: a readout, a blur and a prior of the centre.

``Q`` is proportional to ``exp(blur(upsample(readout(features))) + log prior)``; the loss between
such maps is `cnnjax.distillation.saliency`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cnnjax.typing import AnyArray

Maps = Float[AnyArray, "n h w"]


def gaussian_blur(maps: Maps, sigma: float, *, truncate: float = 4.0) -> Float[Array, "n h w"]:
    """Convolution with a Gaussian, as two one-dimensional ones; edges are repeated.

    Args:
      maps: (n, h, w).
      sigma: standard deviation in pixels.
      truncate: half width of the kernel in standard deviations, rounded to whole pixels.

    Raises:
      ValueError: sigma or truncate is not positive.
    """
    if not sigma > 0 or not truncate > 0:
        raise ValueError(f"sigma is {sigma} and truncate {truncate}; both must be positive")
    half = max(1, int(truncate * sigma + 0.5))
    taps = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    kernel = jnp.asarray(taps / taps.sum(), jnp.float32)
    x = jnp.asarray(maps, jnp.float32)
    x = jnp.pad(x, ((0, 0), (half, half), (half, half)), mode="edge")[..., None]
    for window in ((-1, 1), (1, -1)):
        x = jax.lax.conv_general_dilated(
            x,
            kernel.reshape(*window, 1, 1),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
    return x[..., 0]


def center_prior(height: int, width: int, sigma: float) -> Float[np.ndarray, "h w"]:
    """Logarithm of a Gaussian around the centre of an image, normalised over the pixels.

    Args:
      height: of the map.
      width: of the map.
      sigma: standard deviation as a share of each side.

    Raises:
      ValueError: sigma is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}; it must be positive")
    y, x = (((np.arange(n) + 0.5) / n - 0.5) / sigma for n in (height, width))
    log = -0.5 * (y[:, None] ** 2 + x[None, :] ** 2)
    return (log - np.log(np.exp(log).sum())).astype(np.float32)


class DensityHead(nnx.Module):
    """Features -> unnormalised log-density over the pixels of an image.

    Two 1x1 convolutions read the features out before they are enlarged, which is the cheaper order;
    then bilinear enlargement, a blur, and the prior.

    Reference:
      Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
      arXiv 1801.05787, section 3.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        *,
        hidden: int = 8,
        sigma: float = 1.0,
        prior: Any = None,
        rngs: nnx.Rngs,
    ):
        """Prepares the head.

        Args:
          channels: of the features.
          size: (height, width) of the density.
          hidden: channels between the two convolutions.
          sigma: of the blur, in pixels of the density.
          prior: (height, width) logarithm, see `center_prior`; None: uniform.
          rngs: initialisation.

        Raises:
          ValueError: a prior of another size.
        """
        if prior is not None and tuple(np.shape(prior)) != tuple(size):
            raise ValueError(f"the prior is {np.shape(prior)}, the density {tuple(size)}")
        self.size, self.sigma = tuple(size), float(sigma)
        self.prior = nnx.Variable(jnp.asarray(np.zeros(size) if prior is None else prior))
        self.first = nnx.Conv(channels, hidden, (1, 1), rngs=rngs)
        self.second = nnx.Conv(hidden, 1, (1, 1), rngs=rngs)

    def __call__(self, features: Any) -> Float[Array, "n h w"]:
        """(n, h', w', channels) -> (n, h, w); the log-density is its `jax.nn.log_softmax`."""
        x = self.second(jax.nn.softplus(self.first(features)))[..., 0]
        x = jax.image.resize(x, (x.shape[0], *self.size), "bilinear")
        return gaussian_blur(x, self.sigma) + self.prior[...]
