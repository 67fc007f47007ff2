"""Training with a sparsity penalty in the loss, and training that is sparse from the start."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax import pruning, training, tree
from cnnjax.errors import did_you_mean
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.masking import mask_averages, params_of, with_params
from cnnjax.pipeline.stages.sparse_training import _outcome, _refuse_mask
from cnnjax.pruning import penalties

PyTree = Any
KINDS = ("l1", "group", *penalties.BIASES)


@stage("penalized")
@dataclasses.dataclass(frozen=True)
class Penalized:
    """A penalty by its (sub)gradient, then a cut of what it has made small.

    ``l1``: magnitudes of all weights. ``group``: structured sparsity learning (Wen et al., NIPS
    2016), with ``column`` groups the penalty of group-wise brain damage (Lebedev & Lempitsky, CVPR
    2016). ``hyperbolic``, ``exponential``, ``decay``: biases on units (Hanson & Pratt, NIPS 1988).
    A subgradient leaves no exact zeros: what is at most ``cut`` is removed, filters with their
    bias. Train on behind it; `ShrinkDead` removes whole channels.

    Attributes:
      recipe: training of the whole stage.
      kind: one of `KINDS`.
      strength: weight of the penalty; for ``group`` ``{granularity: weight}``.
      curve: lambda within the unit biases.
      cut: largest magnitude (``l1``), norm of a group or total of a unit's weights that goes.
      include: globs of kernels.
      exclude: globs of kernels.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    kind: str = "group"
    strength: float | Mapping[str, float] = 1e-4
    curve: float = 1.0
    cut: float = 1e-3
    include: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown penalty {self.kind!r}.{did_you_mean(self.kind, KINDS)}")
        if isinstance(self.strength, Mapping) != (self.kind == "group"):
            raise ValueError(
                f"strength is {self.strength!r}; {self.kind!r} takes "
                + ("{granularity: weight}" if self.kind == "group" else "a number")
            )
        for name in self._granularities():
            pruning.granularity.canonical(name)
        if self.cut < 0:
            raise ValueError(f"cut is {self.cut}; expected the largest size that goes, 0 or more")
        if self.recipe.ema_decay is not None:
            raise ValueError("the cut is made in the weights: the recipe can't keep averages")

    def check(self, params: PyTree) -> None:
        """Refuses globs that match nothing before any work."""
        pruning.masks.candidates(params, self.include, self.exclude)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        _refuse_mask(network, "training with a penalty")
        hooks = training.Hooks(
            loss=training.classification_loss(self.recipe.label_smoothing),
            penalty=lambda params, context: self.penalty(params),
        )
        trained = context.train(network.model, self.recipe, hooks=hooks)
        model = trained.model()
        params = params_of(model)
        mask = self.mask(params)
        pruning.check_alive(mask)
        cut = pruning.apply_mask(params, mask)
        return _outcome(network, with_params(model, cut), mask, trained)

    def penalty(self, params: PyTree) -> Any:
        """The scalar that is added to the loss."""
        where: dict[str, Any] = {"include": self.include, "exclude": self.exclude}
        if isinstance(self.strength, Mapping):
            return penalties.group_lasso(params, self.strength, **where)
        if self.kind == "l1":
            return penalties.sparsity(params, self.strength, 1, **where)
        return self.strength * penalties.unit_bias(params, self.kind, self.curve, **where)

    def mask(self, params: PyTree) -> PyTree:
        """False where something is at most ``cut``."""
        flat = tree.flatten(params)
        out = {p: jnp.ones(w.shape, bool) for p, w in flat.items()}
        op = "l2" if self.kind == "group" else "sum"
        for path in pruning.masks.candidates(params, self.include, self.exclude):
            size = {path: jnp.abs(flat[path])}
            for name in self._granularities():
                alive = pruning.reduce(size, name, op)[path] > self.cut
                out[path] &= pruning.expand({path: alive}, size)[path]
                beside = path.rpartition("/")[0] + "/bias"
                if pruning.granularity.canonical(name) == "filter" and beside in flat:
                    out[beside] = alive.reshape(-1)
        return tree.map_with_path(lambda path, w: out[path], params)

    def _granularities(self) -> tuple[str, ...]:
        if isinstance(self.strength, Mapping):
            return tuple(self.strength)
        return ("weight",) if self.kind == "l1" else ("filter",)


@stage("regrow")
@dataclasses.dataclass(frozen=True)
class Regrow:
    """Sparse from the start with regrowth: RigL (Evci et al., ICML 2020) or SET (Mocanu et al.).

    Attributes:
      recipe: training of the whole stage.
      density: of all kernels together, in (0, 1].
      method: ``rigl`` (weights grow where the gradient is largest) or ``set`` (anywhere).
      every: updates between changes of the mask.
      stop: part of the training after which the mask stays.
      fraction: of a layer's weights that change at first.
      include: globs of kernels.
      exclude: globs of kernels that stay dense.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    density: float = 0.2
    method: str = "rigl"
    every: int = 100
    stop: float = 0.75
    fraction: float = 0.3
    include: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in ("rigl", "set"):
            raise ValueError(
                f"unknown method {self.method!r}.{did_you_mean(self.method, ('rigl', 'set'))}"
            )
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        if not 0 < self.stop <= 1 or not 0 < self.fraction < 1 or self.every < 1:
            raise ValueError(
                "need 0 < stop <= 1, 0 < fraction < 1 and every >= 1; got "
                f"{self.stop}, {self.fraction}, {self.every}"
            )

    def check(self, params: PyTree) -> None:
        """Refuses globs that match nothing before any work."""
        pruning.masks.candidates(params, self.include, self.exclude)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        _refuse_mask(network, "sparse training")
        params = params_of(network.model)
        own = pruning.erdos_renyi(params, self.density, include=self.include, exclude=self.exclude)
        mask = pruning.random_mask(context.key("mask"), params, own)
        per_epoch = context.train_loader().steps_per_epoch
        steps = max(1, round(self.recipe.epochs * per_epoch))
        trained = context.train(
            with_params(network.model, pruning.apply_mask(params, mask)),
            self.recipe,
            wrap=lambda optimizer: pruning.regrowth(
                optimizer, jax.device_get(mask), every=self.every,
                stop=max(self.every, round(self.stop * steps)),
                fraction=self.fraction, method=self.method,
            ),
            hooks=mask_averages(self.recipe),
        )  # fmt: skip
        mask = pruning.get_mask(trained.state.opt_state)
        return _outcome(network, trained.model(), mask, trained)
