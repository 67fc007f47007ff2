"""What `cnnjax.graph.trace` returns: atoms, axes, groups, constraints and layers.

An *atom* is the smallest thing that can be removed: positions of leaf axes that live and die
together (a channel: one row of each kernel, bias, scale, running mean that carries it). Atoms are
numbered ``0 .. graph.num_atoms - 1``; a *decision* is a boolean array ``alive`` over the atoms.
``FIXED`` (-1) stands for a position that must stay.

Conventions for whoever slices leaves (`cnnjax.surgery`, `cnnjax.pruning.shrink`):

* ``axis.kept(alive)`` are the positions of that axis that survive, in increasing order. The order
  that the shrunk program needs can differ (a channel shuffle interleaves by rank among the
  survivors): `cnnjax.graph.label_check` re-traces the new module and returns the index array of
  every axis in the order that the new program needs, so slice with its result.
* Grouped convolution with different survivors in each conv-group: the kernel's input axis has a
  ``table`` of shape (conv_groups, I/groups), and the survivors of row q are the input positions of
  the output channels of conv-group q (``table_axis``). `Axis.kept` then has that shape, too.
* A conv-group whose inputs and outputs are all removed disappears (``feature_group_count`` falls).

How layers behind a custom formulation are found: an equation of one of the primitives
``cnnjax_depthwise_conv``, ``cnnjax_grouped_conv``, ``cnnjax_pointwise_conv`` and
``cnnjax_dense_conv`` (`cnnjax.ops`) is one convolution
``(x (N, *S, C), kernel (*K, C/g, O), ...) -> (N, *S', O)``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

FIXED = -1
Key = tuple[str, int]  # (path of a variable, axis)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where in the user's code an operation was written."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One axis of one variable.

    Attributes:
      path: the variable's path, e.g. ``"layer1/0/conv2/kernel"``.
      axis: the axis, never negative.
      labels: int array of the axis' length: the atom of each position, ``FIXED`` where it stays.
        All ``FIXED`` where ``table`` is given.
      table: None, or int array (conv_groups, I/groups): the atom of each position, per conv-group.
      table_axis: the axis of the same variable that the conv-groups partition (the outputs).
      consumer: True for an axis that is contracted away (the input axis of a kernel).
      reason: why positions are fixed, if some are.
      source: the line that fixed them, if known.
    """

    path: str
    axis: int
    labels: np.ndarray
    table: np.ndarray | None = None
    table_axis: int | None = None
    consumer: bool = False
    reason: str | None = None
    source: Source | None = None

    def __str__(self) -> str:
        labels = self.labels if self.table is None else self.table
        free = int((labels >= 0).sum())
        text = f"{self.path} axis {self.axis}: {free}/{labels.size} positions of"
        text += f" {len(self.atoms)} atoms may go"
        where = f" at {self.source}" if self.source else ""
        return text + (f"; {self.reason}{where}" if self.reason else "")

    @property
    def size(self) -> int:
        """Length of the axis."""
        return len(self.labels)

    @property
    def atoms(self) -> np.ndarray:
        """The atoms on this axis, sorted, each once."""
        # quicker than np.unique on short arrays, of which there are thousands
        found = np.sort(self.labels if self.table is None else self.table, axis=None)
        keep = found >= 0
        keep[1:] &= found[1:] != found[:-1]
        return found[keep]

    @property
    def prunable(self) -> bool:
        """Whether at least one position may go."""
        return bool(len(self.atoms))

    def alive(self, alive: np.ndarray) -> np.ndarray:
        """Boolean mask, shaped like ``labels`` (or ``table``), of the positions that survive."""
        labels = self.labels if self.table is None else self.table
        return np.append(np.asarray(alive, bool), True)[labels]

    def kept(self, alive: np.ndarray) -> np.ndarray:
        """Surviving positions in increasing order: (kept,), or (surviving conv_groups, kept).

        Raises:
          ValueError: if the conv-groups keep different numbers of input channels.
        """
        mask = self.alive(alive)
        if self.table is None:
            return np.flatnonzero(mask)
        rows = [np.flatnonzero(row) for row in mask if row.any()]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(
                f"{self.path}: the conv-groups keep {[len(r) for r in rows]} input channels; a "
                "grouped convolution needs the same number in each"
            )
        return np.asarray(rows, dtype=np.int64).reshape(len(rows), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Constraint:
    """Parts that must keep equal numbers of positions, unless nothing in them is removed.

    ``kind`` is ``"split"`` (chunks of one axis: every part keeps the same number) or ``"grouped"``
    (conv-groups of one layer; a conv-group may also go entirely, see ``paired``). Parts may differ
    in size (a shuffle whose groups don't divide); then all atoms stay, or equal numbers do.

    Attributes:
      kind: ``"split"`` or ``"grouped"``.
      parts: for each part the atoms of its positions, in order (``FIXED`` allowed, atoms may
        repeat). Counting is by position: ``sum(alive[part])`` is the same for all parts.
      paired: for ``"grouped"``: the output positions of each conv-group (same form), which need
        equal counts as well; conv-group q may vanish only if parts[q] and paired[q] both do.
      reason: what asks for it.
      path: the layer's path, for ``"grouped"``.
      source: the line that asks for it.
    """

    kind: str
    parts: tuple[np.ndarray, ...]
    reason: str
    paired: tuple[np.ndarray, ...] = ()
    path: str | None = None
    source: Source | None = None

    @property
    def atoms(self) -> np.ndarray:
        """All atoms that the constraint speaks of."""
        found = np.unique(np.concatenate([*self.parts, *self.paired]))
        return found[found >= 0]

    def __str__(self) -> str:
        sizes = sorted({len(p) for p in self.parts})
        where = f" at {self.source}" if self.source else ""
        text = f"{self.kind}: {len(self.parts)} parts of {'/'.join(map(str, sizes))}"
        return f"{text}, {self.reason}{where}"

    def counts(self, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Surviving positions of every part, and of every ``paired`` part (may be empty)."""
        mask = np.append(np.asarray(alive, bool), True)
        return (
            np.array([int(mask[p].sum()) for p in self.parts], dtype=np.int64),
            np.array([int(mask[p].sum()) for p in self.paired], dtype=np.int64),
        )

    def holds(self, alive: np.ndarray) -> bool:
        """Whether a decision satisfies the constraint."""
        if np.asarray(alive, bool)[self.atoms].all():
            return True
        n, m = self.counts(alive)
        if self.kind == "grouped":
            gone = n == 0
            if len(m):
                if np.any(gone != (m == 0)):
                    return False
                m = m[~gone]
            n = n[~gone]
        return len(set(n.tolist())) <= 1 and len(set(m.tolist())) <= 1


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Atoms that sit on the same producer axes: channels that compete with each other.

    Attributes:
      name: path of the first producing variable's module (unique within a graph).
      index: position in ``graph.groups``.
      atoms: sorted atom ids.
      members: every (path, axis) that carries at least one of the atoms, consumers included.
      producers: those of ``members`` that aren't contracted away (kernel outputs, biases, scales,
        running statistics).
      constraints: the graph's constraints that touch one of the atoms.
      statistic: None, or why removing channels changes what the survivors compute (a mean over
        channels, a softmax over channels): such groups are pruned only on request.
      statistic_source: the line.
    """

    name: str
    index: int
    atoms: np.ndarray
    members: tuple[Key, ...]
    producers: tuple[Key, ...]
    constraints: tuple[Constraint, ...] = ()
    statistic: str | None = None
    statistic_source: Source | None = None

    @property
    def size(self) -> int:
        """Number of atoms."""
        return len(self.atoms)

    def __str__(self) -> str:
        notes = [f"{len(self.members)} axes"]
        if self.constraints:
            notes.append(f"{len(self.constraints)} constraints")
        if self.statistic:
            notes.append(f"statistic: {self.statistic}")
        return f"{self.name}: {self.size} atoms, " + ", ".join(notes)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Positions that can't be removed, and why."""

    path: str
    axis: int
    positions: int  # how many of the axis
    size: int
    reason: str
    source: Source | None = None

    def __str__(self) -> str:
        where = f" at {self.source}" if self.source else ""
        return f"{self.path} axis {self.axis}: {self.positions}/{self.size} {self.reason}{where}"


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One application of one layer (a module used twice gives two entries, ``call`` 0 and 1).

    Attributes:
      path: the module's path, e.g. ``"layer1/0/conv2"`` (the kernel's parent).
      kind: ``"conv"``, ``"conv_transpose"``, ``"dense"``, ``"batch_norm"``, ``"norm"``,
        ``"pool"`` (no path), ``"matmul"`` (two activations, no path).
      kernel: path of the kernel (of the scale for a normalization), or None.
      kernel_shape: its shape: (*K, C/groups, O) for convolutions, (C, O) for dense ones.
      input_shape: shape of the activation that goes in, in the program's own layout.
      output_shape: shape of the activation that comes out.
      in_axis: channel axis of the input (None for a matmul of two activations).
      out_axis: channel axis of the output.
      stride: per spatial axis (empty for dense).
      dilation: kernel dilation per spatial axis.
      input_dilation: per spatial axis (the stride of a transposed convolution).
      padding: (low, high) per spatial axis.
      groups: feature_group_count.
      macs: multiply-accumulates at batch 1: Ho*Wo*kh*kw*C*O/groups; 0 for norms and pools.
      params: number of parameters of the module (kernel + bias, scale + bias).
      in_labels: atom of every input channel (None where not per-channel).
      out_labels: atom of every output channel.
      call: how many applications of the same module come before.
      source: the line that calls it.
    """

    path: str
    kind: str
    kernel: str | None
    kernel_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    in_axis: int | None = None
    out_axis: int | None = None
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    input_dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    groups: int = 1
    macs: int = 0
    params: int = 0
    in_labels: np.ndarray | None = None
    out_labels: np.ndarray | None = None
    call: int = 0
    source: Source | None = None

    def __str__(self) -> str:
        return (
            f"{self.path or self.kind}: {self.kind} {self.input_shape} -> {self.output_shape}"
            f" kernel {self.kernel_shape} stride {self.stride} groups {self.groups}"
            f" macs {self.macs:,} params {self.params:,}"
        )


class GraphError(ValueError):
    """A network that can't be read: names the operation, the parameter and the line."""


class LabelError(ValueError):
    """A shrunk network whose channels don't meet as in the original: names the line."""
