"""Several ways on from one network, side by side: each branch a stage and a fine-tuning."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import optax

from cnnjax import graph, training
from cnnjax.errors import did_you_mean
from cnnjax.pipeline import config, registry
from cnnjax.pipeline.context import Context, Recipe
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.factorize import example_image
from cnnjax.pipeline.stages.train import Train


@stage("branches")
@dataclasses.dataclass(frozen=True)
class Branches:
    """Carries out every branch from the network that comes in, and hands that network on.

    What each branch costs and scores are points of the curve: ``branch``, ``macs_share``,
    ``params_share``, ``accuracy_first`` (after the branch's stage) and ``accuracy`` (fine-tuned).
    Finished branches are not repeated after an interruption.

    Attributes:
      branches: ``{name: stage}``.
      recipe: of the fine-tuning after each.
      only: names of the branches to carry out; empty: all.
    """

    branches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.branches:
            raise ValueError("branches is empty: name at least one, {name: stage}")
        for name in self.only:
            if name not in self.branches:
                known = did_you_mean(name, self.branches)
                raise ValueError(f"only: there is no branch {name!r}.{known}")
        built = {name: _built(fields, name) for name, fields in self.branches.items()}
        object.__setattr__(self, "branches", built)

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        image = example_image(context)
        before = graph.profile(network.model, image)
        curve = []
        for name in self.only or self.branches:
            first = self.branches[name]
            point = context.recorded(f"branch_{name}")
            if point is None:
                began = time.monotonic()
                carry, scores = network, []
                for label, one in (("first", first), ("tuned", Train(self.recipe))):
                    inner = _inner(context, f"{name}/{label}")
                    carry = one.run(carry, inner).network
                    scores.append(_top1(carry.model, inner))
                after = graph.profile(carry.model, image)
                point = {
                    "branch": name,
                    "macs_share": after.macs / before.macs,
                    "params_share": after.params / before.params,
                    "accuracy_first": scores[0],
                    "accuracy": scores[-1],
                    "seconds": time.monotonic() - began,
                }
                context.record(f"branch_{name}", point)
            curve.append(point)
        return Outcome(network, {"branches": len(curve)}, curve)


def _built(fields: Any, name: str) -> Any:
    if "/" in name or name.startswith("."):
        raise ValueError(f"a branch's name becomes a folder: {name!r} does not do")
    if not isinstance(fields, Mapping):
        return fields
    fields = dict(fields)
    kind = registry.get(fields.pop("stage", name))
    return config._build(kind, fields, f"branches.{name}")


def _inner(context: Context, name: str) -> Context:
    folder = context.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    return Context(
        data_config=context.data,
        seed=context.seed,
        name=f"{context.name}/{name}",
        folder=folder,
        mesh=context.mesh,
        progress=context.progress,
        forms=context.forms,
    )


def _top1(model: Any, context: Context) -> float:
    network, state = training.create_state(model, optax.set_to_zero(), seed=context.seed)
    return context.evaluate(network, state)["top1"]
