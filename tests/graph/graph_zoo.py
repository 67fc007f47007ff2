"""The zoo of small networks: `CASES` and `build`, with every family registered."""

from __future__ import annotations

import graph_zoo_branches  # noqa: F401
import graph_zoo_channels  # noqa: F401
import graph_zoo_layers  # noqa: F401
import graph_zoo_more  # noqa: F401
import graph_zoo_residual  # noqa: F401
from graph_zoo_base import CASES, abstract, build, fill

__all__ = ["CASES", "abstract", "build", "fill"]
