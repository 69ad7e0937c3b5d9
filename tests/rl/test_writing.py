"""Files appear whole or stay as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl.writing import write_json, write_text, write_whole


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "a.txt"
    write_text(file, "before ü")

    def broken(draft: Path) -> None:
        draft.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(file, broken)
    assert file.read_text(encoding="utf-8") == "before ü"
    write_text(file, "after")
    assert file.read_text() == "after" and [p.name for p in file.parent.iterdir()] == ["a.txt"]


def test_json_is_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [None]})
    text = (tmp_path / "a.json").read_text()
    assert text.startswith('{\n  "a": [') and text.endswith("}\n")
    assert json.loads(text) == {"a": [None], "b": 1}
