"""Unstructured and grouped magnitude pruning: in cuts with retraining, or gradual.

Iterative (Han et al. 2015, 1506.02626): cut, retrain the survivors, cut again; one cut is one-shot
pruning. Gradual (Zhu & Gupta 2017, 1710.01878): a little every few steps while training goes on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cnnjax import pruning, training, tree
from cnnjax.errors import did_you_mean
from cnnjax.pipeline.context import Context, Recipe, Trained
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.masking import cut_state, mask_averages, params_of, with_params

PyTree = Any
_METHODS = ("iterative", "gradual")
_SCORES = ("magnitude", "random")


@stage("prune")
@dataclasses.dataclass(frozen=True)
class Prune:
    """Removes weights in steps and retrains the others.

    Attributes:
      recipe: training after each cut (``iterative``; the learning rate starts anew at every cut),
        or of the whole stage (``gradual``).
      sparsity: final fraction of the prunable weights (or groups) that is removed; or
        ``{glob: fraction}`` per layer.
      method: ``iterative`` or ``gradual``.
      cuts: number of cuts (``iterative``); 1 is one-shot.
      shape: how the cuts approach the sparsity, see `cnnjax.pruning.schedules.steps`.
      final_epochs: epochs after the last cut instead of the recipe's; 0: the recipe's.
      begin, end: part of the training in which ``gradual`` cuts, as fractions.
      every: steps between its cuts.
      granularity: what is removed as a whole.
      scope: ``global`` or ``layer``; empty: ``global`` for a number, ``layer`` for a mapping.
      include: globs of what may be pruned.
      exclude: globs of what may not; biases and normalization are exempt anyway.
      score: ``magnitude``, or ``random`` as a baseline.
    """

    recipe: Recipe = dataclasses.field(default_factory=lambda: Recipe(epochs=5.0))
    sparsity: float | Mapping[str, float] = 0.9
    method: str = "iterative"
    cuts: int = 5
    shape: str = "geometric"
    final_epochs: float = 0.0
    begin: float = 0.0
    end: float = 0.7
    every: int = 10
    granularity: str = "weight"
    scope: str = ""
    include: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()
    score: str = "magnitude"

    def __post_init__(self) -> None:
        for field, options in (("method", _METHODS), ("score", _SCORES)):
            value = getattr(self, field)
            if value not in options:
                raise ValueError(f"unknown {field} {value!r}.{did_you_mean(value, options)}")
        pruning.granularity.canonical(self.granularity)
        values = self.sparsity.values() if isinstance(self.sparsity, Mapping) else [self.sparsity]
        for value in values:
            pruning.schedules.steps(value, self.cuts, shape=self.shape)
        if self.method == "gradual":
            if isinstance(self.sparsity, Mapping) or self.score != "magnitude":
                raise ValueError("gradual pruning takes one sparsity and score='magnitude'")
            if not 0.0 <= self.begin < self.end <= 1.0 or self.every < 1:
                raise ValueError(f"need 0 <= begin < end <= 1 and every >= 1, got {self}")

    def check(self, params: PyTree) -> None:
        """Refuses globs that match nothing and cuts that empty a layer before any work."""
        paths = pruning.masks.candidates(params, self.include, self.exclude)
        if isinstance(self.sparsity, Mapping):
            tree.check_patterns(list(self.sparsity), paths, what="sparsity pattern")
        elif self.scope != "layer":
            return  # what a global cut takes of a layer depends on the weights by then
        flat = tree.flatten(params)
        shares, _ = pruning.masks._pools(paths, self.sparsity, self.scope or None)
        for path, share in shares.items():
            shape = pruning.granularity.group_shape(flat[path].shape, self.granularity)
            count = math.prod(shape)
            if pruning.prune_count(share, count) >= count:
                raise ValueError(
                    f"sparsity {share} would empty {path} ({count} groups by "
                    f"{self.granularity!r}): nothing would pass; lower it or exclude the layer"
                )

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        trained = (self._iterative if self.method == "iterative" else self._gradual)(
            network, context
        )
        mask = jax.device_get(pruning.get_mask(trained.state.opt_state))
        pruning.check_alive(mask)
        last = trained.fit.last("eval")
        curve = [r for i in range(10_000) if (r := context.recorded(f"cut_{i:03d}")) is not None]
        return Outcome(
            dataclasses.replace(network, model=trained.model(), mask=mask),
            {"steps": last["step"], "loss": last["loss"]},
            curve,
        )

    def _mask(self, params: PyTree, cut: int, old: PyTree | None, context: Context) -> PyTree:
        """The mask of a cut (counted from 0)."""

        def at(final: float) -> float:
            return pruning.schedules.steps(final, self.cuts, shape=self.shape)[cut]

        sparsity: Any = self.sparsity
        target = (
            {g: at(s) for g, s in sparsity.items()}
            if isinstance(sparsity, Mapping)
            else at(sparsity)
        )
        scores = pruning.magnitude_scores(params)
        if self.score == "random":
            scores = _random_like(params, context.key("scores"))
        return pruning.mask_from_scores(
            scores,
            target,
            granularity=self.granularity,
            scope=self.scope or None,
            include=self.include,
            exclude=self.exclude,
            mask=old,
        )

    def _iterative(self, carry: Carry, context: Context) -> Trained:
        per_epoch = context.train_loader().steps_per_epoch
        length = max(1, round(self.recipe.epochs * per_epoch))
        call = self.recipe.steps_per_call
        length = -(-length // call) * call
        last = max(1, round(self.final_epochs * per_epoch)) if self.final_epochs else length
        start = (self.cuts - 1) * length
        params = params_of(carry.model)
        mask = self._mask(params, 0, carry.mask, context)
        model = with_params(carry.model, pruning.apply_mask(params, mask))
        ema = self.recipe.ema_decay is not None

        def callbacks(network: training.Network) -> Sequence[tuple[int, Any]]:
            def point(state: training.TrainState, cut: int, field: str) -> None:
                record = context.recorded(f"cut_{cut:03d}") or {"cut": cut}
                kept = pruning.get_mask(state.opt_state)
                result = context.evaluate(network, state, ema=ema)
                record |= {field: result["top1"], **_counts(kept, state.params, self)}
                context.record(f"cut_{cut:03d}", record)

            def cut(state: training.TrainState, step: int) -> training.TrainState:
                number = step // length
                if number >= self.cuts:
                    return state
                point(state, number - 1, "accuracy")
                old = pruning.get_mask(state.opt_state)
                state = cut_state(state, self._mask(state.params, number, old, context))
                point(state, number, "accuracy_before_retraining")
                return state

            _, fresh = training.create_state(
                model, pruning.masked(optax.set_to_zero(), mask), ema=ema
            )
            if context.recorded("cut_000") is None:
                point(fresh, 0, "accuracy_before_retraining")
            return [(length, cut)]

        trained = context.train(
            model,
            self.recipe,
            steps=start + last,
            schedule=_restarting(self.recipe, length, start, last, per_epoch),
            wrap=lambda optimizer: pruning.masked(optimizer, mask),
            hooks=mask_averages(self.recipe),
            callbacks=callbacks,
        )
        final = context.recorded(f"cut_{self.cuts - 1:03d}") or {"cut": self.cuts - 1}
        kept = pruning.get_mask(trained.state.opt_state)
        final |= _counts(kept, trained.state.params, self)
        context.record(
            f"cut_{self.cuts - 1:03d}", final | {"accuracy": trained.fit.last("eval")["top1"]}
        )
        return trained

    def _gradual(self, carry: Carry, context: Context) -> Trained:
        per_epoch = context.train_loader().steps_per_epoch
        total = max(1, round(self.recipe.epochs * per_epoch))
        begin = int(self.begin * total)
        count = max(1, int((self.end - self.begin) * total) // self.every)
        every = self.every if self.every * count < total else 1
        ema = self.recipe.ema_decay is not None
        if carry.mask is not None:
            raise ValueError("gradual pruning starts from a dense network; use method='iterative'")

        def wrap(optimizer: Any) -> Any:
            return pruning.gradual(
                optimizer,
                final=float(self.sparsity),  # type: ignore[arg-type]
                begin=begin,
                end=begin + every * count,
                every=every,
                granularity=self.granularity,
                scope=self.scope or "global",
                include=self.include,
                exclude=self.exclude,
            )

        def callbacks(network: training.Network) -> Sequence[tuple[int, Any]]:
            def look(state: training.TrainState, step: int) -> training.TrainState:
                kept = pruning.get_mask(state.opt_state)
                result = context.evaluate(network, state, ema=ema)
                number = step // interval - 1
                record = {"cut": number, "accuracy": result["top1"]}
                context.record(f"cut_{number:03d}", record | _counts(kept, state.params, self))
                return state

            call = self.recipe.steps_per_call
            interval = max(1, round(per_epoch / call)) * call
            return [(interval, look)]

        return context.train(
            carry.model,
            self.recipe,
            wrap=wrap,
            hooks=mask_averages(self.recipe),
            callbacks=callbacks,
        )


def _counts(mask: PyTree, params: PyTree, config: Prune) -> dict[str, Any]:
    """Sparsity of what may be pruned, and how much is left of the whole."""
    paths = pruning.masks.candidates(params, config.include, config.exclude)
    host = tree.flatten(jax.device_get(mask))
    kept = sum(int(host[p].sum()) for p in paths)
    total = sum(host[p].size for p in paths)
    return {
        "sparsity": 1.0 - kept / total,
        "kept": kept,
        "nonzeros": tree.nonzeros(jax.device_get(params)),
    }


def _random_like(params: PyTree, key: jax.Array) -> PyTree:
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef, [jax.random.uniform(k, w.shape) for k, w in zip(keys, leaves)]
    )


def _restarting(
    recipe: Recipe, length: int, start: int, last: int, per_epoch: int
) -> Callable[[Any], Any]:
    """The recipe's schedule, anew after every cut."""
    one, final = (
        training.build_schedule(recipe.schedule, total_steps=n, steps_per_epoch=per_epoch)
        for n in (length, last)
    )

    def rate(step: Any) -> Any:
        step = jnp.asarray(step)
        return jnp.where(step < start, one(step % length), final(step - start))

    return rate
