"""A compression run: a list of stages, each network -> network, with its report.

``run(config, workdir)`` trains, compresses and reports; running it again resumes, or says that it
is complete. A method joins by registering a stage (see `registry`)::

    from cnnjax import pipeline
    from cnnjax.pipeline.stages import Prune, Train

    config = pipeline.config_dict(
        "demo",
        model=pipeline.ModelSpec("plain_cnn"),
        data=pipeline.DataConfig("digits"),
        stages={"dense": Train(), "pruned": Prune(sparsity=0.9)},
    )
    report = pipeline.run(config, "runs/demo")
"""

from __future__ import annotations

from cnnjax.pipeline.config import (
    DataConfig,
    ModelSpec,
    RunConfig,
    apply_overrides,
    config_dict,
    from_config,
    load_config,
    to_plain,
)
from cnnjax.pipeline.context import Context, Recipe, Trained
from cnnjax.pipeline.registry import Carry, Outcome, names, stage
from cnnjax.pipeline.runner import run

__all__ = [
    "Carry",
    "Context",
    "DataConfig",
    "ModelSpec",
    "Outcome",
    "Recipe",
    "RunConfig",
    "Trained",
    "apply_overrides",
    "config_dict",
    "from_config",
    "load_config",
    "names",
    "run",
    "stage",
    "to_plain",
]
