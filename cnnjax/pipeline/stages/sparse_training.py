"""Training that sparsifies: network surgery, gates, hard thresholding, proximal steps.

Each ends in exact zeros and a mask; structured ones (gates and group operators on filters) go on to
a stage that shrinks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax import graph, pruning, training, tree
from cnnjax.pipeline.context import Context, Recipe, Trained
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.masking import mask_averages, params_of, with_params

PyTree = Any


def _outcome(carry: Carry, model: Any, mask: PyTree, trained: Trained, **metrics: Any) -> Outcome:
    last = trained.fit.last("eval")
    metrics = {"steps": last["step"], "loss": last["loss"], **metrics}
    return Outcome(dataclasses.replace(carry, model=model, mask=jax.device_get(mask)), metrics)


def _refuse_mask(carry: Carry, what: str) -> None:
    if carry.mask is not None:
        raise ValueError(f"{what} starts from a dense network, but a mask came along")


@stage("surgery")
@dataclasses.dataclass(frozen=True)
class Surgery:
    """Dynamic network surgery (Guo, Yao, Chen, NIPS 2016, 1608.04493).

    Attributes:
      recipe: training of the whole stage; weight decay would make pruning irreversible.
      rate: c, or ``{glob: c}``: the knob for sparsity.
      gamma: the mask is renewed with probability ``(1 + gamma t)^(-power)``.
      power: see ``gamma``.
      stop: part of the training after which the mask stays.
      include: globs of kernels to prune.
      exclude: globs of kernels to leave alone.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    rate: float | Mapping[str, float] = 1.0
    gamma: float = 1e-4
    power: float = 1.0
    stop: float = 0.75
    include: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.stop <= 1:
            raise ValueError(f"stop is a part of the training, in (0, 1], got {self.stop}")
        if self.recipe.ema_decay is not None:
            raise ValueError("surgery's masks go with the weights: the recipe can't keep averages")

    def check(self, params: PyTree) -> None:
        """Refuses globs that match nothing before any work."""
        pruning.masks.candidates(params, self.include, self.exclude)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        _refuse_mask(network, "network surgery")
        per_epoch = context.train_loader().steps_per_epoch
        stop = round(self.stop * max(1, round(self.recipe.epochs * per_epoch)))
        trained = context.train(
            network.model,
            self.recipe,
            wrap=lambda optimizer: pruning.dynamic_network_surgery(
                optimizer,
                self.rate,
                gamma=self.gamma,
                power=self.power,
                stop=stop,
                include=self.include,
                exclude=self.exclude,
            ),
            hooks=pruning.surgery_hooks(training.classification_loss(self.recipe.label_smoothing)),
            extra={"mask": pruning.full_mask(params_of(network.model))},
        )
        mask = pruning.get_mask(trained.state.opt_state)
        pruning.check_alive(mask)
        params = pruning.apply_mask(trained.state.params, mask)
        return _outcome(network, with_params(trained.model(), params), mask, trained)


@stage("gates")
@dataclasses.dataclass(frozen=True)
class Gates:
    """Hard-concrete l0 regularization (Louizos, Welling, Kingma, ICLR 2018, 1712.01312).

    Attributes:
      recipe: training of the whole stage.
      gates: ``{kernel path: granularity}``: ``channel`` for input units, ``filter`` for maps.
      strength: lambda of every path, already divided by the number of examples (0.1 / 60000).
      droprate: initial drop rate, or one per path.
      l2: rho of the l2 term.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    gates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    strength: float | Mapping[str, float] = 1e-6
    droprate: float | Mapping[str, float] = 0.5
    l2: float = 0.0

    def __post_init__(self) -> None:
        for name in self.gates.values():
            pruning.granularity.canonical(name)
        if self.recipe.ema_decay is not None:
            raise ValueError("the gates stage does not keep moving averages; set ema_decay=None")

    def check(self, params: PyTree) -> None:
        """Refuses paths that are no kernels before any work."""
        flat = tree.flatten(params)
        if not self.gates:
            raise ValueError("gates is empty: name at least one kernel, e.g. {'fc1/kernel': ...}")
        for path, name in self.gates.items():
            pruning.gates._check(path, name, flat)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        _refuse_mask(network, "training with gates")
        spec = dict(self.gates)
        trainable = pruning.gates.gated(
            params_of(network.model), spec, key=context.key("gates"), droprate=self.droprate
        )
        hooks = training.Hooks(
            loss=training.classification_loss(self.recipe.label_smoothing),
            reparam=pruning.gates.reparam(spec),
            penalty=pruning.gates.penalty(spec, self.strength, l2=self.l2),
            post_update=lambda state, context, metrics: state.replace(
                params=pruning.gates.project(state.params)
            ),
        )
        trained = context.train(network.model, self.recipe, hooks=hooks, params=trainable)
        params, mask = pruning.gates.fold(trained.state.params, spec)
        active = {
            path: int(jnp.sum(pruning.gates.eval_gate(trained.state.params["gates"][path]) > 0))
            for path in spec
        }
        pruning.check_alive(mask)
        model = training.state_to_model(trained.network, trained.state.replace(params=params))
        return _outcome(network, model, mask, trained, active=active)


@stage("threshold")
@dataclasses.dataclass(frozen=True)
class Threshold:
    """Iterative hard thresholding (Jin, Yuan, Feng, Yan 2016, 1607.05423).

    With ``sparse_epochs=0`` it is memory-bounded projection (Collins & Kohli 2014, 1412.1442).

    Attributes:
      recipe: the epochs are those after the last cycle's cut, under the final mask; the schedule
        runs over the whole stage.
      keep: density in (0, 1] of each kernel, or ``{glob: density or count}``.
      cycles: how often the cut is made.
      dense_epochs: of training everything, before each cut.
      sparse_epochs: of training the survivors, after each cut but the last.
      include: globs of kernels to prune.
      exclude: globs of kernels to leave alone.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    keep: float | Mapping[str, float | int] = 0.1
    cycles: int = 3
    dense_epochs: float = 3.0
    sparse_epochs: float = 6.0
    include: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cycles < 1 or not self.dense_epochs > 0 or self.sparse_epochs < 0:
            raise ValueError(
                "need cycles >= 1, dense_epochs > 0 and sparse_epochs >= 0; got "
                f"{self.cycles}, {self.dense_epochs}, {self.sparse_epochs}"
            )

    def check(self, params: PyTree) -> None:
        """Refuses globs that match nothing and densities that empty a layer before any work."""
        pruning.keep_counts(params, self.keep, include=self.include, exclude=self.exclude)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        _refuse_mask(network, "hard thresholding")
        per_epoch = context.train_loader().steps_per_epoch
        dense = max(1, round(self.dense_epochs * per_epoch))
        sparse = round(self.sparse_epochs * per_epoch)
        rest = max(1, round(self.recipe.epochs * per_epoch))
        trained = context.train(
            network.model,
            self.recipe,
            steps=self.cycles * dense + (self.cycles - 1) * sparse + rest,
            wrap=lambda optimizer: pruning.iterative_hard_thresholding(
                optimizer,
                self.keep,
                dense_steps=dense,
                sparse_steps=sparse,
                cycles=self.cycles,
                include=self.include,
                exclude=self.exclude,
            ),
            hooks=mask_averages(self.recipe),
        )
        mask = pruning.get_mask(trained.state.opt_state)
        return _outcome(network, trained.model(), mask, trained)


@stage("proximal")
@dataclasses.dataclass(frozen=True)
class Proximal:
    """Forward-backward splitting (Zhou, Alvarez, Porikli, ECCV 2016; Duchi & Singer 2009).

    The threshold is the learning rate times ``strength`` for every coordinate, also with Adam: not
    the operator in Adam's own metric (`cnnjax.pruning.adam_steps`), but the better behaved one.

    Attributes:
      recipe: training of the whole stage.
      kind: an operator, see `cnnjax.pruning.Prox`.
      strength: lambda.
      group: granularity of the groups.
      include: globs of kernels.
      exclude: globs of kernels.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    kind: str = "group_l2"
    strength: float = 1.0
    group: str = "filter"
    include: tuple[str, ...] = ("**/kernel",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pruning.Prox(self.kind, self.strength, group=self.group)

    def check(self, params: PyTree) -> None:
        """Refuses globs that match nothing before any work."""
        pruning.masks.candidates(params, self.include, self.exclude)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        _refuse_mask(network, "proximal training")
        paths = pruning.masks.candidates(params_of(network.model), self.include, self.exclude)
        per_epoch = context.train_loader().steps_per_epoch
        rate = training.build_schedule(
            self.recipe.schedule,
            total_steps=max(1, round(self.recipe.epochs * per_epoch)),
            steps_per_epoch=per_epoch,
        )
        operator = pruning.Prox(self.kind, self.strength, group=self.group)
        trained = context.train(
            network.model,
            self.recipe,
            schedule=rate,
            wrap=lambda optimizer: pruning.forward_backward_splitting(
                optimizer, dict.fromkeys(paths, operator), rate
            ),
        )
        model = trained.model()
        params = params_of(model)

        def alive(path: str, w: Any) -> Any:
            # a filter's group holds the bias beside it
            beside = path.rpartition("/")[0] + "/kernel"
            return w != 0 if path in paths or beside in paths else jnp.ones(w.shape, bool)

        mask = tree.map_with_path(alive, params)
        pruning.check_alive(mask)
        return _outcome(network, model, mask, trained)


@stage("shrink_dead")
@dataclasses.dataclass(frozen=True)
class ShrinkDead:
    """Removes the channels that an earlier stage's mask has silenced: a really smaller network."""

    restructures = True

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is None:
            raise ValueError("no mask to shrink by: put a stage that makes one before this")
        batches = iter(context.test_batches())
        image = next(batches)["image"][:1]
        model = training.set_mode(network.model, train=False)
        found = graph.trace(model, jnp.asarray(image))
        keep = pruning.dead_channels(found, network.mask)
        small = pruning.shrink(model, found, keep)
        widths = {name: int(m.sum()) for name, m in keep.groups}
        mask = pruning.shrink_tree(network.mask, found, keep, model=model)
        return Outcome(dataclasses.replace(network, model=small, mask=mask), {"widths": widths})
