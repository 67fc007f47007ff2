"""Tables of measured forms: plain data of one kind of device, put in force by `use_table`."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import platform as host
import types
from collections.abc import Mapping
from typing import Any

import jax

from cnnjax import files
from cnnjax.errors import did_you_mean
from cnnjax.ops import choice
from cnnjax.ops.geometry import PARTS, ConvCase, ConvSpec, ShuffleCase

Case = ConvCase | ShuffleCase
Key = tuple[str, Case]  # part and case
_WHAT, _VERSION = "cnnjax convolution forms", 1
# part of every cache key of JAX: what was traced under one table never runs under another
_IN_FORCE = jax.make_user_context(None)


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    """Name of the processor: XLA calls every one of them "cpu"."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return host.processor() or host.machine()


def present_device() -> tuple[str, str]:
    """Platform and kind of JAX's default device, as tables are keyed by them."""
    device: Any = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    kind = _processor() if device.platform == "cpu" else device.device_kind
    return device.platform, kind


class FormTable:
    """Which form each part of each convolution and channel shuffle runs in, on one device kind.

    Immutable and hashable; made by :func:`cnnjax.ops.tune` or :meth:`load`.

    Attributes:
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      device: the kind of device that measured, e.g. ``"NVIDIA H100 80GB HBM3"``.
      forms: form by (part, case).
      gains: by (part, case) the measured ratios time of the native form / time of a form, of the
        forms that were timed to the end; above 1, the form is faster.
    """

    def __init__(
        self,
        platform: str,
        device: str,
        forms: Mapping[Key, str],
        gains: Mapping[Key, Mapping[str, float]] | None = None,
    ) -> None:
        """Args: see the attributes.

        Raises:
          ValueError: an unknown platform, or a form that the kind of convolution does not have.
        """
        if platform not in choice.PLATFORMS:
            raise ValueError(
                f"forms are tuned for the platforms {', '.join(choice.PLATFORMS)}, not {platform!r}"
            )
        for (part, case), form in forms.items():
            kind = kind_of_case(case)
            if part not in PARTS:
                raise ValueError(f"unknown part {part!r}.{did_you_mean(part, PARTS)}")
            if form not in choice.BY_KIND[kind]:
                raise ValueError(
                    f"a {kind} has the forms {', '.join(choice.BY_KIND[kind])}, not {form!r}"
                )
        self.platform, self.device = platform, device
        self.forms: Mapping[Key, str] = types.MappingProxyType(dict(forms))
        self.gains: Mapping[Key, Mapping[str, float]] = types.MappingProxyType(dict(gains or {}))
        self._hash = hash((platform, device, frozenset(self.forms.items())))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FormTable):
            return NotImplemented
        same = self._hash == other._hash and (self.platform, self.device) == (
            other.platform,
            other.device,
        )
        return same and self.forms == other.forms

    def __len__(self) -> int:
        return len(self.forms)

    def __repr__(self) -> str:
        return f"FormTable({self.platform!r}, {self.device!r}, {len(self)} parts)"

    def form(self, part: str, case: Case, *, platform: str | None) -> str | None:
        """The form of a part, None on another platform or where it was not measured."""
        return self.forms.get((part, case)) if platform == self.platform else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON, by way of a temporary file and a rename."""
        rows = [
            {
                "kind": kind_of_case(case),
                "part": part,
                **_row(case),
                "form": form,
                "native_over_form": dict(self.gains.get((part, case), {})),
            }
            for (part, case), form in self.forms.items()
        ]
        record = {
            "what": _WHAT,
            "version": _VERSION,
            "platform": self.platform,
            "device": self.device,
            "jax": jax.__version__,
        }
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        text = json.dumps(record, indent=1)[:-2] + f',\n "forms": [\n{lines}\n ]\n}}\n'
        files.write_text(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FormTable:
        """Reads what `save` wrote.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is no table of forms, or one of another version.
        """
        text = pathlib.Path(path).read_text()
        try:
            record = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is no table of convolution forms: {error}") from error
        if not isinstance(record, dict) or record.get("what") != _WHAT:
            raise ValueError(f'{path} is no table of convolution forms: it lacks "what": {_WHAT!r}')
        if record.get("version") != _VERSION:
            raise ValueError(
                f"{path} has version {record.get('version')!r}, this library reads {_VERSION}; "
                "measure again with cnnjax.ops.tune"
            )
        forms, gains = {}, {}
        try:
            for row in record["forms"]:
                key = (row["part"], _case(row))
                forms[key] = row["form"]
                gains[key] = row["native_over_form"]
            return cls(record["platform"], record["device"], forms, gains)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged table of convolution forms: {error}") from error


def kind_of_case(case: Case) -> str:
    """``"shuffle"`` or the kind of convolution."""
    return "shuffle" if isinstance(case, ShuffleCase) else case.kind


def _row(case: Case) -> dict[str, Any]:
    if isinstance(case, ShuffleCase):
        return {"x": case.x, "groups": case.groups, "dtype": case.dtype}
    spec = case.spec
    return {
        "x": case.x,
        "kernel": case.kernel,
        "strides": spec.strides,
        "padding": spec.padding,
        "dilation": spec.dilation,
        "groups": spec.groups,
        "dtype": case.dtype,
        "precision": case.precision,
    }


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _case(row: Mapping[str, Any]) -> Case:
    row = {name: _tuples(value) for name, value in row.items()}
    if row["kind"] == "shuffle":
        return ShuffleCase(row["x"], row["groups"], row["dtype"])
    spec = ConvSpec(row["strides"], row["padding"], row["dilation"], row["groups"])
    return ConvCase(spec, row["x"], row["kernel"], row["dtype"], row["precision"])


def in_force() -> FormTable | None:
    """The table that `use_table` put in force, None outside."""
    return _IN_FORCE.value


def use_table(table: FormTable | None) -> Any:
    """A context in which the measured forms of a table go before the rules.

    The choice is made while a function is traced; JAX's caches tell tables apart, so a function
    that ran before is traced again for the table, and again without it after the context. What was
    compiled ahead of time keeps the forms it was compiled with. None: the rules alone.

    Args:
      table: of the present kind of device.

    Raises:
      ValueError: the table is of another kind of device.
    """
    if table is not None and (table.platform, table.device) != present_device():
        platform, device = present_device()
        raise ValueError(
            f"the table of forms was measured on {table.device} ({table.platform}), this device is "
            f"{device} ({platform}); measure here with cnnjax.ops.tune"
        )
    return _IN_FORCE(table)
