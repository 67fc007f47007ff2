"""Net2Net on every network of the registry, against the table that the benchmark wrote."""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib

import pytest

from cnnjax import models

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = models.names()


@functools.cache
def benchmark():
    file = ROOT / "benchmarks" / "net2net_registry.py"
    spec = importlib.util.spec_from_file_location("net2net_registry", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows():
    return json.loads(benchmark().RESULT.read_text())["rows"]


@pytest.mark.method("net2wider")
@pytest.mark.method("net2deeper")
def test_the_page_is_the_tables_and_every_refusal_has_a_reason():
    found = rows()
    assert benchmark().PAGE.read_text() == benchmark().page(found)
    assert {row["name"] for row in found} <= set(NAMES)
    for row in found:
        for part in (row["wider"], row["deeper"]):
            assert part["difference"] <= 1e-5 if part["applies"] else len(part["why"]) > 10


@pytest.mark.slow
@pytest.mark.method("net2wider")
@pytest.mark.method("net2deeper")
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_equal_where_the_table_says_so(name):
    want = {row["name"]: row for row in rows()}
    if name not in want:
        pytest.skip("not in the table yet: run benchmarks/net2net_registry.py")
    got = benchmark().examine(name)
    for kind in ("wider", "deeper"):
        assert got[kind]["applies"] == want[name][kind]["applies"]
        if got[kind]["applies"]:
            assert got[kind]["difference"] <= 1e-5
            assert got[kind]["what"] == want[name][kind]["what"]
        else:
            assert got[kind]["why"] == want[name][kind]["why"]
