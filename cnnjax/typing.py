"""Type names shared by public signatures."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

# arrays of the device and of the host are both welcome in pure functions
AnyArray = jax.Array | np.ndarray
PyTree = Any
