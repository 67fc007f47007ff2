"""Training on the l0 ball: iterative hard thresholding and memory-bounded projection.

Jin, Yuan, Feng, Yan, "Training skinny deep neural networks with iterative hard thresholding
methods", arXiv 1607.05423; Collins & Kohli, "Memory bounded deep convolutional networks", arXiv
1412.1442.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax import tree
from cnnjax.pruning import masks
from cnnjax.pruning.transforms import MaskedState, _to_zero, _zero, _zero_moments

PyTree = Any
Keep = float | int | Mapping[str, float | int]


def keep_counts(
    params: PyTree,
    keep: Keep,
    *,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
) -> dict[str, int]:
    """How many weights each kernel keeps.

    Args:
      params: any Flax tree.
      keep: a density in (0, 1] for all kernels, or ``{glob: density or count}``: an integer is a
        number of weights, a float a density; the first glob that matches counts, kernels that none
        matches stay dense. ``floor(density * n)`` are kept.
      include: globs of paths to prune.
      exclude: globs of paths to leave alone.

    Returns:
      ``{path: k}``, ``1 <= k <= n``.

    Raises:
      ValueError: a density or count that empties a layer or exceeds it (names the layer); a glob
        that matches nothing.
    """
    flat = tree.flatten(params)
    paths = masks.candidates(params, include, exclude)
    table = keep if isinstance(keep, Mapping) else {"**": float(keep)}
    tree.check_patterns(tuple(table), paths, what="keep pattern")
    out = {}
    for path in paths:
        value = next((v for g, v in table.items() if tree.glob_match(g, path)), None)
        if value is None:
            continue
        n = int(np.prod(np.shape(flat[path])))
        count = value if isinstance(value, int) else math.floor(Fraction(repr(float(value))) * n)
        if not 1 <= count <= n:
            raise ValueError(
                f"keeping {value} of {path} ({n} weights) leaves {count}: give a density in (0, 1] "
                f"of at least {1 / n:.2g}, or a count from 1 to {n}"
            )
        out[path] = count
    return out


def project_l0(params: PyTree, counts: Mapping[str, Any]) -> tuple[PyTree, PyTree]:
    """Keeps the ``counts[path]`` largest magnitudes of each named leaf; the nearest such tree.

    Args:
      params: any Flax tree.
      counts: ``{path: k}``, traced or not; other leaves stay.

    Returns:
      ``(parameters, mask)``.
    """
    mask = tree.map_with_path(
        lambda path, w: (
            jnp.ones(w.shape, bool)
            if path not in counts
            else masks.prune_smallest(
                [jnp.abs(w)], (w.size - jnp.asarray(counts[path], jnp.int32))[None], (0,)
            )[0]
        ),
        params,
    )
    return _zero(params, mask), mask


def iterative_hard_thresholding(
    optimizer: optax.GradientTransformation,
    keep: Keep,
    *,
    dense_steps: int,
    sparse_steps: int,
    cycles: int,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    reset_moments: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Trains everything, cuts to the k largest, trains those, releases the others from zero; again.

    Each cycle is ``dense_steps`` updates of all weights, the cut (made by the last of them), and
    ``sparse_steps`` updates of the survivors under the mask; then the removed connections start
    again from zero. After the last cycle the mask stays. With ``dense_steps=1, sparse_steps=0``
    this is classical hard thresholding, ``W <- O_k(W - eta grad)``.

    Args:
      optimizer: any optax transformation, complete (learning rate included).
      keep: see `keep_counts`; counts are per layer, so that small layers are not emptied.
      dense_steps: s1, at least 1.
      sparse_steps: s2, at least 0.
      cycles: number of cycles; the released phase after a cycle is the next one's dense phase.
      include: globs of paths to prune.
      exclude: globs of paths to leave alone.
      reset_moments: zero the optimizer's moments of removed weights at each cut; without it
        momentum goes on moving them when they are released.

    Raises:
      ValueError: numbers out of range; see also `keep_counts` (at ``init``).
    """
    if dense_steps < 1 or sparse_steps < 0 or cycles < 1:
        raise ValueError(
            "need dense_steps >= 1, sparse_steps >= 0 and cycles >= 1; got "
            f"{dense_steps}, {sparse_steps}, {cycles}"
        )
    optimizer = optax.with_extra_args_support(optimizer)
    period, last = dense_steps + sparse_steps, cycles * (dense_steps + sparse_steps)
    options: Any = {"include": include, "exclude": exclude}

    def init(params: PyTree) -> Any:
        keep_counts(params, keep, **options)
        return MaskedState(
            jnp.zeros((), jnp.int32), masks.full_mask(params), optimizer.init(params)
        )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, MaskedState]:
        if params is None:
            raise ValueError("hard thresholding needs update(grads, state, params)")
        counts = keep_counts(params, keep, **options)
        phase = state.count % period
        free = (phase < dense_steps) & (state.count < last)
        mask = jax.tree.map(lambda m: m | free, state.mask)
        updates, inner = optimizer.update(_zero(updates, mask), state.inner, params, **extra)
        updates = _to_zero(updates, params, mask)

        def cut(operand: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            _, inner = operand
            _, new = project_l0(optax.apply_updates(params, updates), counts)
            return new, _zero_moments(inner, new) if reset_moments else inner

        due = free & (phase == dense_steps - 1)
        mask, inner = jax.lax.cond(due, cut, lambda operand: operand, (mask, inner))
        return _to_zero(updates, params, mask), MaskedState(state.count + 1, mask, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def memory_bounded_l0(
    optimizer: optax.GradientTransformation,
    keep: Keep,
    *,
    every: int,
    last: int,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
) -> optax.GradientTransformationExtraArgs:
    """Projects each layer on its l0 ball every so many updates (Collins & Kohli 2014).

    Between projections zeros may grow again (momentum goes on through them); after the last they
    are frozen. For which layers and densities see `greedy_densities`.

    Args:
      optimizer: any optax transformation, complete.
      keep: see `keep_counts`.
      every: updates between projections.
      last: the update that makes the last projection (counted from 1); a multiple of ``every``.
      include: globs of paths to prune.
      exclude: globs of paths to leave alone.

    Raises:
      ValueError: ``last`` that is no positive multiple of ``every``; see also `keep_counts`.
    """
    if every < 1 or last < every or last % every:
        raise ValueError(f"last must be a positive multiple of every, got {last} and {every}")
    return iterative_hard_thresholding(
        optimizer,
        keep,
        dense_steps=every,
        sparse_steps=0,
        cycles=last // every,
        include=include,
        exclude=exclude,
        reset_moments=False,
    )


def memory(
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
    *,
    value_bits: int = 32,
    index_bits: int = 16,
) -> int:
    """Bits of all layers: ``min(dense, k (value + index))`` of each."""
    return sum(
        min(n * value_bits, counts.get(path, n) * (value_bits + index_bits))
        for path, n in sizes.items()
    )


def greedy_densities(
    params: PyTree,
    fit: Callable[..., Any],
    *,
    budget: float | int,
    densities: tuple[float, ...] = (0.5, 0.25, 0.1, 0.05),
    tolerance: float,
    value_bits: int = 32,
    index_bits: int = 16,
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    batch: int | None = None,
    data: PyTree | None = None,
) -> tuple[dict[str, int], PyTree, list[dict[str, Any]]]:
    """Which layers to sparsify, and how far, under a memory budget; greedy, as Collins & Kohli.

    Each round tries every (layer, density) beside what is chosen already, in one compiled call, and
    takes the one that saves most memory per unit of added validation loss, among those that keep
    the loss within ``tolerance``. A layer may be cut further in a later round. The
    paper does not give its exact schedule.

    Args:
      params: any Flax tree.
      fit: ``(params, {path: k}) -> (params, validation loss)``: a short fine-tuning under the
        counts (traced integers, `project_l0` takes them), or the projection alone. Jittable. With
        ``data`` it is ``fit(params, {path: k}, data)``.
      budget: bits of the pruned kernels to end at.
      densities: the grid.
      tolerance: how much the validation loss may exceed the dense one's.
      value_bits: bits of a stored weight.
      index_bits: bits of a stored position.
      include: globs of paths that may be pruned.
      exclude: globs of paths to leave alone.
      batch: candidates evaluated side by side (`jax.lax.map`'s batch size); None: one by one.
      data: arrays that ``fit`` trains on. What it closes over instead becomes a constant of the
        compiled program, which takes XLA long to fold or is copied at every step.

    Returns:
      ``({path: k}, parameters, accepted moves)``. If no move qualifies before the budget is met,
      the result is the best within the tolerance; the last move's ``bits`` tell.

    Raises:
      ValueError: a grid density that empties a layer; a glob that matches nothing.
    """
    grid = [keep_counts(params, d, include=include, exclude=exclude) for d in densities]
    paths = list(grid[0])
    flat = tree.flatten(params)
    sizes = {p: int(np.prod(np.shape(flat[p]))) for p in paths}
    bits = {"value_bits": value_bits, "index_bits": index_bits}

    @jax.jit
    def compiled(start: PyTree, table: Any, data: PyTree) -> Any:
        more = () if data is None else (data,)

        def one(row: Any) -> Any:
            return fit(start, {p: row[i] for i, p in enumerate(paths)}, *more)

        return jax.lax.map(one, table, batch_size=batch)

    def evaluate(start: PyTree, rows: list[list[int]]) -> Any:
        # always the same number of rows, so that it compiles once
        rows = rows + rows[:1] * (len(paths) * len(grid) + 1 - len(rows))
        return compiled(start, jnp.asarray(rows, jnp.int32), data)

    def row(counts: Mapping[str, int]) -> list[int]:
        return [counts.get(p, sizes[p]) for p in paths]

    chosen: dict[str, int] = {}
    moves: list[dict[str, Any]] = []
    base = loss = None
    used = memory(sizes, chosen, **bits)
    while used > budget:
        options = [
            chosen | {p: table[p]}
            for p in paths
            for table in grid
            if table[p] < chosen.get(p, sizes[p])
            and memory(sizes, chosen | {p: table[p]}, **bits) < used
        ]
        if not options:
            break
        first = [chosen] if base is None else []  # the dense network beside the first moves
        fitted, losses = evaluate(params, [row(c) for c in first + options])
        losses = np.asarray(losses, np.float64)[: len(first) + len(options)]
        if base is None or loss is None:
            base = loss = float(losses[0])
        losses = losses[len(first) :]
        saved = np.asarray([used - memory(sizes, c, **bits) for c in options], np.float64)
        rise = np.maximum(losses - loss, 1e-12)
        gain = np.where(losses <= base + tolerance, saved / rise, -np.inf)
        best = int(np.argmax(gain))
        if not np.isfinite(gain[best]):
            break
        chosen, loss = options[best], float(losses[best])
        at = len(first) + best
        params = jax.tree.map(lambda a, i=at: a[i], fitted)
        used = memory(sizes, chosen, **bits)
        moves.append({"counts": dict(chosen), "loss": loss, "bits": used})
    return chosen, params, moves
