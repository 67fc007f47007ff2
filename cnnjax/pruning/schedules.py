"""How sparse, when: targets of iterative pruning and the cubic schedule of gradual pruning."""

from __future__ import annotations

from cnnjax.errors import did_you_mean
from cnnjax.pruning.masks import check_sparsity

SHAPES = ("geometric", "linear", "cubic")


def steps(
    final: float, count: int, *, initial: float = 0.0, shape: str = "geometric"
) -> list[float]:
    """``count`` increasing sparsities that end at exactly ``final``.

    Args:
      final: the last sparsity, in [0, 1).
      count: number of cuts, at least 1.
      initial: the sparsity before the first cut.
      shape: ``geometric`` keeps the same fraction of the survivors at every cut, ``linear`` removes
        the same number, ``cubic`` removes many at first and few at the end.

    Raises:
      ValueError: values out of range or an unknown shape.
    """
    check_sparsity(final, "final sparsity")
    check_sparsity(initial, "initial sparsity")
    if final < initial:
        raise ValueError(f"final sparsity {final} is below the initial {initial}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}.{did_you_mean(shape, SHAPES)}")
    out = []
    for i in range(1, count + 1):
        t = i / count
        if shape == "geometric":
            s = 1.0 - (1.0 - initial) * ((1.0 - final) / (1.0 - initial)) ** t
        elif shape == "linear":
            s = initial + (final - initial) * t
        else:
            s = cubic(i, begin=0, end=count, final=final, initial=initial)
        out.append(s)
    return [*out[:-1], float(final)]


def cubic(step: int, *, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """Zhu & Gupta's schedule (1710.01878): ``s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3``.

    Constant before ``begin`` and after ``end``.

    Raises:
      ValueError: unless ``begin < end``.
    """
    if not begin < end:
        raise ValueError(f"begin must be before end, got begin={begin}, end={end}")
    t = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final + (initial - final) * (1.0 - t) ** 3
