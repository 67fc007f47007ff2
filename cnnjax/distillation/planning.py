"""A `DistillConfig` resolved on two networks: which layers meet, and by what adapters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from cnnjax.distillation import taps as taplib
from cnnjax.distillation.adapters import ReviewFusion
from cnnjax.distillation.objective import DistillConfig

_ACTIVATIONS = {"relu": jax.nn.relu, "none": None}
Names = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A `DistillConfig` whose globs are resolved on two networks.

    Attributes:
      config: the record.
      hints: (student path, teacher path).
      attention: likewise.
      fsp: (student first, last), (teacher first, last).
      contrastive: (student path, teacher path), at most one.
      review: likewise, from early to late.
      neurons: likewise, at most one.
      pairs: of all but `attention`, with shapes.
      selected: which of the teacher's neurons `neurons` means, see `with_neurons`.
      scale: their standard deviations.
    """

    config: DistillConfig
    hints: Names = ()
    attention: Names = ()
    fsp: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = ()
    pairs: tuple[taplib.Pair, ...] = ()
    contrastive: Names = ()
    review: Names = ()
    neurons: Names = ()
    selected: tuple[int, ...] = ()
    scale: tuple[float, ...] = ()

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Paths of the student's layers, each once."""
        paths = [s for s, _ in self._layers()]
        paths += [p for ours, _ in self.fsp for p in ours]
        return tuple(dict.fromkeys(paths))

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Paths of the teacher's layers, each once."""
        paths = [t for _, t in self._layers()]
        paths += [p for _, theirs in self.fsp for p in theirs]
        return tuple(dict.fromkeys(paths))

    def _layers(self) -> Names:
        both = (*self.hints, *self.attention, *self.contrastive, *self.review, *self.neurons)
        return both

    def with_neurons(self, selected: Any, scale: Any) -> Plan:
        """The plan with the teacher's neurons chosen, e.g. by `select_neurons`.

        Args:
          selected: (count,) indices.
          scale: (count,) positive standard deviations.

        Raises:
          ValueError: there is no such term.
        """
        if not self.neurons:
            raise ValueError("the plan has no term of neurons: neuron_weight is 0")
        return dataclasses.replace(
            self, selected=tuple(map(int, selected)), scale=tuple(map(float, scale))
        )

    def adapters(self, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Fresh adapters for the pairs that need one.

        Hint layers get a regressor where shapes differ; FSP layers a 1x1 convolution and embeddings
        of the contrastive loss a dense layer where channel counts differ; review layers always
        their fusion modules; selected neurons always a dense layer.
        """
        out: dict[str, nnx.Module] = {}
        ends = [(s, t) for ours, theirs in self.fsp for s, t in zip(ours, theirs, strict=True)]
        by_name = {(p.student, p.teacher): p for p in self.pairs}
        for key in self.hints:
            if not by_name[key].equal:
                act = _ACTIVATIONS[self.config.hint_activation]
                out[taplib.adapter_name(*key)] = taplib.make_adapter(
                    by_name[key], activation=act, rngs=rngs
                )
        for key in ends:
            name, pair = taplib.adapter_name(*key), by_name[key]
            if pair.student_shape[-1] != pair.teacher_shape[-1] and name not in out:
                out[name] = taplib.fsp_adapter(pair, rngs=rngs)
        for key in self.contrastive:
            ours, theirs = by_name[key].student_shape[-1], by_name[key].teacher_shape[-1]
            if ours != theirs:
                out["contrastive"] = nnx.Linear(ours, theirs, rngs=rngs)
        if self.review:
            shapes = [by_name[key] for key in self.review]
            out["review"] = ReviewFusion(
                [p.student_shape[-1] for p in shapes], [p.teacher_shape for p in shapes], rngs=rngs
            )
        for key in self.neurons:
            if len(by_name[key].student_shape) != 2 or len(by_name[key].teacher_shape) != 2:
                raise ValueError(f"neurons are vectors (n, c); {key} are {by_name[key]}")
            count = len(self.selected) or self.config.neuron_count
            out["neurons"] = nnx.Linear(by_name[key].student_shape[1], count, rngs=rngs)
        return out


def plan_distillation(
    config: DistillConfig, student: nnx.Module, teacher: nnx.Module, *example: Any
) -> Plan:
    """Resolves the globs of a record; nothing is computed.

    Args:
      config: the record.
      student: NNX module, abstract is enough.
      teacher: NNX module, abstract is enough.
      *example: inputs or ``jax.ShapeDtypeStruct`` s.

    Raises:
      ValueError: a glob that matches nothing or several layers.
    """
    ends = [end for f, e, tf, te in config.fsp for end in ((f, tf), (e, te))]
    terms = {
        "hints": config.hints,
        "attention": config.attention,
        "contrastive": config.contrastive,
        "review": config.review,
        "neurons": config.neurons,
        "fsp": tuple(ends),
    }
    wanted = [pair for pairs in terms.values() for pair in pairs]
    found = iter(taplib.pair_features(student, teacher, wanted, *example))
    pairs = {name: tuple(next(found) for _ in globs) for name, globs in terms.items()}
    names: dict[str, Any] = {
        k: tuple((p.student, p.teacher) for p in ps) for k, ps in pairs.items() if k != "fsp"
    }
    sections = tuple(
        ((a.student, b.student), (a.teacher, b.teacher))
        for a, b in zip(pairs["fsp"][::2], pairs["fsp"][1::2], strict=True)
    )
    shaped = tuple(p for k, ps in pairs.items() if k != "attention" for p in ps)
    return Plan(config, fsp=sections, pairs=shaped, **names)
