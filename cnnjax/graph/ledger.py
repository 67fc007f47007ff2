"""What the label algebra writes down while it walks a program; solved once at the end."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from jax._src import source_info_util

from cnnjax.graph.types import Source
from cnnjax.graph.values import Comp, Value

HERE: Any = object()  # instead of an equation's source: the stack that is running
STAY = 0  # node of positions that can't go
WIDE = 8  # more layers than this behind a value are gathered in a stream


@dataclasses.dataclass(slots=True)
class Event:
    """Labels together with a reason and the place in the program."""

    labels: np.ndarray
    reason: str
    info: Any = None
    policy: bool = False  # says what may be pruned, not what the program does


@dataclasses.dataclass(slots=True)
class Split:
    """A dim cut into parts: ``labels[part, position]``; the parts keep equal numbers."""

    labels: np.ndarray
    reason: str
    info: Any = None
    reshape: bool = False


@dataclasses.dataclass(slots=True)
class Grouped:
    """A grouped convolution: labels of inputs (g, I/g), kernel inputs (I/g,), outputs (g, O/g)."""

    inputs: np.ndarray
    kernel: np.ndarray
    outputs: np.ndarray
    path: str
    info: Any = None


@dataclasses.dataclass(slots=True)
class Applied:
    """A layer as it is met; becomes a `types.Layer`."""

    path: str
    kind: str
    kernel: str | None
    kernel_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    fields: dict[str, Any]
    inputs: Value | None
    output: Value | None
    info: Any = None


def pairs(events: list[Event], to: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of nodes of a relation, one after the other."""
    if not events:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([e.labels for e in events]), np.concatenate(to)


# frames that are nobody's model: layers, ourselves, wrappers that check types
_LIBRARY = ("/flax/", "/cnnjax/ops", "/cnnjax/graph/", "/jaxtyping/", "beartype")


def _short(path: str) -> str:
    parts = path.replace("\\", "/").split("/")
    return "/".join(parts[-3:])


def frames(info: Any) -> list[Any]:
    """The frames outside of JAX behind an equation, innermost first."""
    if info is None or info.traceback is None:
        return []
    return list(source_info_util.user_frames(info.traceback))


@functools.cache
def _judge(file: str) -> int:
    """0: a file of JAX's, 1: of a layer library or ours, 2: a user's."""
    if not source_info_util.is_user_filename(file):
        return 0
    name = file.replace("\\", "/")
    return 1 if any(part in name for part in _LIBRARY) else 2


@functools.lru_cache(maxsize=4096)
def _source(code: Any, instruction: int) -> Source:
    frame = source_info_util.raw_frame_to_frame(code, instruction)
    return Source(_short(frame.file_name), frame.start_line, frame.function_name.split(".")[-1])


def locate(info: Any) -> Source | None:
    """The user's line behind an equation: the innermost frame outside of JAX and Flax."""
    if info is None or info.traceback is None:
        return None
    codes, instructions = info.traceback.raw_frames()
    first = None
    for code, instruction in zip(codes, instructions):
        kind = _judge(code.co_filename)
        if kind == 2:
            return _source(code, instruction)
        if kind == 1 and first is None:
            first = (code, instruction)
    return None if first is None else _source(*first)


class Ledger:
    """Nodes, equalities, ties, reasons, constraints and layers of one walk.

    Two kinds of relation: `equal` (the positions of two arrays meet, so they are the same channel)
    and `tie` (they are different channels that can only go together).
    """

    def __init__(self, parameters: frozenset[str]) -> None:
        self.size = 1
        self.always_grouped: frozenset[str] = frozenset()  # grouped kernels, of the original
        self.always_depthwise: frozenset[str] = frozenset()
        self.hints: list[Any] = []  # of the original's reshapes, in order
        self.notes: list[Any] = []  # the same of this walk
        self.starts: dict[tuple[str, int], int] = {}
        self.lengths: dict[tuple[str, int], int] = {}
        self.parameters = parameters
        self.same: list[Event] = []
        self.same_to: list[np.ndarray] = []
        self.ties: list[Event] = []
        self.tie_to: list[np.ndarray] = []
        self.fixes: list[Event] = []
        self.statistics: list[Event] = []
        self.splits: list[Split] = []
        self.grouped: list[Grouped] = []
        self.depthwise: list[Event] = []  # inputs of depthwise convolutions
        self.bonds: list[Event] = []  # rows of channels that one output is made of
        self.pools: list[Event] = []  # channels that are reduced to one value
        self.layers: list[Applied] = []
        self.edges: set[tuple[int, int]] = set()  # (layer or stream, layer or stream)
        self._streams: dict[frozenset[int], frozenset[int]] = {}
        self.consumed: set[int] = set()  # first node of axes that are contracted away
        self.literals: list[tuple[float, Any]] = []
        self.located = True  # whether equations' own lines are to be believed
        self.rearranged = False  # whether the slice being read is put back in another order
        self.info = None  # of the equation being read
        self._seen: set[tuple[Any, ...]] = set()
        self._numbers = np.arange(1 << 14)

    @property
    def info(self) -> Any:
        """Where the equation that is read was written; taken from the stack when asked for."""
        return source_info_util.current() if self._info is HERE else self._info

    @info.setter
    def info(self, value: Any) -> None:
        self._info = value

    # -- nodes --------------------------------------------------------------------------------

    def variable(self, path: str, shape: tuple[int, ...]) -> Value:
        """The value of a variable: a fresh node for every position of every axis."""
        comps, known = [], frozenset({path})
        first, self.size = self.size, self.size + sum(shape)
        if self.size > len(self._numbers):
            self._numbers = np.arange(2 * self.size + 4096)
        for axis, n in enumerate(shape):
            key = (path, axis)
            self.starts[key], self.lengths[key] = first, n
            comps.append(Comp((axis,), self._numbers[first : first + n], True))
            first += n
        distinct = tuple([n > 1 for n in shape])
        return Value(tuple(shape), tuple(comps), distinct, leaves=known, why=f"variable {path}")

    def nodes(self, key: tuple[str, int]) -> np.ndarray:
        """The nodes of an axis of a variable."""
        start = self.starts[key]
        return self._numbers[start : start + self.lengths[key]]

    def axis_of(self, labels: np.ndarray) -> tuple[str, int] | None:
        """The variable axis whose own nodes, all and in order, these labels are."""
        flat = labels.reshape(-1)
        if not len(flat) or flat[0] == STAY or not np.all(np.diff(flat) == 1):
            return None
        for key, start in self.starts.items():
            if start == flat[0] and self.lengths[key] == len(flat):
                return key
        return None

    # -- relations ----------------------------------------------------------------------------

    def equal(self, a: np.ndarray, b: np.ndarray, reason: str) -> None:
        """Position by position the same channel."""
        if a is b or np.array_equal(a, b):
            return
        self.same.append(Event(np.ravel(a), reason, self.info))
        self.same_to.append(np.ravel(b))

    def meet(self, labels: np.ndarray, fresh: np.ndarray, reason: str) -> None:
        """`equal` for 1-d labels, one side of which is a variable's own: they differ."""
        self.same.append(Event(labels, reason, self.info))
        self.same_to.append(fresh)

    def here(self) -> None:
        """Takes the place in the program once for all that one operation writes down."""
        self._info = source_info_util.current()

    def tie(self, a: np.ndarray, b: np.ndarray, reason: str) -> None:
        """Position by position: removed together."""
        a, b = np.broadcast_arrays(a, b)
        if np.array_equal(a, b):
            return
        self.ties.append(Event(np.ravel(a), reason, self.info))
        self.tie_to.append(np.ravel(b))

    def bond(self, rows: np.ndarray, reason: str) -> None:
        """``rows[n]``: channels that are used together, in this order.

        A tie says that they are removed together; of several rows that are, a bond says which
        channels make one.
        """
        if len(rows):
            self.bonds.append(Event(rows, reason, self.info))

    def fix(self, labels: np.ndarray, reason: str, *, policy: bool = False) -> None:
        """These positions stay (``policy``: for we don't know, not for the program says so)."""
        self.fixes.append(Event(np.ravel(labels), reason, self.info, policy))

    def fix_all(self, val: Value, reason: str) -> None:
        """No channel of this value may go."""
        for c in val.comps:
            self.fix(c.labels, reason)

    def statistic(self, labels: np.ndarray, reason: str) -> None:
        """Removing some of these changes what the others compute."""
        self.statistics.append(Event(np.ravel(labels), reason, self.info))

    def tie_dims(self, c: Comp, dims: tuple[int, ...], reason: str) -> Comp | None:
        """Ties a component along some of its dims; None if no dim is left."""
        for d in dims:
            if d not in c.dims:
                continue
            if len(c.dims) == 1:
                return None
            k = c.dims.index(d)
            first = np.take(c.labels, [0], axis=k)
            self.tie(c.labels, first, reason)
            self.bond(np.moveaxis(c.labels, k, -1).reshape(-1, c.labels.shape[k]), reason)
            c = Comp(c.dims[:k] + c.dims[k + 1 :], first.squeeze(k), c.zero)
        return c

    def split(self, labels: np.ndarray, reason: str, *, reshape: bool = False) -> None:
        """``labels[part, position]``: the parts must keep equal numbers."""
        key = (labels.shape, labels.tobytes(), reshape)
        if key not in self._seen:
            self._seen.add(key)
            self.splits.append(Split(labels, reason, self.info, reshape))

    def hint(self, ranks: tuple[int, int]) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Dims that the original's labels had after this reshape: lengths of 1 are ambiguous."""
        k = len(self.notes)
        if k < len(self.hints) and self.hints[k][0] == ranks:
            return self.hints[k][1]
        return {}

    def note(self, ranks: tuple[int, int], dims: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        """Remembers a reshape for a later check of the shrunk program."""
        self.notes.append((ranks, dims))

    # -- layers -------------------------------------------------------------------------------

    def layer(self, applied: Applied, src: frozenset[int]) -> frozenset[int]:
        """Records a layer; returns what its output's ``src`` is."""
        index = len(self.layers)
        self.layers.append(applied)
        self.edges.update((s, index) for s in src)
        return frozenset({index})

    def gathered(self, src: frozenset[int]) -> frozenset[int]:
        """``src``, or a *stream* that stands for all of it where that is many.

        Through residual sums and dense concatenations every layer reads what all before it add.
        Written out, the adjacency would grow with the square of the depth. Streams are numbered
        -1, -2, ...: what goes into one are its edges.
        """
        if len(src) <= WIDE:
            return src
        found = self._streams.get(src)
        if found is None:
            stream = -1 - len(self._streams)
            found = self._streams[src] = frozenset({stream})
            self.edges.update((s, stream) for s in src)
        return found

    def only(self, src: frozenset[int]) -> Applied | None:
        """The layer that alone is behind a value, or None."""
        if len(src) == 1:
            (i,) = src
            if i >= 0:
                return self.layers[i]
        return None

    def behind(self, src: frozenset[int]) -> set[int]:
        """The layers of ``src``, streams written out."""
        inside = {next(iter(found)): src for src, found in self._streams.items()}
        out: set[int] = set()
        todo, seen = list(src), set(src)
        while todo:
            s = todo.pop()
            if s >= 0:
                out.add(s)
                continue
            todo.extend(inside[s] - seen)
            seen |= inside[s]
        return out
