"""Result files of scripts that bring their own table: into the config's header and the page."""

from __future__ import annotations

import importlib.util

from cnnjax import report

RECORD = {
    "format": report.TABLE,
    "name": "toy",
    "note": "last epoch",
    "seeds": [0, 1],
    "reduced": True,
    "header": ["detector", "mAP %", "runs"],
    "rows": [["alone", "41.20", 2], ["distilled", "43.70", 2], ["none", "", 1]],
    "environment": {"cpu_cores": 2, "devices": 1, "device": "cpu", "jax": "0"},
}


def test_a_table_reaches_header_and_page(tmp_path, root):
    config = tmp_path / "toy.py"
    config.write_text(f'"""Toy."""\n\n{report.results.BEGIN}\n{report.results.END}\n')
    report.write_result(RECORD, tmp_path / "results" / "toy.json")
    spec = importlib.util.spec_from_file_location("updater", root / "scripts" / "update_results.py")
    updater = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(updater)
    assert updater.main(["--configs", str(tmp_path), "--check"]) == 1
    assert updater.main(["--configs", str(tmp_path)]) == 0
    assert updater.main(["--configs", str(tmp_path), "--check"]) == 0
    assert "# distilled: mAP % 43.70, runs 2\n" in config.read_text()
    assert "# none: runs 1\n" in config.read_text()  # an empty cell says nothing
    assert "reduced run, seeds 0, 1" in config.read_text()
    page = (tmp_path / "results" / "README.md").read_text()
    assert "## toy" in page
    assert "| alone | 41.20 | 2 |" in page
