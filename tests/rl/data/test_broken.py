"""The list of clips that cannot be shown: one object a data set, one file a run."""

from __future__ import annotations

import json
from pathlib import Path

from rl.data.broken import BrokenClips
from rl.errors import VideoError
from rl.trajectory import Sample


def listed(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return [(row["id"], row["file"]) for row in rows]


def test_sets_with_the_same_ids_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "skipped.jsonl"
    for _ in range(2):  # a run, and that run resumed
        train, validation = BrokenClips(path, rule="skip"), BrokenClips(path, rule="skip")
        train.add(Sample("m:1", "a.mp4", "?", "A"), VideoError("empty"))
        assert "m:1" in train and "m:1" not in validation
        validation.note("m:1", "b.mp4", "no such file")
        assert [row["reason"] for row in validation.rows] == ["no such file"]
    assert listed(path) == [("m:1", "a.mp4"), ("m:1", "b.mp4")]


def test_ids_are_kept_whole_and_an_unfinished_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    odd = "one\u2028two\x85three\r\nfour \udcff"
    BrokenClips(path).note(odd, "a.mp4", "empty")
    whole = path.read_bytes()
    path.write_bytes(whole + '{"id": "y", "file": "é'.encode()[:-1])  # in the middle of a letter
    resumed = BrokenClips(path)
    assert path.read_bytes() == whole
    resumed.note(odd, "a.mp4", "empty")
    resumed.note("y", "b.mp4", "empty")
    assert listed(path) == [(odd, "a.mp4"), ("y", "b.mp4")]
