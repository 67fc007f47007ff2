"""What a student learns from: a small record of terms, resolved on two networks."""

from __future__ import annotations

import dataclasses
from typing import Any

from cnnjax.distillation.logits import check_temperature
from cnnjax.errors import did_you_mean

SOFT = ("none", "kd", "dkd", "logits")
ACTIVATIONS = ("relu", "none")
# (weight, layers, layers named by an entry) of the terms that compare features
TERMS = (
    ("hint_weight", "hints", 2),
    ("attention_beta", "attention", 2),
    ("fsp_weight", "fsp", 4),
    ("contrastive_weight", "contrastive", 2),
    ("review_weight", "review", 2),
    ("neuron_weight", "neurons", 2),
)
# of the first of two stages, when they are off
_OFF: dict[str, Any] = {
    "hint_weight": 0.0,
    "hints": (),
    "fsp_weight": 0.0,
    "fsp": (),
    "neuron_weight": 0.0,
    "neurons": (),
}


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """What the student learns from; the loss is the sum of the weighted terms.

    Attributes:
      hard: weight of the cross-entropy with the labels (1 - alpha in Hinton's form); 0: no labels.
      soft: ``"kd"`` (Hinton: T^2 KL), ``"dkd"``, ``"logits"`` (Ba & Caruana), ``"none"``.
      soft_weight: weight of it at the start (alpha).
      soft_weight_end: weight at the last step, linear in between (FitNets: from 4 to 1); None:
        constant.
      soft_warmup: share of the steps over which that weight rises linearly from 0 (DKD: 20 of 240
        epochs).
      temperature: T > 0.
      dkd_alpha: weight of the target class within ``"dkd"``.
      dkd_beta: weight of the others.
      hint_weight: weight of the hint loss (mean over examples of half the squared distance, summed
        over positions and channels).
      hints: (student glob, teacher glob) pairs.
      hint_activation: of the regressors: ``"relu"`` or ``"none"``.
      attention_beta: the authors' beta; 1e3 for ``attention_form="code"``.
      attention: (student glob, teacher glob) pairs.
      attention_form: ``"code"`` or ``"paper"``.
      fsp_weight: weight of the FSP loss.
      fsp: (student first, student last, teacher first, teacher last) globs for each section.
      gradient_beta: weight of gradient-based attention transfer: the loss's gradients at the input.
      contrastive_weight: weight of contrastive representation distillation (CRD, in-batch
        negatives); maps are averaged over space first.
      contrastive: one (student glob, teacher glob) pair.
      contrastive_temperature: of its similarities.
      review_weight: weight of knowledge review (ReviewKD).
      review: (student glob, teacher glob) pairs of maps from early to late; each student map is
        fused with all deeper ones by trained modules.
      neuron_weight: weight of neuron mimicking (Luo et al.): the squared error on selected neurons.
      neurons: one (student glob, teacher glob) pair of vectors.
      neuron_count: how many of the teacher's neurons are selected.
      label_smoothing: of the hard term.
    """

    hard: float = 0.1
    soft: str = "kd"
    soft_weight: float = 0.9
    soft_weight_end: float | None = None
    soft_warmup: float = 0.0
    temperature: float = 4.0
    dkd_alpha: float = 1.0
    dkd_beta: float = 8.0
    hint_weight: float = 0.0
    hints: tuple[tuple[str, str], ...] = ()
    hint_activation: str = "relu"
    attention_beta: float = 0.0
    attention: tuple[tuple[str, str], ...] = ()
    attention_form: str = "code"
    fsp_weight: float = 0.0
    fsp: tuple[tuple[str, ...], ...] = ()
    gradient_beta: float = 0.0
    contrastive_weight: float = 0.0
    contrastive: tuple[tuple[str, str], ...] = ()
    contrastive_temperature: float = 0.1
    review_weight: float = 0.0
    review: tuple[tuple[str, str], ...] = ()
    neuron_weight: float = 0.0
    neurons: tuple[tuple[str, str], ...] = ()
    neuron_count: int = 32
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for _, name, _ in TERMS:  # config files hold lists
            value = tuple(tuple(v) for v in getattr(self, name))
            object.__setattr__(self, name, value)
        check_temperature(self.temperature)
        if self.soft not in SOFT:
            raise ValueError(f"unknown soft loss {self.soft!r}.{did_you_mean(self.soft, SOFT)}")
        if not 0 <= self.soft_warmup <= 1:
            raise ValueError(
                f"soft_warmup is {self.soft_warmup}; a share of the steps, from 0 to 1"
            )
        if self.hint_activation not in ACTIVATIONS:
            raise ValueError(f"hint_activation is {self.hint_activation!r}; 'relu' or 'none'")
        if self.attention_form not in ("code", "paper"):
            raise ValueError(f"attention_form is {self.attention_form!r}; 'code' or 'paper'")
        weights = ("hard", "soft_weight", "gradient_beta", *(w for w, _, _ in TERMS))
        for weight in weights:
            if not getattr(self, weight) >= 0:
                raise ValueError(f"{weight} is {getattr(self, weight)}; weights are not negative")
        for weight, pairs, size in TERMS:
            given = getattr(self, pairs)
            if bool(getattr(self, weight)) != bool(given):
                raise ValueError(
                    f"{weight} = {getattr(self, weight)} and {pairs} = {given}: give both or none"
                )
            if any(len(p) != size for p in given):
                raise ValueError(f"each entry of {pairs} names {size} layers, got {given}")
        if len(self.contrastive) > 1 or len(self.neurons) > 1:
            raise ValueError("contrastive and neurons name one pair of layers")
        check_temperature(self.contrastive_temperature)
        if self.neuron_count < 1:
            raise ValueError(f"neuron_count is {self.neuron_count}; select at least 1 neuron")
        if not (self.hard or self.taught):
            raise ValueError("all weights are 0: there is nothing to learn from")

    @property
    def features(self) -> bool:
        """Whether any term compares features."""
        return any(getattr(self, weight) for weight, _, _ in TERMS)

    @property
    def taught(self) -> bool:
        """Whether any term needs a teacher."""
        soft = self.soft != "none" and self.soft_weight > 0
        return self.features or soft or self.gradient_beta > 0

    def stage_one(self) -> DistillConfig:
        """Hints, FSP and neurons alone, for the first of two stages (FitNets, Yim, Luo et al.).

        Raises:
          ValueError: there is none.
        """
        if not (self.hint_weight or self.fsp_weight or self.neuron_weight):
            raise ValueError("a first stage needs hints, fsp or neurons")
        off: dict[str, Any] = {w: 0.0 for w, _, _ in TERMS} | {p: () for _, p, _ in TERMS}
        off = {k: v for k, v in off.items() if k not in _OFF}
        return dataclasses.replace(self, hard=0.0, soft="none", gradient_beta=0.0, **off)

    def stage_two(self) -> DistillConfig:
        """Everything but hints, FSP and neurons, for the second of two stages."""
        return dataclasses.replace(self, **_OFF)
