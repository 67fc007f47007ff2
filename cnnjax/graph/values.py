"""Values of the label algebra: what is known of one array of the traced program."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np


class Comp(NamedTuple):
    """A component: an element is there iff its label is.

    Attributes:
      dims: the dims that the labels depend on, increasing.
      labels: int array of shape ``[shape[d] for d in dims]``: node ids, 0 for "stays".
      zero: whether an element is exactly 0 once the variables of its removed channel are 0.
    """

    dims: tuple[int, ...]
    labels: np.ndarray
    zero: bool = False


@dataclasses.dataclass(slots=True)
class Value:
    """One array of the program.

    A dim without a component is *uniform* (broadcast copies, of any length) or *distinct*
    (its positions differ, so none can go).
    """

    shape: tuple[int, ...]
    comps: tuple[Comp, ...] = ()
    distinct: tuple[bool, ...] = ()
    const: np.ndarray | None = None
    act: bool = False  # depends on the model's inputs
    leaves: frozenset[str] = frozenset()  # variables, for values that depend on them alone
    src: frozenset[int] = frozenset()  # nearest layers behind
    why: str = ""  # what makes the distinct dims so
    scales: frozenset[float] = frozenset()  # scalar constants multiplied in so far
    sums: tuple[tuple[int, np.ndarray], ...] = ()  # sums over channels: (length, labels)
    normal: bool = False  # a root of a variance (of a statistic or of a stored one)

    def comp_on(self, dim: int) -> Comp | None:
        """The component that touches ``dim`` (there is at most one)."""
        for c in self.comps:
            if dim in c.dims:
                return c
        return None

    def like(self, **changes: Any) -> Value:
        """A copy with some fields changed; the constant is dropped unless given."""
        out = Value(
            self.shape,
            self.comps,
            self.distinct,
            None,
            self.act,
            self.leaves,
            self.src,
            self.why,
            self.scales,
            self.sums,
            self.normal,
        )
        for name, value in changes.items():
            setattr(out, name, value)
        return out


def constant(array: Any) -> Value:
    """The value of a known array."""
    a = np.asarray(array)

    def same(d: int) -> bool:
        b = np.take(a, [0], axis=d)
        return bool(np.all((a == b) | ((a != a) & (b != b))))  # NaN is like NaN

    distinct = tuple(n > 1 and not same(d) for d, n in enumerate(a.shape))
    return Value(a.shape, (), distinct, const=a, why="a constant array")


def opaque(shape: tuple[int, ...], why: str, **fields: Any) -> Value:
    """A value of which nothing is known: every dim is distinct."""
    return Value(tuple(shape), (), tuple(n > 1 for n in shape), why=why, **fields)


def common(vals: list[Value]) -> dict[str, Any]:
    """The provenance fields of something computed from ``vals``."""
    if len(vals) == 1:
        v = vals[0]
        return {
            "act": v.act,
            "leaves": v.leaves,
            "src": v.src,
            "why": v.why,
            "scales": v.scales,
            "sums": v.sums,
            "normal": v.normal,
        }
    acts = [v for v in vals if v.act]
    act = bool(acts)
    none: frozenset[Any] = frozenset()
    sums: tuple[tuple[int, np.ndarray], ...] = ()
    for v in vals:
        if v.sums and v.sums is not sums:
            sums = (sums + v.sums)[:8]
    return {
        "act": act,
        "leaves": none if act else none.union(*(v.leaves for v in vals)),
        "src": none.union(*(v.src for v in vals)),
        "why": next((v.why for v in vals if v.why), ""),
        "scales": none.union(*(v.scales for v in vals)),
        "sums": sums,
        "normal": all(v.normal for v in acts) if acts else any(v.normal for v in vals),
    }


def minimise(
    dims: tuple[int, ...], labels: np.ndarray, zero: bool, wanted: tuple[int, ...] = ()
) -> Comp:
    """Drops dims along which the labels don't change, unless they are wanted or nothing is left."""
    sizes = labels.shape
    whole, keep = labels, []
    for k, size in enumerate(sizes):
        if dims[k] in wanted:
            keep.append(k)
        elif size > 1:
            if bool(np.all(labels == np.take(labels, [0], axis=k))):
                labels = np.take(labels, [0], axis=k)
            else:
                keep.append(k)
    if not keep:
        # one label everywhere: keep the last dim that has a length
        keep = [max((k for k, size in enumerate(sizes) if size > 1), default=len(sizes) - 1)]
        labels = whole
    index = tuple(slice(None) if k in keep else 0 for k in range(len(dims)))
    return Comp(tuple(dims[k] for k in keep), labels[index], zero)
