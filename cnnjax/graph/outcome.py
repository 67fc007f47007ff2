"""What follows from solved labels: constraints, statistics, groups and layers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from cnnjax.graph.axes import Layout
from cnnjax.graph.ledger import Event, Ledger, Split, locate
from cnnjax.graph.types import Constraint, Group, Key, Layer
from cnnjax.graph.values import Value


def constraints_of(ledger: Ledger, atoms) -> tuple[Constraint, ...]:
    out: list[Constraint] = []
    keyed: set[tuple[Any, ...]] = set()

    def add(c: Constraint) -> None:
        if not len(c.atoms):
            return
        key = (c.kind, *(np.sort(p).tobytes() for p in (*c.parts, *c.paired)))
        if key not in keyed:
            keyed.add(key)
            out.append(c)

    def trivial(rows: np.ndarray) -> bool:
        rows = np.sort(rows, axis=1)
        return bool((rows == rows[:1]).all())

    partitions: list[tuple[np.ndarray, Any]] = []
    for s in ledger.splits:
        rows = atoms(s.labels)
        partitions.append((rows, s))
        if trivial(rows) or (s.reshape and bool((rows == rows[:, :1]).all())):
            continue
        add(Constraint("split", tuple(rows), s.reason, source=locate(s.info)))
    for g in ledger.grouped:
        ins, outs = atoms(g.inputs), atoms(g.outputs)
        partitions.append((ins, g))
        path = g.path.rpartition("/")[0] or g.path
        add(
            Constraint(
                "grouped",
                tuple(ins),
                f"grouped convolution {path}",
                tuple(outs),
                path,
                locate(g.info),
            )
        )
    for parts, _, (_, info) in products(partitions):
        add(Constraint("split", tuple(parts), "split again after a shuffle", source=locate(info)))
    return tuple(out)


def products(partitions):
    """Where the same channels are cut in parts twice, the intersections keep equal numbers.

    A shuffle interleaves by rank among the survivors, so that a channel meets the same channels
    as before only if each pair of old and new part keeps the same number.
    """
    by_support: dict[bytes, list[tuple[np.ndarray, Any]]] = {}
    for rows, s in partitions:
        flat = np.sort(rows.ravel())
        if flat[0] < 0 or (np.diff(flat) == 0).any():
            continue
        by_support.setdefault(flat.tobytes(), []).append((rows, s))
    for found in by_support.values():
        for (a, _), (b, s) in itertools.pairwise(found):
            part = dict(zip(a.ravel().tolist(), np.repeat(np.arange(len(a)), a.shape[1]).tolist()))
            cells: dict[tuple[int, int], list[int]] = {}
            for j, row in enumerate(b.tolist()):
                for atom in row:
                    cells.setdefault((part[atom], j), []).append(atom)
            labels = s.labels if isinstance(s, Split) else s.inputs
            yield [np.array(cells[k]) for k in sorted(cells)], (len(a), len(b)), (labels, s.info)


def statistics_of(ledger: Ledger, atoms, count: int) -> dict[int, Event]:
    """For every atom under a statistic, the first such event."""
    out: dict[int, Event] = {}
    for event in ledger.statistics:
        found = np.unique(atoms(event.labels))
        if len(found) < 2:
            continue  # one atom: it can't go alone
        for a in found[found >= 0].tolist():
            out.setdefault(a, event)
    return out


def groups_of(
    layout: Layout, group_of_atom: np.ndarray, names, constraints, statistics
) -> tuple[Group, ...]:
    """Groups with the axes that they sit on."""
    axes = len(layout.keys)
    on = layout.labels >= 0
    places = group_of_atom[layout.labels[on]] * axes + layout.owner[on]
    # neighbours mostly are of the same group: few are left
    found = [places[np.append(True, places[1:] != places[:-1])[: len(places)]]]
    for i, (table, _) in layout.tables.items():
        found.append(np.unique(group_of_atom[table[table >= 0]]) * axes + i)
    members: list[list[Key]] = [[] for _ in names]
    producers: list[list[Key]] = [[] for _ in names]
    which, at = np.divmod(np.unique(np.concatenate(found)), max(axes, 1))
    for g, i, consumed in zip(which.tolist(), at.tolist(), layout.consumer[at].tolist()):
        members[g].append(layout.keys[i])
        if not consumed and i not in layout.tables:
            producers[g].append(layout.keys[i])
    touching: list[list[Constraint]] = [[] for _ in names]
    for c in constraints:
        for g in np.unique(group_of_atom[c.atoms]).tolist():
            touching[g].append(c)
    bounds = np.searchsorted(group_of_atom, np.arange(len(names) + 1))
    out = []
    for g, name in enumerate(names):
        atoms = np.arange(bounds[g], bounds[g + 1])
        event = None
        if statistics:
            event = next((statistics[a] for a in atoms.tolist() if a in statistics), None)
        out.append(
            Group(
                name,
                g,
                atoms,
                tuple(members[g]),
                tuple(producers[g]) or tuple(members[g]),
                tuple(touching[g]),
                event.reason if event else None,
                locate(event.info) if event else None,
            )
        )
    return tuple(out)


def layers_of(ledger: Ledger, shapes, atoms) -> tuple[Layer, ...]:
    calls: dict[tuple[str, str], int] = {}
    sizes: dict[str, int] = {}
    for path, shape in shapes.items():
        if path in ledger.parameters:
            parent = path.rpartition("/")[0] or path
            sizes[parent] = sizes.get(parent, 0) + int(np.prod(shape))

    def labels(val: Value | None, d: int | None) -> np.ndarray | None:
        if val is None or d is None:
            return None
        c = val.comp_on(d)
        if c is None or len(c.dims) > 1:
            return None
        # what one layer makes and the next reads is often the same array: it is looked up once
        key = id(c.labels)
        if key not in looked_up:
            looked_up[key] = atoms(c.labels)
        return looked_up[key]

    looked_up: dict[int, np.ndarray] = {}
    out = []
    for a in ledger.layers:
        fields = dict(a.fields)
        if a.kind in ("batch_norm", "norm", "scale") and a.output is not None:
            on = [c.dims[0] for c in a.output.comps if len(c.dims) == 1]
            fields["out_axis"] = on[-1] if on else len(a.output_shape) - 1
            fields["in_axis"] = fields["out_axis"] if a.input_shape == a.output_shape else None
        call = calls.get((a.path, a.kind), 0)
        calls[a.path, a.kind] = call + 1
        out.append(
            Layer(
                a.path,
                a.kind,
                a.kernel,
                tuple(shapes.get(a.kernel or "", a.kernel_shape)),
                tuple(a.input_shape),
                tuple(a.output_shape),
                params=sizes.get(a.path, 0) if a.path else 0,
                in_labels=labels(a.inputs, fields.get("in_axis")),
                out_labels=labels(a.output, fields.get("out_axis")),
                call=call,
                source=locate(a.info),
                **fields,
            )
        )
    return tuple(out)
