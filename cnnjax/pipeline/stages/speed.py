"""How much faster a stage made its network, on the present device."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from cnnjax import graph, training


def measured_speed(model: Any, small: Any, image: np.ndarray, batch: int) -> dict[str, float]:
    """Ratio of median times, the two networks timed in turns; {} for batch 0.

    Args:
      model, small: NNX modules, before and after.
      image: ``(1, h, w, c)``, repeated to the batch.
      batch: images in one call.
    """
    if not batch:
        return {}
    x = jnp.asarray(np.repeat(image, batch, axis=0))
    both = {"before": model, "after": small}
    timed = graph.latencies(
        {name: training.set_mode(m, train=False) for name, m in both.items()}, x, calls=15
    )
    return {
        "speed_up": timed["before"].median / timed["after"].median,
        "speed_batch": batch,
    }
