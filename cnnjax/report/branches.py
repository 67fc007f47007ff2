"""Branches of several runs in one result file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEAR = 0.001  # error: what other rounding may change in a network that is loaded


def merge_branches(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A result file that holds a new run's branches beside those of an old run.

    Branches of both are the new run's; an old branch whose settings go by another name in the new
    configuration takes that name, one that the new configuration hasn't got is dropped. They may
    stand in one table if they start from the same network: everything but the branches is
    configured alike, and the stages before have the same error.

    Args:
      old: of `result_record`.
      new: of the same configuration, with ``only`` some of the branches carried out.

    Raises:
      ValueError: what differs otherwise, or the errors of the networks that the branches start
        from.
    """
    for key in ("name", "model", "data", "seeds", "reduced"):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{key} is {new.get(key)!r} in the new run and {old.get(key)!r} in the old one: "
                "their branches don't belong in one table"
            )
    if differ := _differences(_common(old["config"]), _common(new["config"])):
        raise ValueError(f"the runs are configured differently: {', '.join(differ)}")
    errors = [{s["name"]: s["error"]["mean"] for s in r["stages"]} for r in (old, new)]
    for name, error in errors[1].items():
        if abs(error - errors[0].get(name, 2.0)) > NEAR:
            raise ValueError(
                f"the branches don't start from the same network: the error after {name} is "
                f"{error:.4f} in the new run and {errors[0].get(name)} in the old one"
            )
    rows = {}
    for row in old["branches"]:
        known = new["config"]["stages"][row["stage"]]["branches"]
        own = old["config"]["stages"][row["stage"]]["branches"][row["branch"]]
        same = [name for name, fields in known.items() if not _differences(own, fields)]
        if same:
            name = row["branch"] if row["branch"] in same else same[0]
            rows[row["stage"], name] = {**row, "branch": name}
    rows |= {(row["stage"], row["branch"]): row for row in new["branches"]}
    return {**new, "branches": list(rows.values()), "config": _of(new["config"], set(rows))}


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be equal: all but the branches, where the data lie, and how often is saved."""
    out = {k: v for k, v in config.items() if k not in ("stages", "expected", "note")}
    out["data"] = {k: v for k, v in config["data"].items() if k not in ("data_dir", "workers")}
    for name, fields in config["stages"].items():
        own = {k: v for k, v in fields.items() if k not in ("branches", "only")}
        if "recipe" in own:
            own["recipe"] = {k: v for k, v in own["recipe"].items() if k != "checkpoint_every"}
        out[f"stages.{name}"] = own
    return out


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Dotted keys; a setting that the old run did not know yet is none."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        prefix = where + "." if where else ""
        gone = [prefix + k for k in old if k not in new]
        both = [k for k in old if k in new]
        return gone + [d for k in both for d in _differences(old[k], new[k], prefix + k)]
    return [] if old == new else [where or "value"]


def _of(config: Mapping[str, Any], done: set[tuple[str, str]]) -> dict[str, Any]:
    """The configuration of these branches (stage, branch)."""
    stages = {}
    for name, fields in config["stages"].items():
        if "branches" in fields:
            own = {k: v for k, v in fields["branches"].items() if (name, k) in done}
            fields = {**fields, "branches": own, "only": []}
        stages[name] = fields
    return {**config, "stages": stages}
