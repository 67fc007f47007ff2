"""Rules from plain words, for config files: ``make_rule("tucker2", "evbmf 0.3")``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cnnjax.errors import did_you_mean
from cnnjax.factorization import cp_rules, rules
from cnnjax.factorization.asymmetric import Asymmetric3D
from cnnjax.factorization.denton_rules import Biclustered, Monochromatic
from cnnjax.factorization.filter_rules import SeparableFilters, SeparableTransform, Tucker
from cnnjax.factorization.predict_rules import Predicted
from cnnjax.factorization.trains import DualBasis, TensorTrain
from cnnjax.factorization.weighted_rules import Weighted

# the papers' names beside ours; a pair fixes some of the rule's options
_RULES: dict[str, tuple[Callable[..., rules.Rule], dict[str, Any]]] = {
    "asymmetric_3d": (Asymmetric3D, {}),
    "basis": (rules.Basis, {}),
    "filter_basis": (rules.Basis, {}),
    "svd_dense": (rules.Basis, {}),
    "biclustered": (Biclustered, {}),
    "biclustered_low_rank": (Biclustered, {}),
    "dct": (SeparableTransform, {"transform": "dct"}),
    "haar": (SeparableTransform, {"transform": "haar"}),
    "learn_separable_filters": (SeparableFilters, {}),
    "monochromatic": (Monochromatic, {}),
    "monochromatic_conv": (Monochromatic, {}),
    "predict_parameters": (Predicted, {}),
    "predicted": (Predicted, {}),
    "separable_filters": (SeparableFilters, {}),
    "separable_transform": (SeparableTransform, {}),
    "tucker": (Tucker, {}),
    "tucker_hooi": (Tucker, {}),
    "dual_basis": (DualBasis, {}),
    "spatial": (rules.Spatial, {}),
    "spatial_svd": (rules.Spatial, {}),
    "jaderberg_scheme1": (cp_rules.Scheme1, {}),
    "jaderberg_scheme2": (rules.Spatial, {}),
    "scheme1": (cp_rules.Scheme1, {}),
    "tucker2": (rules.Tucker2, {}),
    "mahalanobis": (Weighted, {"metric": "loss"}),
    "weighted_low_rank": (Weighted, {"metric": "inputs"}),
    "tensor_train": (TensorTrain, {}),
    "cp": (cp_rules.CP, {}),
    "cp4_conv": (cp_rules.CP, {"solver": "nls"}),
    "cp_als": (cp_rules.CP, {"solver": "als"}),
    "cp_nls": (cp_rules.CP, {"solver": "nls"}),
    "cp_tpm": (cp_rules.CP, {"solver": "tpm"}),
}
_RANKS: dict[str, Callable[[float], Any]] = {
    "energy": rules.Energy,
    "macs": rules.MacsRatio,
    "evbmf": rules.EVBMF,
}


def rule_names() -> tuple[str, ...]:
    """Names that `make_rule` knows, sorted."""
    return tuple(sorted(_RULES))


def parse_rank(rank: Any) -> Any:
    """A rank from a word: ``"energy 0.9"``, ``"macs 0.5"``, ``"evbmf 0.3"``, ``"8"``, ``"0.5"``.

    Anything but a string (numbers, rank objects, tuples of them) is returned as it is, the entries
    of a tuple parsed.

    Raises:
      ValueError: for another string; names the nearest word.
    """
    if isinstance(rank, tuple | list):
        return tuple(parse_rank(r) for r in rank)
    if not isinstance(rank, str) or rank == "evbmf":
        return rank
    for number in (int, float):
        try:
            return number(rank)
        except ValueError:
            continue
    word, _, value = rank.partition(" ")
    if word in _RANKS:
        try:
            return _RANKS[word](float(value))
        except ValueError:
            raise ValueError(
                f"rank {rank!r}: expected '{word} NUMBER', e.g. '{word} 0.5'"
            ) from None
    raise ValueError(
        f"rank is {rank!r}; {rules.KINDS}, in words 'energy 0.9', 'macs 0.5' or 'evbmf 0.3'."
        f"{did_you_mean(word, _RANKS)}"
    )


def make_rule(name: str, rank: Any = None, **options: Any) -> rules.Rule:
    """A rule by its name.

    Args:
      name: one of `rule_names`.
      rank: see `parse_rank`; None is the rule's own default.
      options: further attributes of the rule.

    Raises:
      ValueError: for an unknown name, option or rank; names the nearest one.
    """
    if name not in _RULES:
        raise ValueError(f"unknown rule {name!r}.{did_you_mean(str(name), _RULES)}")
    made, fixed = _RULES[name]
    known = [
        f.name
        for f in dataclasses.fields(made)  # pyright: ignore[reportArgumentType]
        if f.name != "rank" and f.name not in fixed
    ]
    for option in options:
        if option not in known:
            raise ValueError(
                f"rule {name!r} has no option {option!r}.{did_you_mean(option, known)}"
            )
    if rank is not None:
        options["rank"] = parse_rank(rank)
    return made(**fixed, **options)
