"""The label check: a shrunk network's channels must meet exactly as the original's did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from cnnjax.graph.bonds import Bonds
from cnnjax.graph.complaints import hints, same_variables, where
from cnnjax.graph.ledger import STAY, Event, Ledger, locate, pairs
from cnnjax.graph.network import Graph
from cnnjax.graph.solve import identities
from cnnjax.graph.tracing import Program, analyse, function_program, program_of
from cnnjax.graph.twins import Twins
from cnnjax.graph.types import FIXED, GraphError, Key, LabelError

UNKNOWN = -2


def label_check(
    model: nnx.Module | Program | Callable[..., Any],
    graph: Graph,
    alive: Any,
    *inputs: Any,
    params: Any = None,
) -> dict[Key, np.ndarray]:
    """Proves by a second trace that the shrunk program joins the same channels as the original.

    Args:
      model: the shrunk NNX module (leaves may be abstract; only shapes count), or a function
        ``fn(params, *inputs)``.
      graph: of the original.
      alive: boolean array over the graph's atoms: what is kept.
      *inputs: example inputs; those of ``graph`` by default.
      params: the shrunk variables of a function.

    Returns:
      For every axis of every variable the positions of the *original* axis, in the order in which
      the shrunk program needs them: slice the original's arrays with these. For a grouped kernel's
      input axis of shape (conv_groups, kept): per conv-group.

    Raises:
      LabelError: names the line where channels meet that didn't before, or where sizes clash.
    """
    alive = np.asarray(getattr(alive, "alive", alive), bool)
    if alive.shape != (graph.num_atoms,):
        raise ValueError(f"alive has shape {alive.shape}, the graph has {graph.num_atoms} atoms")
    inputs = inputs or graph.inputs
    if isinstance(model, Program):
        program = model
    elif isinstance(model, nnx.Module):
        program = program_of(model)
    else:
        program = function_program(model, params)
    try:
        ledger, shapes, _ = analyse(program, tuple(inputs), original=graph)
    except GraphError as error:
        raise LabelError(
            f"the shrunk network doesn't run: {error.__cause__ or error}{where(error)}"
            f"{hints(graph)}"
        ) from error
    same_variables(graph, shapes, alive)
    check = _Check(graph, alive, ledger)
    if check.at_once():
        try:
            check.finish()
            return check.index
        except LabelError:  # another order may do
            check = _Check(graph, alive, ledger)
    check.assign()
    check.finish()
    return check.index


class _Check:
    def __init__(self, graph: Graph, alive: np.ndarray, ledger: Ledger) -> None:
        self.graph, self.alive, self.ledger = graph, alive, ledger
        self.ident = identities(ledger)
        self.twins = Twins(graph.twins, graph.starts, graph.identities, ledger)
        self.bonds = Bonds(graph.bonds, graph.pools, ledger, self.ident)
        self.label = np.full(int(self.ident.max()) + 1, UNKNOWN, np.int64)
        self.index: dict[Key, np.ndarray] = {}
        a, b = pairs(ledger.ties, ledger.tie_to)
        use = (a != STAY) & (b != STAY)
        self.tie_a, self.tie_b = self.ident[a[use]], self.ident[b[use]]
        self.atom_of = np.full(int(graph.identities.max()) + 2, FIXED, np.int64)
        own = ~np.append(self.tabled(), True)[graph.layout.owner]
        self.atom_of[graph.identities[own]] = graph.layout.labels[own]

    def tabled(self) -> np.ndarray:
        """For every axis whether it is the input axis of a grouped kernel."""
        layout = self.graph.layout
        out = np.zeros(len(layout.keys), bool)
        out[[layout.index[key] for key in self.graph.tables]] = True
        return out

    def at_once(self) -> bool:
        """Tries the channels of every axis in the order that they have, of all axes together.

        That is what most programs need. Whether it is right is then seen as for any other order:
        channels that meet must be the same old one, and `finish` must find nothing.
        """
        layout, ledger = self.graph.layout, self.ledger
        if len(self.graph.twins) or tuple(ledger.starts) != layout.keys:
            return False
        stay = layout.alive(self.alive)
        for key in self.graph.tables:
            inside = layout.nodes(layout.index[key])
            stay[inside] = np.arange(inside.stop - inside.start) < ledger.lengths[key]
        old = np.flatnonzero(stay)
        if len(old) != ledger.size:
            return False
        own = ~np.append(self.tabled(), True)[layout.owner[old]]
        cls, identity = self.ident[own], self.graph.identities[old[own]]
        self.label[cls] = identity
        if (self.label[cls] != identity).any():
            self.label[:] = UNKNOWN
            return False
        position = old - np.append(layout.starts, 0)[layout.owner[old]]
        for key, start in ledger.starts.items():
            self.index[key] = position[start : start + ledger.lengths[key]]
        return True

    def finish(self) -> None:
        """All that must hold once every position of the new program is an old one."""
        self.group_tables()
        self.twin_pairs()
        self.bound()
        self.relations()
        self.literals()

    def order(self) -> list[Key]:
        """Axes in the order in which the program meets them, producers before consumers."""
        when: dict[str, int] = {}
        for i, layer in enumerate(self.graph.layers):
            when.setdefault(layer.path, i)

        def rank(key: Key) -> tuple[int, int, int]:
            path, axis = key
            at = when.get(path.rpartition("/")[0], when.get(path, 1 << 30))
            return (int(self.graph.axes[key].consumer), at, -axis)

        return sorted((k for k in self.graph.axes if k not in self.graph.tables), key=rank)

    def assign(self) -> None:
        """Gives every class of the new program the old channel that it carries."""
        for key in self.order():
            axis = self.graph.axes[key]
            kept = axis.kept(self.alive)
            old = self.graph.identity[key][kept]
            cls = self.ident[self.ledger.nodes(key)]
            known = self.label[cls]
            unknown = known == UNKNOWN
            if unknown.all():
                order = self.followed(key, cls, kept)
                kept = kept[order]
                self.place(key, kept)
                old = old[order]
                self.label[cls] = old
                bad = self.label[cls] != old
                if bad.any():
                    self.fail(key, int(np.flatnonzero(bad)[0]))
                continue
            if self.twins.among(old) and not unknown.any():
                index = self.twins.order(key, known, kept)
                if index is not None:
                    self.place(key, index)
                    continue
            if np.array_equal(known, old):
                self.place(key, kept)
                continue
            if unknown.any():
                known = self.fill(key, known, old)
            a, b = np.argsort(known, kind="stable"), np.argsort(old, kind="stable")
            bad = known[a] != old[b]
            if bad.any():
                self.fail(key, int(a[np.flatnonzero(bad)[0]]))
            index = np.empty_like(kept)
            index[a] = kept[b]
            self.place(key, index)
            self.label[cls] = known

    def place(self, key: Key, index: np.ndarray) -> None:
        """Decides which old position every position of an axis is."""
        self.index[key] = index
        self.twins.assign(key, index)

    def followed(self, key: Key, cls: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Order of a new axis: that of the channels that it is bound to (depthwise), else as is."""
        same = np.arange(len(kept))
        wanted, old = self.bonds.followers(cls, self.label, UNKNOWN), self.graph.identity[key][kept]
        if (wanted >= 0).all():
            a, b = np.argsort(wanted, kind="stable"), np.argsort(old, kind="stable")
            if np.array_equal(wanted[a], old[b]):
                order = np.empty_like(same)
                order[a] = b
                return order
        want = np.full(len(self.label), UNKNOWN, np.int64)
        for a, b in ((self.tie_a, self.tie_b), (self.tie_b, self.tie_a)):
            use = np.isin(a, cls) & (self.label[b] >= 0)
            want[a[use]] = self.atom_of[self.label[b[use]]]
        wanted = want[cls]
        atoms = self.graph.axes[key].labels[kept]
        if (wanted < 0).any() or np.array_equal(wanted, atoms):
            return same
        a, b = np.argsort(wanted, kind="stable"), np.argsort(atoms, kind="stable")
        if (wanted[a] != atoms[b]).any():
            return same
        order = np.empty_like(same)
        order[a] = b
        return order

    def fill(self, key: Key, known: np.ndarray, old: np.ndarray) -> np.ndarray:
        """Positions not decided yet get the channels that are left, in order."""
        left = list(old)
        for k in known[known != UNKNOWN].tolist():
            if k not in left:
                self.fail(key, int(np.flatnonzero(known == k)[0]))
            left.remove(k)
        known = known.copy()
        known[known == UNKNOWN] = left
        return known

    def group_tables(self) -> None:
        """Grouped kernels: every new conv-group is one old conv-group, with its own channels."""
        seen = set()
        for g in self.ledger.grouped:
            key = self.ledger.axis_of(g.kernel)
            if key is None or key not in self.graph.tables:
                continue
            axis, path = self.graph.axes[key], key[0]
            outs = self.ledger.axis_of(g.outputs)
            assert outs is not None
            table = self.graph.tables[key]
            per = self.graph.shapes[path][outs[1]] // len(table)
            old_group = (self.index[outs] // per).reshape(len(g.outputs), -1)
            new = self.label[self.ident[g.inputs]]
            rows = []
            for q in range(len(new)):
                home = old_group[q, 0]
                if (old_group[q] != home).any():
                    self.fail_at(g.info, f"{path}: a conv-group has outputs of several old ones")
                row = table[home]
                mask = axis.alive(self.alive)[home] if axis.table is not None else row == row
                at = np.flatnonzero(mask)
                a, b = np.argsort(new[q], kind="stable"), np.argsort(row[at], kind="stable")
                if len(a) != len(b) or (new[q][a] != row[at][b]).any():
                    self.fail_at(g.info, f"{path}: conv-group {q} reads other channels than before")
                index = np.empty(len(at), np.int64)
                index[a] = at[b]
                if self.twins.among(row[at]):
                    # which twin is which: by the positions themselves
                    nodes = self.graph.table_nodes[key][home]
                    new_nodes = self.twins.old[g.inputs[q]]
                    where = {int(nodes[i]): int(i) for i in at}
                    index = np.array([where.get(int(n), -1) for n in new_nodes], np.int64)
                    if sorted(index.tolist()) != at.tolist():
                        self.fail_at(g.info, f"{path}: conv-group {q} reads twins of others")
                rows.append(index)
            found = np.asarray(rows)
            if key in seen and not np.array_equal(self.index[key], found):
                self.fail_at(g.info, f"{path}: two calls need different orders")
            seen.add(key)
            self.index[key] = found if axis.table is not None else found[0]
        for key in self.graph.tables:
            if key not in seen:
                kept = self.graph.axes[key].kept(self.alive)
                size = self.ledger.lengths[key]
                if kept.shape[-1] != size or self.graph.axes[key].table is not None:
                    raise LabelError(f"{key[0]}: no longer read by a grouped convolution")
                self.index[key] = kept

    def twin_pairs(self) -> None:
        """Channels that an axis carries twice meet the same partners as before."""
        if self.twins.mismatch():
            raise LabelError(
                "channels that are the same by a sum or product of an array with itself in another "
                f"order meet other partners than in the original{hints(self.graph)}"
            )

    def bound(self) -> None:
        """Channels that one output is made of are those of one output of the original."""
        atoms = self.atom_of[:-1]
        event = self.bonds.mismatch(self.label, (atoms < 0) | np.append(self.alive, True)[atoms])
        if event is not None:
            self.fail_at(event.info, f"{event.reason}: joins other channels than in the original")

    def relations(self) -> None:
        """Ties, padding and fixed positions of the new program were there in the old one."""
        ledger = self.ledger
        label = self.label[self.ident]
        atom = np.where(label < 0, FIXED, self.atom_of[label])
        a, b = pairs(ledger.ties, ledger.tie_to)
        self.must(atom[a] == atom[b], ledger.ties, "binds channels that weren't bound")
        for events, to in ((ledger.same, ledger.same_to), (ledger.ties, ledger.tie_to)):
            a, b = pairs(events, to)
            padded = (a == STAY) != (b == STAY)
            free = (atom[a] != FIXED) | (atom[b] != FIXED)
            self.must(~(padded & free), events, "channels meet padding")
        fixes = [e for e in ledger.fixes if not e.policy]
        nodes = np.concatenate([np.zeros(0, np.int64), *(e.labels for e in fixes)])
        self.must(atom[nodes] == FIXED, fixes, "wasn't so before")

    def must(self, good: np.ndarray, events: list[Event], text: str) -> None:
        """Raises for the first event that isn't good throughout."""
        if not good.all():
            ends = np.cumsum([len(e.labels) for e in events])
            event = events[int(np.searchsorted(ends, int(np.argmin(good)), "right"))]
            self.fail_at(event.info, f"{event.reason}: {text}")

    def literals(self) -> None:
        """Constants computed from the width change the function unless a statistic is allowed."""
        old, new = self.graph.literals, self.ledger.literals
        if len(old) != len(new):
            return
        removed = np.flatnonzero(~self.alive)
        if any(g.statistic and np.isin(g.atoms, removed).any() for g in self.graph.groups):
            return
        for (a, _), (b, info) in zip(old, new):
            if a != b and (a == a or b == b):  # NaN is like NaN
                self.fail_at(info, f"a constant of the program follows the width: {a:g} -> {b:g}")

    def fail(self, key: Key, position: int) -> None:
        """Raises for a position of an axis that carries another channel than it should."""
        node = int(self.ledger.nodes(key)[position])
        cls = int(self.ident[node])
        for event, to in zip(self.ledger.same, self.ledger.same_to):
            if (event.labels == node).any() or (to == node).any():
                self.fail_at(
                    event.info,
                    f"{event.reason}: {key[0]} axis {key[1]} meets other channels than in the "
                    f"original (position {position})",
                    cls,
                )
        raise LabelError(f"{key[0]} axis {key[1]}: position {position} carries another channel")

    def fail_at(self, info: Any, text: str, cls: int | None = None) -> None:
        """Raises with the line, and with the lines that cut the same channels."""
        cuts = []
        for s in self.ledger.splits:
            if cls is None or (self.ident[s.labels] == cls).any():
                cuts.append(f"{s.reason} at {locate(s.info)}")
        for e in self.ledger.fixes:
            if e.policy and (cls is None or (self.ident[e.labels] == cls).any()):
                cuts.append(f"{e.reason} at {locate(e.info)}")
        more = "; channels are cut here: " + ", ".join(dict.fromkeys(cuts)) if cuts else ""
        raise LabelError(f"{text} at {locate(info)}{more}{'' if cuts else hints(self.graph)}")
