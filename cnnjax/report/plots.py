"""Curves as PNG files; matplotlib is imported on use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnnjax import files


def plot_curve(result: Mapping[str, Any], path: str | os.PathLike[str]) -> bool:
    """Accuracy against sparsity of a run: a line per seed, before and after retraining.

    Args:
      result: a run's report.
      path: of the PNG, replaced by one rename.

    Returns:
      Whether there was a curve to draw.

    Raises:
      ImportError: without matplotlib (the ``train`` extra).
    """
    points = [
        (run["seed"], stage["name"], stage["curve"], run["stages"][0]["accuracy"])
        for run in result["runs"]
        for stage in run["stages"]
        if any("sparsity" in p and "accuracy" in p for p in stage["curve"])
    ]
    if not points:
        return False
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"plots need matplotlib: pip install 'cnnjax[train]' ({error})"
        ) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    del matplotlib
    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (seed, stage, curve, dense) in enumerate(points):
        color = f"C{i % 10}"
        curve = [p for p in curve if "sparsity" in p and "accuracy" in p]
        x = np.array([0.0, *(p["sparsity"] for p in curve)]) * 100
        y = np.array([dense, *(p["accuracy"] for p in curve)]) * 100
        axes.plot(x, y, "o-", color=color, label=f"{stage}, seed {seed}")
        raw = [p for p in curve if "accuracy_before_retraining" in p]
        if raw:
            axes.plot(
                [100 * p["sparsity"] for p in raw],
                [100 * p["accuracy_before_retraining"] for p in raw],
                "x:",
                color=color,
                alpha=0.6,
                label=None if i else "before retraining",
            )
    axes.set_xlabel("removed weights (% of those that may be pruned)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{result['name']}: {result['model']} on {result['data']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return True
