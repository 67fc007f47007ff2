"""Teachers: one or several networks, run inside the student's jitted step or once, ahead of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import training
from cnnjax.distillation.ensemble import ensemble_logits
from cnnjax.distillation.logits import check_temperature
from cnnjax.distillation.taps import features_of
from cnnjax.graph.tracing import evaluation_mode
from cnnjax.tree import flatten

PyTree = Any
MODES = ("geometric", "arithmetic")


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """What a teacher says about a batch.

    Attributes:
      logits: (n, classes) float32.
      features: by the path of the teacher's layer; of the first teacher where there are several.
    """

    logits: Any
    features: dict[str, Any] = dataclasses.field(default_factory=dict)


class Teacher:
    """One or several trained networks as a pure function of constants and images.

    The arrays are not held by the compiled step: give ``teacher.constants`` to
    ``training.make_train_step(..., constants={"teacher": ...})`` or to any jitted function.
    """

    def __init__(
        self,
        models: nnx.Module | Sequence[nnx.Module],
        *,
        taps: Sequence[str] = (),
        mode: str = "geometric",
        temperature: float = 1.0,
        weights: Sequence[float] | None = None,
    ):
        """Takes the networks apart; they stay untouched and run in evaluation mode.

        Args:
          models: one NNX module or several.
          taps: paths of the first model's modules whose outputs (``":input"``: inputs) are wanted.
          mode: how several combine, see `cnnjax.distillation.ensemble_logits`.
          temperature: of the arithmetic mean; the loss must use the same.
          weights: of the members.

        Raises:
          ValueError: no models, an unknown mode, or a tap that matches no module.
          TypeError: something that is no NNX module.
        """
        members = [models] if isinstance(models, nnx.Module) else list(models)
        if not members:
            raise ValueError("a teacher needs at least one model")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {MODES}")
        check_temperature(temperature)
        parts = [training.split_network(m) for m in members]
        self._networks = tuple(network for network, _, _ in parts)
        self.taps, self.mode, self.temperature = tuple(taps), mode, temperature
        self.weights = None if weights is None else tuple(weights)
        if self.weights is not None and len(self.weights) != len(members):
            raise ValueError(f"{len(self.weights)} weights for {len(members)} teachers")
        self.constants: PyTree = [{"params": p, "stats": s} for _, p, s in parts]

    def __len__(self) -> int:
        return len(self._networks)

    def with_taps(self, taps: Sequence[str]) -> Teacher:
        """The same teacher with other taps; shares its arrays."""
        other = object.__new__(Teacher)
        other.__dict__.update(self.__dict__, taps=tuple(taps))
        return other

    def member(self, index: int = 0) -> nnx.Module:
        """A member as a module in evaluation mode."""
        part = self.constants[index]
        return self._networks[index].model(part["params"], part["stats"])

    def __call__(self, constants: PyTree, images: Any) -> Targets:
        """Logits and features of a batch; jit it, or call it inside a jitted step.

        Args:
          constants: of this teacher.
          images: (n, h, w, c), the same that the student sees.

        Returns:
          `Targets`, cut off from gradients.
        """
        return jax.lax.stop_gradient(self._run(jax.lax.stop_gradient(constants), images))

    def differentiable(self, constants: PyTree, images: Any) -> Any:
        """The combined logits (n, classes), not cut off from gradients with respect to images."""
        return self._run(jax.lax.stop_gradient(constants), images).logits

    def _run(self, constants: PyTree, images: Any) -> Targets:
        logits, features = [], {}
        for i, (network, part) in enumerate(zip(self._networks, constants, strict=True)):
            model = network.model(part["params"], part["stats"])
            out, found = features_of(model, self.taps if i == 0 else ())(images)
            logits.append(jnp.asarray(out, jnp.float32))
            features |= found
        combined = logits[0]
        if len(logits) > 1:
            combined = ensemble_logits(
                logits, mode=self.mode, temperature=self.temperature, weights=self.weights
            )
        return Targets(combined, features)

    def classes(self, example: Any) -> int:
        """The number of classes, which all members share.

        Raises:
          ValueError: if members differ, or give no (n, classes) logits.
        """
        found = {_classes(self.member(i), example) for i in range(len(self))}
        if len(found) > 1:
            raise ValueError(f"the teachers give different numbers of classes: {sorted(found)}")
        return found.pop()

    def fingerprint(self) -> str:
        """A hash of the parameters, statistics and way of combining."""
        digest = hashlib.sha256(f"{self.mode} {self.temperature} {self.weights}".encode())
        for path, leaf in flatten(self.constants).items():
            digest.update(path.encode())
            digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
        return digest.hexdigest()[:32]


jax.tree_util.register_dataclass(Targets, ["logits", "features"], [])


def teaching(
    teacher: Teacher | None,
    taps: Sequence[str],
    batch: Mapping[str, Any],
    context: Any,
    images: Any,
) -> Targets:
    """The targets of a batch: from the batch where they were cached, else by running the teacher.

    Args:
      teacher: None where the targets are cached.
      taps: paths of the teacher's features that the loss wants.
      batch: may hold ``teacher_logits`` and ``teacher_feature/PATH``.
      context: the step's; its ``constants["teacher"]`` are ``Teacher.constants``.
      images: (n, height, width, channels), for the teacher.

    Raises:
      ValueError: neither a teacher nor its cached targets, or targets without these features.
    """
    if "teacher_logits" in batch:
        names = {path: f"teacher_feature/{path}" for path in taps}
        for path, name in names.items():
            if name not in batch:
                raise ValueError(f"the cached targets hold no features of {path!r}; cache them")
        found = {path: batch[name] for path, name in names.items()}
        return jax.lax.stop_gradient(Targets(batch["teacher_logits"], found))
    constants = context.constants
    if teacher is None or not isinstance(constants, Mapping) or "teacher" not in constants:
        raise ValueError(
            "no teacher: give the distillation loss a Teacher and the step "
            "constants={'teacher': teacher.constants}, or batches with cached targets"
        )
    return teacher(constants["teacher"], images)


def _classes(model: nnx.Module, example: Any) -> int:
    graphdef, state = nnx.split(model)
    out = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s, copy=True)(x), state, example)
    if len(getattr(out, "shape", ())) != 2:
        raise ValueError(f"expected logits (n, classes), got {getattr(out, 'shape', out)}")
    return int(out.shape[1])


def check_classes(student: nnx.Module, teacher: Teacher, example: Any) -> None:
    """Raises unless the student and all teachers give the same number of classes.

    Args:
      student: NNX module, abstract is enough.
      teacher: see `Teacher`.
      example: images or their ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: names both counts.
    """
    compare_classes(student, [teacher.member(i) for i in range(len(teacher))], example)


def compare_classes(student: nnx.Module, teachers: Sequence[nnx.Module], example: Any) -> None:
    """`check_classes` of modules, all of which may be abstract."""
    found = {_classes(evaluation_mode(m), example) for m in teachers}
    if len(found) > 1:
        raise ValueError(f"the teachers give different numbers of classes: {sorted(found)}")
    (theirs,) = found
    ours = _classes(evaluation_mode(student), example)
    if ours != theirs:
        raise ValueError(
            f"the student has {ours} classes, the teacher {theirs}: both must give logits over "
            "the same classes in the same order"
        )
