"""From a ledger to a `Graph`: equalities and ties are solved once, by connected components."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from cnnjax.graph.axes import Axes, Layout
from cnnjax.graph.bonds import identified
from cnnjax.graph.ledger import STAY, Event, Ledger, locate, pairs
from cnnjax.graph.network import Graph
from cnnjax.graph.outcome import constraints_of, groups_of, layers_of, products, statistics_of
from cnnjax.graph.twins import fix_ambiguous, repeats, twin_pairs
from cnnjax.graph.types import FIXED, Fixed, Key, Source


def components(size: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Class of every node, numbered by their first nodes; edges at node ``STAY`` are left out.

    Every root hooks to the least root that it meets, all at once, until none meets another: label
    arrays are long and hardly ever chained, so that a few rounds do.
    """
    root = np.arange(size)
    ok = (a != STAY) & (b != STAY) & (a != b)
    a, b = a[ok], b[ok]
    while len(a):
        low, high = np.minimum(a, b), np.maximum(a, b)
        np.minimum.at(root, high, low)
        while True:
            up = root[root]
            if np.array_equal(up, root):
                break
            root = up
        a, b = root[low], root[high]
        ok = a != b
        a, b = a[ok], b[ok]
    return (np.cumsum(root == np.arange(size)) - 1)[root]


def identities(ledger: Ledger) -> np.ndarray:
    """Identity of every node: equal where positions meet."""
    return components(ledger.size, *pairs(ledger.same, ledger.same_to))


def _mode_ties(ledger: Ledger, mode: str) -> None:
    """Ties that follow from how grouped convolutions and splits are to be treated."""
    counts = {g.inputs.shape[0] for g in ledger.grouped}
    first: dict[int, Any] = {}
    for g in ledger.grouped:
        ledger.info = g.info
        other = first.setdefault(int(g.kernel[0]), g)
        if other is not g:
            if other.inputs.shape != g.inputs.shape:
                ledger.fix(g.inputs, "a grouped kernel used with different groups")
            else:
                ledger.tie(other.inputs, g.inputs, "a grouped kernel used twice")
        if mode == "tied":
            ledger.tie(g.inputs, g.inputs[:1], "same positions in every conv-group")
            ledger.tie(g.outputs, g.outputs[:1], "same positions in every conv-group")
        elif mode == "whole":
            ledger.tie(g.inputs, g.inputs[:, :1], "whole conv-groups")
            ledger.tie(g.outputs, g.inputs[:, :1], "whole conv-groups")
    for s in ledger.splits:
        ledger.info = s.info
        parts, inner = s.labels.shape
        if s.reshape and inner in counts and parts not in counts:
            ledger.tie(s.labels, s.labels[:, :1], "groups are the inner dim of the split")
        elif mode != "flexible":
            ledger.tie(s.labels, s.labels[:1], "same positions in every part")


def _classes(ledger: Ledger, ident: np.ndarray) -> np.ndarray:
    """Class of every node: equal where positions are removed together."""
    if not ledger.ties:
        return ident
    a, b = pairs(ledger.ties, ledger.tie_to)
    ok = (a != STAY) & (b != STAY)
    # no other node has the class of STAY, which is 0
    return components(int(ident.max()) + 1, ident[a[ok]], ident[b[ok]])[ident]


def _stuck_shuffles(ledger: Ledger, classes: np.ndarray) -> None:
    """Fixes channels that a shuffle spreads unevenly over the next parts.

    A smaller width would send survivors to other parts than before, whichever they are.
    """
    partitions: list[tuple[np.ndarray, Any]] = [
        (np.where(s.labels == STAY, -1, classes[s.labels]), s) for s in ledger.splits
    ]
    partitions += [(np.where(g.inputs == STAY, -1, classes[g.inputs]), g) for g in ledger.grouped]
    for cells, shape, (labels, info) in products(partitions):
        # a finer cut of the same parts, in order, has a single new part per old one
        aligned = len(cells) == max(shape)
        if len(cells) < shape[0] * shape[1] and not aligned:
            ledger.info = info
            ledger.fix(labels, "shuffled into parts that a smaller width would mix")


def _fixed_nodes(ledger: Ledger) -> tuple[np.ndarray, list[Event]]:
    """For every node the index of the first reason why it stays (or a large number)."""
    events = list(ledger.fixes)
    for relation, to in ((ledger.same, ledger.same_to), (ledger.ties, ledger.tie_to)):
        if not relation:
            continue
        a, b = pairs(relation, to)
        ends = np.cumsum([len(other) for other in to])
        for i in np.unique(
            np.searchsorted(ends, np.flatnonzero((a == STAY) | (b == STAY)), "right")
        ):
            event, other = relation[i], to[i]
            nodes = np.concatenate([event.labels[other == STAY], other[event.labels == STAY]])
            reason = f"meets padding or fixed positions in {event.reason}"
            events.append(Event(nodes, reason, event.info))
    first = np.full(ledger.size, len(events), np.int64)
    if events:
        nodes = np.concatenate([e.labels for e in events])
        np.minimum.at(
            first, nodes, np.repeat(np.arange(len(events)), [len(e.labels) for e in events])
        )
    return first, events


def solve(
    ledger: Ledger, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, Any], mode: str
) -> Graph:
    """The graph of a walked program."""
    ident = identities(ledger)
    keys = tuple(ledger.starts)
    index = {key: i for i, key in enumerate(keys)}
    lengths = np.fromiter(ledger.lengths.values(), np.int64, len(keys))
    starts = np.fromiter(ledger.starts.values(), np.int64, len(keys))
    owner = np.repeat(np.arange(-1, len(keys)), np.concatenate([[1], lengths]))
    fix_ambiguous(ledger, ident, owner)
    _mode_ties(ledger, mode)
    # the input axis of a grouped kernel has a table instead of labels of its own
    table_keys: dict[Key, Any] = {}
    sizes = np.bincount(ident, minlength=ledger.size)
    for g in ledger.grouped:
        key = ledger.axis_of(g.kernel)
        assert key is not None
        ledger.info = g.info
        if (sizes[ident[g.kernel]] > 1).any() or int(g.kernel[0]) in {
            int(e.labels[0]) for e in ledger.fixes if e.labels.size
        }:
            for labels in (g.inputs, g.outputs, g.kernel):
                ledger.fix(labels, "a grouped kernel that is used in another way as well")
        table_keys[key] = g
    classes = _classes(ledger, ident)
    _stuck_shuffles(ledger, classes)
    first, events = _fixed_nodes(ledger)
    count = int(classes.max()) + 1
    why = np.full(count, len(events), np.int64)
    np.minimum.at(why, classes, first)
    free = why == len(events)
    free[classes[STAY]] = False

    consumer = np.isin(starts, list(ledger.consumed))
    tabled = np.zeros(len(keys), bool)
    tabled[[index[key] for key in table_keys]] = True

    places = _places(classes, owner, tabled)
    # a class that sits on one axis only is carried by nothing else: the variable isn't used
    free &= np.bincount(places[0], minlength=count) >= 2
    numbering = Numbering(keys, starts, owner, classes, consumer, tabled, places)
    atom_of, group_of_atom, names = numbering.number(free, _first_calls(ledger))
    labels = atom_of[classes]
    labels[STAY] = FIXED

    def atoms(nodes: np.ndarray) -> np.ndarray:
        return labels[nodes]

    tables: dict[int, tuple[np.ndarray, int | None]] = {}
    for key, g in table_keys.items():
        table, outs = atoms(g.inputs), ledger.axis_of(g.outputs)
        if (table >= 0).any():
            tables[index[key]] = (table, outs[1] if outs else None)
    shown = labels.copy() if table_keys else labels
    shown[np.append(tabled, False)[owner]] = FIXED
    layout = Layout(keys, starts, lengths, owner, shown, consumer, tables)
    fixed, reasons = _reasons(layout, why[classes], events)
    constraints = constraints_of(ledger, atoms)
    statistics = statistics_of(ledger, atoms, len(group_of_atom))
    groups = groups_of(layout, group_of_atom, names, constraints, statistics)
    layers = layers_of(ledger, shapes, atoms)
    return Graph(
        axes=Axes(layout, reasons),
        groups=groups,
        constraints=constraints,
        fixed=fixed,
        layers=layers,
        shapes=shapes,
        dtypes=dtypes,
        num_atoms=len(group_of_atom),
        links=tuple(sorted(ledger.edges)),
        mode=mode,
        layout=layout,
        identities=ident,
        tables={k: np.where(g.inputs == STAY, -1, ident[g.inputs]) for k, g in table_keys.items()},
        table_nodes={k: g.inputs for k, g in table_keys.items()},
        starts=dict(ledger.starts),
        twins=twin_pairs(ledger, ident, owner),
        bonds=identified(ledger.bonds, ident),
        pools=identified(ledger.pools, ident),
        literals=tuple(ledger.literals),
        parameters=ledger.parameters,
        notes=tuple(ledger.notes),
    )


def _first_calls(ledger: Ledger) -> dict[str, int]:
    """When each layer is met first."""
    when: dict[str, int] = {}
    for i, layer in enumerate(ledger.layers):
        when.setdefault(layer.path, i)
    return when


def _places(
    classes: np.ndarray, owner: np.ndarray, tabled: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a class and an axis without a table that it sits on, each once."""
    use = ~np.append(tabled, True)[owner]
    use[repeats(classes, owner)] = False
    return classes[use], owner[use]


def _reasons(
    layout: Layout, why: np.ndarray, events: list[Event]
) -> tuple[tuple[Fixed, ...], dict[int, tuple[str, Source | None]]]:
    """For every axis and reason that fixes positions of it an entry; the first one of each axis."""
    use = layout.labels == FIXED
    use[STAY] = False
    for i in layout.tables:
        use[layout.nodes(i)] = False
    top = len(events) + 1
    found = layout.owner[use] * top + why[use]
    # neighbours mostly stay for the same reason: few runs are left
    begin = np.flatnonzero(np.append(True, found[1:] != found[:-1])) if len(found) else found
    runs = np.diff(np.append(begin, len(found)))
    found, which = np.unique(found[begin], return_inverse=True)
    counts = np.bincount(which, runs, len(found)).astype(np.int64)
    fixed: list[Fixed] = []
    reasons: dict[int, tuple[str, Source | None]] = {}
    for axis, event, n in zip(*np.divmod(found, top), counts.tolist()):
        if event < len(events):
            text, where = events[event].reason, locate(events[event].info)
        else:
            text, where = "no other variable carries these channels", None
        path, d = layout.keys[axis]
        fixed.append(Fixed(path, d, n, int(layout.lengths[axis]), text, where))
        reasons.setdefault(int(axis), (text, where))
    return tuple(fixed), reasons


@dataclasses.dataclass(frozen=True, eq=False)
class Numbering:
    """What numbers atoms and groups: classes and where they sit; see `Layout` for the arrays."""

    keys: tuple[Key, ...]
    starts: np.ndarray
    owner: np.ndarray
    classes: np.ndarray
    consumer: np.ndarray
    tabled: np.ndarray
    places: tuple[np.ndarray, np.ndarray]

    def number(
        self, free: np.ndarray, when: dict[str, int]
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Atoms group by group in program order; groups have the names of their first producers.

        Returns:
          The atom of every class (``FIXED`` where none), the group of every atom, the names.
        """
        count, axes = len(free), len(self.keys)
        at = np.array([_when(when, path) for path, _ in self.keys], np.int64).reshape(-1)
        signature, order = self._signatures(count, at)
        # the first producer in program order names a group; its kernel before its bias
        first = np.fromiter((axis == 0 for _, axis in self.keys), np.int64, axes)
        rank = (self.consumer.astype(np.int64) << 50) + (np.minimum(at, (1 << 20) - 1) << 22)
        rank += (first << 21) + np.arange(axes)
        best = np.full(count, 1 << 60, np.int64)
        cls, axis = self.places
        np.minimum.at(best, cls, rank[axis])
        chosen = np.flatnonzero(free)
        home = best & ((1 << 21) - 1)  # the axis
        position = self._positions(home, count)

        sort = np.lexsort((best[chosen], order[chosen]))
        _, leads, which = np.unique(signature[chosen][sort], return_index=True, return_inverse=True)
        ranked = np.argsort(leads)
        place = np.empty_like(ranked)
        place[ranked] = np.arange(len(ranked))
        group = np.empty(len(chosen), np.int64)
        group[sort] = place[which.reshape(-1)]
        leaders = chosen[sort[leads[ranked]]]

        sort = np.lexsort((position[chosen], best[chosen], group))
        chosen, group = chosen[sort], group[sort]
        atom_of = np.full(count, FIXED, np.int64)
        atom_of[chosen] = np.arange(len(chosen))
        names: list[str] = []
        used: dict[str, int] = {}
        for i in home[leaders].tolist():
            path = self.keys[i][0]
            name = path.rpartition("/")[0] or path
            used[name] = used.get(name, 0) + 1
            names.append(name if used[name] == 1 else f"{name}#{used[name]}")
        return atom_of, group, names

    def _signatures(self, count: int, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per class a hash of its producer axes, and when its first layer is met."""
        cls, axis = self.places
        codes = np.random.default_rng(0).integers(1, 1 << 62, len(self.keys), dtype=np.uint64)
        every, signature = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        np.add.at(every, cls, codes[axis])
        made = ~self.consumer[axis]
        np.add.at(signature, cls[made], codes[axis[made]])
        order = np.full(count, 1 << 40, np.int64)
        np.minimum.at(order, cls[made], at[axis[made]])
        return np.where(signature == 0, every, signature), order

    def _positions(self, home: np.ndarray, count: int) -> np.ndarray:
        """Of every class its first position on its home axis."""
        out = np.full(count, 1 << 60, np.int64)
        nodes = np.flatnonzero(self.owner == home[self.classes])
        nodes = nodes[nodes != STAY]
        axis = self.owner[nodes]
        np.minimum.at(out, self.classes[nodes], nodes - self.starts[axis])
        return out


def _when(when: dict[str, int], path: str) -> int:
    return when.get(path.rpartition("/")[0], when.get(path, 1 << 30))
