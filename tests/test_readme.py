"""The README's Python runs, and the commands that it names exist."""

from __future__ import annotations

import re


def blocks(root, language):
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(), re.S)


def test_python_of_the_readme(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(root, "python"))
    space: dict = {}
    exec(compile(code, "README.md", "exec"), space)
    before = space["cnnjax"].profile(space["model"], space["x"])
    after = space["cnnjax"].profile(space["small"], space["x"])
    assert after.macs < 0.6 * before.macs
    assert (tmp_path / "small").exists()
    a, b = (space["cnnjax"].tree.flatten(space["nnx"].state(space[m])) for m in ("small", "again"))
    assert a.keys() == b.keys()
    assert all((a[p] == b[p]).all() for p in a)


def test_files_named_in_the_readme_exist(root):
    text = (root / "README.md").read_text()
    named = set(re.findall(r"(?:scripts|configs|cnnjax)/[\w/]+\.(?:py|md)", text))
    for name in named - {"configs/NAME.py"}:
        assert (root / name).exists(), name


def test_continuous_integration_finds_the_test_command(root):
    text = (root / "README.md").read_text()
    assert "<!-- test command -->\n```sh\npip install" in text
