"""From a ledger to a `Graph`: equalities and ties are solved once, by connected components."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cnnjax.graph.ledger import STAY, Event, Ledger, locate
from cnnjax.graph.network import Graph
from cnnjax.graph.outcome import constraints_of, groups_of, layers_of, products, statistics_of
from cnnjax.graph.twins import twin_pairs
from cnnjax.graph.types import FIXED, Axis, Fixed, Key


def components(size: int, left: list[np.ndarray], right: list[np.ndarray]) -> np.ndarray:
    """Class of every node; edges at node ``STAY`` are left out."""
    if not left:
        return np.arange(size)
    a, b = np.concatenate(left), np.concatenate(right)
    ok = (a != STAY) & (b != STAY)
    a, b = a[ok], b[ok]
    matrix = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(size, size))
    return connected_components(matrix, directed=False)[1].astype(np.int64)


def identities(ledger: Ledger) -> np.ndarray:
    """Identity of every node: equal where positions meet."""
    return components(ledger.size, [e.labels for e in ledger.same], ledger.same_to)


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


def _classes(ledger: Ledger) -> np.ndarray:
    left = [e.labels for e in ledger.same] + [e.labels for e in ledger.ties]
    return components(ledger.size, left, ledger.same_to + ledger.tie_to)


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
        for event, other in zip(relation, to):
            if (event.labels == STAY).any() or (other == STAY).any():
                nodes = np.concatenate([event.labels[other == STAY], other[event.labels == STAY]])
                reason = f"meets padding or fixed positions in {event.reason}"
                events.append(Event(nodes, reason, event.info))
    first = np.full(ledger.size, len(events), np.int64)
    for i in range(len(events) - 1, -1, -1):
        first[events[i].labels] = i
    return first, events


def solve(
    ledger: Ledger, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, Any], mode: str
) -> Graph:
    """The graph of a walked program."""
    ident = identities(ledger)
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
    classes = _classes(ledger)
    _stuck_shuffles(ledger, classes)
    first, events = _fixed_nodes(ledger)
    count = int(classes.max()) + 1
    why = np.full(count, len(events), np.int64)
    np.minimum.at(why, classes, first)
    free = why == len(events)
    free[classes[STAY]] = False

    own = {k: classes[s : s + ledger.lengths[k]] for k, s in ledger.starts.items()}
    # a class that sits on one axis only is carried by nothing else: the variable isn't used
    seen = np.zeros(count, np.int64)
    for key, c in own.items():
        if key not in table_keys:
            seen[c] += 1  # once, however often a class comes
    lonely = free & (seen < 2)
    free &= ~lonely

    consumer = {k: s in ledger.consumed for k, s in ledger.starts.items()}
    signature, order, when = _signatures(ledger, own, consumer, free, table_keys, count)
    atom_of, group_of_atom, names = _number(own, consumer, free, signature, order, table_keys, when)

    def atoms(labels: np.ndarray) -> np.ndarray:
        out = atom_of[classes[labels]]
        out[labels == STAY] = FIXED
        return out

    axes: dict[Key, Axis] = {}
    fixed: list[Fixed] = []
    for key, c in own.items():
        path, axis = key
        labels = atom_of[c]
        if key in table_keys:
            g = table_keys[key]
            outs = ledger.axis_of(g.outputs)
            table = atoms(g.inputs)
            if (table >= 0).any():
                axes[key] = Axis(
                    path, axis, np.full(len(c), FIXED), table, outs[1] if outs else None, True
                )
                continue
            labels = np.full(len(c), FIXED)
        reason = source = None
        stay = labels == FIXED
        if stay.any():
            by = why[c[stay]]
            for i in np.unique(by):
                n = int((by == i).sum())
                if i < len(events):
                    text, where = events[i].reason, locate(events[i].info)
                else:
                    text, where = "no other variable carries these channels", None
                fixed.append(Fixed(path, axis, n, len(c), text, where))
                if reason is None:
                    reason, source = text, where
        axes[key] = Axis(path, axis, labels, None, None, consumer[key], reason, source)

    constraints = constraints_of(ledger, atoms)
    statistics = statistics_of(ledger, atoms, len(group_of_atom))
    groups = groups_of(axes, group_of_atom, names, constraints, statistics)
    layers = layers_of(ledger, shapes, atoms)
    starts = ledger.starts.items()
    return Graph(
        axes=axes,
        groups=groups,
        constraints=constraints,
        fixed=tuple(fixed),
        layers=layers,
        shapes=shapes,
        dtypes=dtypes,
        num_atoms=len(group_of_atom),
        edges=tuple(sorted(ledger.edges)),
        mode=mode,
        identity={k: ident[s : s + ledger.lengths[k]] for k, s in starts},
        tables={k: np.where(g.inputs == STAY, -1, ident[g.inputs]) for k, g in table_keys.items()},
        table_nodes={k: g.inputs for k, g in table_keys.items()},
        starts=dict(ledger.starts),
        twins=twin_pairs(ledger, ident),
        literals=tuple(ledger.literals),
        parameters=ledger.parameters,
        notes=tuple(ledger.notes),
    )


def _signatures(ledger, own, consumer, free, table_keys, count):
    """Per class a hash of its producer axes, and when its first layer is met."""
    when: dict[str, int] = {}
    for i, layer in enumerate(ledger.layers):
        when.setdefault(layer.path, i)
    rng = np.random.default_rng(0)
    signature = np.zeros(count, np.uint64)
    every = np.zeros(count, np.uint64)
    order = np.full(count, 1 << 40, np.int64)
    for key, c in own.items():
        code = rng.integers(1, 1 << 62, dtype=np.uint64)
        if key in table_keys:
            continue
        every[c] += code  # once, however often a class comes
        if not consumer[key]:
            signature[c] += code
            at = when.get(key[0].rpartition("/")[0], when.get(key[0], 1 << 30))
            order[c] = np.minimum(order[c], at)
    signature = np.where(signature == 0, every, signature)
    return signature, order, when


def _number(own, consumer, free, signature, order, table_keys, when):
    """Numbers atoms group by group in program order; names groups by their first producer."""
    count = len(free)
    position = np.zeros(count, np.int64)
    owner: dict[int, Key] = {}
    best = np.full(count, 1 << 60, np.int64)
    for rank, (key, c) in enumerate(own.items()):
        if key in table_keys:
            continue
        # the first producer in program order names a group; its kernel before its bias
        at = when.get(key[0].rpartition("/")[0], when.get(key[0], (1 << 20) - 1))
        score = (consumer[key] << 50) + (at << 22) + ((key[1] == 0) << 21) + rank
        better = np.flatnonzero(score < best[c])[::-1]  # backwards: the first position stays
        best[c[better]] = score
        position[c[better]] = better
        owner[score] = key
    chosen = np.flatnonzero(free)
    group_order: dict[int, tuple[int, int]] = {}
    for cls in chosen.tolist():
        sig = int(signature[cls])
        mine = (int(order[cls]), int(best[cls]))
        if sig not in group_order or mine < group_order[sig]:
            group_order[sig] = mine
    ranked = sorted(group_order, key=lambda s: group_order[s])
    index = {sig: i for i, sig in enumerate(ranked)}
    group = np.array([index[int(signature[c])] for c in chosen], dtype=np.int64)
    sort = np.lexsort((position[chosen], best[chosen], group)) if len(chosen) else []
    chosen, group = chosen[sort], group[sort]
    atom_of = np.full(count, FIXED, np.int64)
    atom_of[chosen] = np.arange(len(chosen))
    names: list[str] = []
    used: dict[str, int] = {}
    for sig in ranked:
        path = owner[group_order[sig][1]][0]
        name = path.rpartition("/")[0] or path
        used[name] = used.get(name, 0) + 1
        names.append(name if used[name] == 1 else f"{name}#{used[name]}")
    return atom_of, group, names
