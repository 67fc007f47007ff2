"""Files that appear whole or not at all."""

from __future__ import annotations

import pytest

from cnnjax import files


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "result.json"
    files.write_text(target, "old")

    def interrupted():
        with files.replacing(target) as temporary:
            temporary.write_text("half")
            assert target.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    files.write_text(target, "new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
