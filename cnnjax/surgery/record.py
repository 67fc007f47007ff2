"""The record that every surgery leaves on its result: the base model and the edits, as JSON.

It is one static attribute of the root module, an immutable and hashable value, so that it survives
``nnx.split``/``merge``, ``nnx.clone`` and ``nnx.jit``. Nothing in it is code.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from flax import nnx

ATTRIBUTE = "cnnjax_record"


@dataclasses.dataclass(frozen=True, repr=False)
class Record:
    """Where a model came from and what was done to it.

    Attributes:
      base: JSON of ``{"factory": name, "kwargs": {...}}``, or ``""`` when unknown.
      edits: JSON of each edit, in the order in which they were made.
    """

    base: str = ""
    edits: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Record(base={self.base or None}, edits={len(self.edits)})"


def record_of(model: nnx.Module) -> Record:
    """The record on the model; an empty one where there is none."""
    return getattr(model, ATTRIBUTE, None) or Record()


def base_of(model: nnx.Module) -> dict[str, Any] | None:
    """``{"factory": name, "kwargs": {...}}`` of the model, or None when unknown.

    Read from the record, or from the ``provenance`` that ``cnnjax.models.create`` leaves.
    """
    base = record_of(model).base
    if base:
        return json.loads(base)
    provenance = getattr(model, "provenance", None)
    if provenance is None or not hasattr(provenance, "as_dict"):
        return None
    given = provenance.as_dict()
    return {"factory": given["name"], "kwargs": dict(given["fields"])}


def edits_of(model: nnx.Module) -> list[dict[str, Any]]:
    """The edits made to the model, oldest first, as JSON-able dicts with a ``"kind"``."""
    return [json.loads(edit) for edit in record_of(model).edits]


def set_base(model: nnx.Module, factory: str, kwargs: dict[str, Any]) -> None:
    """Stamps a model that was just created, in place, with the factory that makes it again.

    Args:
      model: a fresh model, untouched by surgery.
      factory: a registry name (``"resnet20"``) or ``"package.module:function"``.
      kwargs: the factory's keyword arguments; JSON-able.

    Raises:
      TypeError: if an argument cannot be written as JSON.
      ValueError: if the model has been edited already.
    """
    record = record_of(model)
    if record.edits:
        raise ValueError("set_base on a model that was edited already; stamp it when it is made")
    setattr(model, ATTRIBUTE, Record(dumps({"factory": factory, "kwargs": dict(kwargs)}), ()))


def add_edit(model: nnx.Module, kind: str, **payload: Any) -> None:
    """Appends an edit to the record of ``model``, in place; for a result that the caller owns.

    Args:
      model: the result of an edit (never the caller's input).
      kind: the edit's kind, registered with ``@surgery.edit(kind)``.
      **payload: JSON-able arguments with which the edit can be replayed.
    """
    record = record_of(model)
    edits = (*record.edits, dumps({"kind": kind, **payload}))
    setattr(model, ATTRIBUTE, Record(record.base, edits))


def copy_record(source: nnx.Module, target: nnx.Module) -> None:
    """Puts the record of ``source`` on ``target``, in place."""
    record = record_of(source)
    if record != Record() or hasattr(target, ATTRIBUTE):
        setattr(target, ATTRIBUTE, record)


def dumps(value: Any) -> str:
    """JSON with sorted keys; refuses NaN, infinities and anything that JSON cannot hold.

    Raises:
      TypeError: names the value that is not JSON-able.
    """
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"an edit record holds JSON only (numbers, strings, lists): {error}") from (
            error
        )
