"""Masks found by trying: the best of N random ones, and particles that are resampled and moved.

Anwar & Sung, "Coarse pruning of convolutional neural networks with random masks", arXiv 1610.09639;
Anwar, Hwang, Sung, "Structured pruning of deep convolutional neural networks", JETC 13(3), 2017,
arXiv 1512.08571. Only forward evaluations are needed; candidates are evaluated side by side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cnnjax import tree
from cnnjax.pruning import granularity as grain
from cnnjax.pruning import masks

PyTree = Any
Evaluate = Callable[[PyTree], Any]


class Best(NamedTuple):
    """What a search returns.

    Attributes:
      mask: bool tree like the parameters (or the bits of `particle_filter`).
      error: of the best candidate.
      errors: of all candidates, in order of evaluation.
    """

    mask: PyTree
    error: Float[Array, ""]
    errors: Float[Array, ...]


def best_of_masks(
    params: PyTree, candidates: PyTree, evaluate: Evaluate, *, batch: int = 16
) -> Best:
    """The mask under which the trained network errs least.

    Args:
      params: trained, any Flax tree.
      candidates: a tree of masks with a leading axis of candidates.
      evaluate: masked parameters -> error (lower is better), jittable; on data that is not the test
        set, always the same.
      batch: candidates side by side.
    """

    @jax.jit
    def run(params: PyTree, candidates: PyTree) -> Best:
        def one(mask: PyTree) -> Any:
            return evaluate(_masked(params, mask))

        errors = jax.lax.map(one, candidates, batch_size=batch)
        best = jnp.argmin(errors)
        return Best(jax.tree.map(lambda m: m[best], candidates), errors[best], errors)

    return run(params, candidates)


def best_of_n(
    key: jax.Array,
    params: PyTree,
    evaluate: Evaluate,
    *,
    ratio: float | Sequence[tuple[str, float]],
    count: int = 100,
    granularity: str = "filter",
    include: tree.Patterns = "**",
    exclude: tree.Patterns = (),
    batch: int = 16,
) -> Best:
    """The best of N random masks with exactly the same ratio in every layer.

    Candidate i depends on the key and i alone, so a larger N only adds candidates.

    Args:
      key: PRNG key.
      params: trained, any Flax tree.
      evaluate: see `best_of_masks`.
      ratio: fraction of groups to remove, ``ceil(ratio * n)`` in each layer; or several cuts at
        once, ``[("filter", 0.3), ("kernel", 0.5)]``, whose masks are multiplied.
      count: N; about 100 do for a 40 % cut.
      granularity: of a single ratio; a filter takes its bias along.
      include: globs of kernels; usually one layer at a time.
      exclude: globs of kernels.
      batch: candidates side by side.

    Raises:
      ValueError: a ratio that empties a layer (names it), a count below 1, a glob without a match.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    cuts = ((granularity, float(ratio)),) if isinstance(ratio, (int, float)) else tuple(ratio)
    draw = _drawer(params, cuts, include, exclude)

    @jax.jit
    def run(key: Any, params: PyTree) -> Best:
        def one(i: Any) -> Any:
            return evaluate(_masked(params, draw(jax.random.fold_in(key, i))))

        errors = jax.lax.map(one, jnp.arange(count), batch_size=min(batch, count))
        best = jnp.argmin(errors)
        # drawn again rather than kept: N masks would be N networks
        return Best(draw(jax.random.fold_in(key, best)), errors[best], errors)

    return run(key, params)


def _drawer(
    params: PyTree,
    cuts: Sequence[tuple[str, float]],
    include: tree.Patterns,
    exclude: tree.Patterns,
) -> Callable[[Any], PyTree]:
    flat = tree.flatten(params)
    paths = masks.candidates(params, include, exclude)
    plan = []
    for name, ratio in cuts:
        name = grain.canonical(name)
        shapes = [grain.group_shape(flat[p].shape, name) for p in paths]
        counts = [masks.prune_count(ratio, math.prod(s)) for s in shapes]
        for path, shape, gone in zip(paths, shapes, counts):
            if gone >= math.prod(shape):
                raise ValueError(
                    f"a ratio of {ratio} removes all {gone} groups ({name}) of {path}; lower it"
                )
        plan.append((name, shapes, jnp.asarray(counts, jnp.int32)))
    pools = tuple(range(len(paths)))

    def draw(key: Any) -> PyTree:
        out: dict[str, Any] = {}
        for i, (name, shapes, counts) in enumerate(plan):
            keys = jax.random.split(jax.random.fold_in(key, i), len(shapes))
            scores = [jax.random.uniform(k, s) for k, s in zip(keys, shapes)]
            keep = masks.prune_smallest(scores, counts, pools)
            keep = grain.expand(keep, [flat[p] for p in paths])
            new = dict(zip(paths, keep))
            if name == "filter":
                new |= masks._bias_masks(flat, new, {})
            out = {p: m & out[p] if p in out else m for p, m in new.items()} | {
                p: m for p, m in out.items() if p not in new
            }
        return tree.map_with_path(lambda p, w: out.get(p, jnp.ones(w.shape, bool)), params)

    return draw


def bits_to_mask(
    params: PyTree, bits: Bool[Array, " n"], paths: Sequence[str], granularity: str
) -> PyTree:
    """The mask of a vector of group bits: the groups of each path in order, row-major.

    Args:
      params: any Flax tree.
      bits: True keeps a group.
      paths: the kernels that the bits are about.
      granularity: of the groups; a filter takes its bias along.

    Raises:
      KeyError: a path that is no leaf.
      ValueError: another number of bits than groups.
    """
    flat = tree.flatten(params)
    missing = [p for p in paths if p not in flat]
    if missing:
        raise KeyError(f"no leaf {missing[0]!r}")
    name = grain.canonical(granularity)
    shapes = [grain.group_shape(flat[p].shape, name) for p in paths]
    total = sum(map(math.prod, shapes))
    if bits.shape != (total,):
        raise ValueError(f"{bits.shape[0]} bits for {total} groups of {', '.join(paths)}")
    out, start = {}, 0
    for path, shape in zip(paths, shapes):
        size = math.prod(shape)
        group = bits[start : start + size].reshape(shape)
        out[path] = jnp.broadcast_to(group, flat[path].shape)
        start += size
    if name == "filter":
        out |= masks._bias_masks(flat, out, {})
    return tree.map_with_path(lambda p, w: out.get(p, jnp.ones(w.shape, bool)), params)


def systematic_resample(
    key: jax.Array, weights: Float[Array, " n"], count: int
) -> Int[Array, " count"]:
    """Indices drawn in proportion to the weights, each within one copy of its expected number."""
    weights = weights / jnp.sum(weights)
    points = (jax.random.uniform(key) + jnp.arange(count)) / count
    found = jnp.searchsorted(jnp.cumsum(weights), points, side="right")
    return jnp.minimum(found, weights.shape[0] - 1)


def particle_filter(
    key: jax.Array,
    evaluate: Callable[[Bool[Array, " n"]], Any],
    size: int,
    keep: int,
    *,
    particles: int = 32,
    generations: int = 10,
    swaps: int = 2,
    temperature: float = 1.0,
    batch: int = 16,
) -> Best:
    """Binary vectors of fixed cardinality that are weighed, resampled and perturbed.

    A particle's weight is ``exp(-(error - best) / (temperature * std))``: tempered by the spread of
    the population, so that the weights don't degenerate. The best vector so far always stays in the
    population, unchanged.

    Args:
      key: PRNG key.
      evaluate: bits -> error (lower is better), jittable and always on the same data; see
        `bits_to_mask`.
      size: number of bits.
      keep: how many are True.
      particles: size of the population, at least 2.
      generations: rounds of weighing, resampling and moving; 0 is the best of random ones.
      swaps: at most so many pairs (True, False) change places in one move.
      temperature: above 1 explores more.
      batch: particles evaluated side by side.

    Returns:
      See `Best`; ``errors`` is (generations + 1, particles).

    Raises:
      ValueError: numbers out of range.
    """
    if not 1 <= keep <= size:
        raise ValueError(f"keep must lie in [1, {size}], got {keep}")
    if particles < 2 or generations < 0 or swaps < 1 or not temperature > 0:
        raise ValueError(
            "need particles >= 2, generations >= 0, swaps >= 1 and temperature > 0; got "
            f"{particles}, {generations}, {swaps}, {temperature}"
        )
    return _particle_filter(
        key, evaluate, size, keep, particles, generations, swaps, float(temperature), batch
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6, 7, 8))
def _particle_filter(
    key: Any,
    evaluate: Any,
    size: int,
    keep: int,
    particles: int,
    generations: int,
    swaps: int,
    temperature: float,
    batch: int,
) -> Best:
    def errors_of(population: Array) -> Array:
        return jax.lax.map(evaluate, population, batch_size=min(batch, particles)).astype(
            jnp.float32
        )

    def move(key: Any, bits: Array) -> Array:
        """Up to ``swaps`` ones and as many zeros change: the number of ones stays."""
        most = min(swaps, keep, size - keep)
        if most == 0:
            return bits
        k1, k2 = jax.random.split(key)
        number = jax.random.randint(k1, (), 1, most + 1)
        noise = jax.random.uniform(k2, (2, size))
        ones = jnp.argsort(jnp.where(bits, noise[0], 2.0))[:most]
        zeros = jnp.argsort(jnp.where(bits, 2.0, noise[1]))[:most]
        swap = jnp.arange(most) < number
        bits = bits.at[ones].set(jnp.where(swap, False, bits[ones]))
        return bits.at[zeros].set(jnp.where(swap, True, bits[zeros]))

    def start(key: Any) -> Array:
        return jnp.argsort(jnp.argsort(jax.random.uniform(key, (size,)))) < keep

    first, rest = jax.random.split(key)
    population = jax.vmap(start)(jax.random.split(first, particles))
    errors = errors_of(population)

    def generation(state: Any, key: Any) -> Any:
        population, errors = state
        best = jnp.argmin(errors)
        spread = jnp.maximum(jnp.std(errors), 1e-12)
        weights = jnp.exp(-(errors - errors[best]) / (temperature * spread))
        k1, k2 = jax.random.split(key)
        chosen = systematic_resample(k1, weights, particles)
        moved = jax.vmap(move)(jax.random.split(k2, particles), population[chosen])
        moved = moved.at[0].set(population[best])
        new = errors_of(moved)
        return (moved, new), new

    if not generations:
        best = jnp.argmin(errors)
        return Best(population[best], errors[best], errors[None])
    keys = jax.random.split(rest, generations)
    (population, last), trace = jax.lax.scan(generation, (population, errors), keys)
    best = jnp.argmin(last)
    return Best(population[best], last[best], jnp.concatenate([errors[None], trace]))


def _masked(params: PyTree, mask: PyTree) -> PyTree:
    return jax.tree.map(lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), params, mask)
