"""What a stage works with: the data, a folder, a seed, training and evaluation."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from cnnjax import data, files, training
from cnnjax.pipeline.config import DataConfig
from cnnjax.pipeline.forms import Tuned

PyTree = Any
_ADAM = training.OptimizerConfig("adam")
_COSINE = training.ScheduleConfig("cosine", base=1e-3)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a stage trains.

    Attributes:
      epochs: passes over the training data.
      optimizer: see `cnnjax.training.OptimizerConfig`.
      schedule: learning rate, see `cnnjax.training.ScheduleConfig`.
      label_smoothing: weight of the uniform distribution in the targets.
      ema_decay: evaluate and return moving averages of the parameters; None: off.
      eval_every: epochs between evaluations besides the last; 0: none.
      checkpoint_every: epochs between checkpoints besides the last; 0: none.
      steps_per_call: steps in one compiled call; pays on tiny networks.
      compute_dtype: e.g. ``"bfloat16"``; None: float32.
      accumulate: microbatches per step, whose gradients are averaged.
      remat: ``"none"``, ``"convs"`` or ``"full"``: less memory for more computation, see
        `cnnjax.training.StepConfig`.
      tensorboard: also write TensorBoard event files into the stage's folder.
    """

    epochs: float = 10.0
    optimizer: training.OptimizerConfig = _ADAM
    schedule: training.ScheduleConfig = _COSINE
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    eval_every: float = 0.0
    checkpoint_every: float = 1.0
    steps_per_call: int = 1
    compute_dtype: str | None = None
    accumulate: int = 1
    remat: str = "none"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if not self.epochs > 0:
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        self.step_config()

    def step_config(self) -> training.StepConfig:
        """The part that shapes the compiled step."""
        return training.StepConfig(
            steps_per_call=self.steps_per_call,
            compute_dtype=self.compute_dtype,
            accumulate=self.accumulate,
            remat=self.remat,
            ema_decay=self.ema_decay,
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """Outcome of `Context.train`: the static network, its final state, the records."""

    network: training.Network
    state: training.TrainState
    fit: training.FitResult
    ema: bool

    def model(self) -> Any:
        """The trained NNX module (moving averages where the recipe keeps them)."""
        return training.state_to_model(self.network, self.state, ema=self.ema)


class Context:
    """Given to every stage."""

    def __init__(
        self,
        *,
        data_config: DataConfig,
        seed: int,
        name: str,
        folder: pathlib.Path,
        mesh: Any = None,
        progress: bool = True,
        forms: pathlib.Path | None = None,
    ) -> None:
        """Args: the data, the run's seed, the stage's name and own folder, a mesh for data
        parallelism, whether to show progress, and the file of measured forms of convolutions
        (None: the rules alone)."""
        self.data, self.seed, self.name, self.folder = data_config, seed, name, folder
        self.mesh, self.progress, self.forms = mesh, progress, forms
        self.order = name  # stages of one order see the same training batches
        self._steps: list[tuple[training.Network, bool, Any, Any]] = []

    def key(self, what: str = "") -> jax.Array:
        """A random key that depends on the run's seed, the stage and ``what``."""
        return jax.random.fold_in(
            jax.random.key(self.seed), zlib.crc32(f"{self.name}/{what}".encode())
        )

    def train_loader(self) -> data.Loader:
        """Endless shuffled, augmented batches, drawn by seed and stage."""
        c = self.data
        return data.loader(
            c.name,
            c.train,
            batch_size=c.batch_size,
            train=True,
            seed=zlib.crc32(f"{self.seed}/{self.order}".encode()),
            augment=c.augment,
            data_dir=c.data_dir or None,
            workers=c.workers,
        )

    def test_batches(self) -> data.Loader:
        """One pass over the test split, the last batch padded with weight 0."""
        c = self.data
        return data.loader(
            c.name,
            c.test,
            batch_size=c.eval_batch_size,
            train=False,
            augment=c.augment,
            data_dir=c.data_dir or None,
            workers=c.workers,
        )

    def evaluate(
        self,
        network: training.Network,
        state: training.TrainState,
        *,
        ema: bool = False,
        hooks: training.Hooks | None = None,
    ) -> dict[str, float]:
        """``{"loss", "top1", "top5", "count"}`` on the test split (by the hooks' ``reparam``), with
        any batch size over any number of devices."""
        step = next(
            (s for n, e, h, s in self._steps if n is network and e == ema and h is hooks), None
        )
        if step is None:
            step = training.make_eval_step(network, ema=ema, mesh=self.mesh, hooks=hooks)
            step = self._tuned(step)
            self._steps.append((network, ema, hooks, step))
        put = None if self.mesh is None else self._spread
        return training.evaluate(step, state, self.test_batches(), put=put)

    def _tuned(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn if self.forms is None else Tuned(fn, self.forms, self.mesh)

    def _spread(self, batch: dict[str, Any]) -> Any:
        """A test batch over the mesh, filled up with rows of weight 0 to what its devices share."""
        devices = max(len(self.mesh.local_devices), 1)
        rows = -(-len(batch["label"]) // devices) * devices
        return training.shard_batch(training.pad_batch(batch, rows), self.mesh)

    def train(
        self,
        model: Any,
        recipe: Recipe,
        *,
        name: str = "train",
        steps: int | None = None,
        schedule: Callable[[Any], Any] | None = None,
        wrap: Callable[[Any], Any] | None = None,
        hooks: training.Hooks | None = None,
        callbacks: Callable[[training.Network], Sequence[tuple[int, Any]]] | None = None,
        extra: PyTree = None,
        params: PyTree = None,
        constants: PyTree = None,
        stream: Callable[[data.Loader], Any] | None = None,
    ) -> Trained:
        """Trains a model, resuming exactly from the stage's folder.

        Args:
          model: NNX module; untouched.
          recipe: how.
          name: of the metrics file and checkpoints, if a stage trains several times.
          steps: instead of the recipe's epochs.
          schedule: instead of the recipe's, a function of the step.
          wrap: ``optimizer -> optimizer``, e.g. masking.
          hooks: see `cnnjax.training.Hooks`.
          callbacks: ``network -> [(every, fn)]`` with ``state = fn(state, step)``.
          extra: the state's free slot.
          params: trainable pytree if it is not the model's own parameters (``reparam`` hook); then
            build the model from the state, `Trained.model` can't.
          constants: arrays that hooks read, e.g. a teacher's; see `make_train_step`.
          stream: ``loader -> batches`` instead of the loader's own, e.g. with cached targets;
            keeps ``get_state`` and ``set_state``.

        Returns:
          See `Trained`; the last evaluation is the newest record of kind ``"eval"``.
        """
        loader = self.train_loader()
        per_epoch = loader.steps_per_epoch
        total = steps or max(1, round(recipe.epochs * per_epoch))
        rate = schedule or training.build_schedule(
            recipe.schedule, total_steps=total, steps_per_epoch=per_epoch
        )
        optimizer = training.build_optimizer(recipe.optimizer, rate)
        if wrap is not None:
            optimizer = wrap(optimizer)
        ema = recipe.ema_decay is not None
        network, state = training.create_state(
            model, optimizer, seed=self.seed, ema=ema, extra=extra, params=params
        )
        # evaluation sees the same parameters as training does
        reparam = hooks if hooks is not None and hooks.reparam is not None else None
        hooks = hooks or training.Hooks(loss=training.classification_loss(recipe.label_smoothing))
        if constants is not None and self.mesh is not None:
            constants = training.replicate(constants, self.mesh)
        step = training.make_train_step(
            network,
            optimizer,
            config=recipe.step_config(),
            hooks=hooks,
            learning_rate=rate,
            constants=constants,
            mesh=self.mesh,
        )
        step = dataclasses.replace(step, fn=self._tuned(step.fn))
        call = recipe.steps_per_call

        def interval(epochs: float) -> int:
            return max(1, round(epochs * per_epoch / call)) * call if epochs else 0

        try:
            result = training.fit(
                step,
                state,
                loader if stream is None else stream(loader),
                training.FitConfig(
                    total_steps=total,
                    log_every=interval(1.0),
                    eval_every=interval(recipe.eval_every),
                    checkpoint_every=interval(recipe.checkpoint_every),
                    progress=self.progress,
                    tensorboard=recipe.tensorboard,
                    name=name,
                ),
                workdir=self.folder,
                evaluate=lambda s: self.evaluate(network, s, ema=ema, hooks=reparam),
                mesh=self.mesh,
                callbacks=callbacks(network) if callbacks else (),
            )
        finally:
            loader.close()
        return Trained(network, result.state, result, ema)

    def record(self, name: str, value: Any) -> None:
        """Writes a JSON value into the stage's folder, atomically; survives a resume."""
        if jax.process_index() == 0:
            write_json(self.folder / f"{name}.json", value)

    def recorded(self, name: str) -> Any:
        """The value of `record`, None if there is none."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON by way of a temporary file and a rename."""
    files.write_text(path, json.dumps(value, indent=1) + "\n")
