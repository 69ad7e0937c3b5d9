from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rl.data import read_manifest
from rl.errors import DataError, MissingVideoError

GOOD: dict[str, Any] = {"video": "a.mp4", "question": "What next?", "answer": "up"}


def write(folder: Path, *rows: dict[str, Any] | str) -> Path:
    """A manifest of rows (or of raw lines) beside a file ``a.mp4``; existence is all that is
    checked here.
    """
    (folder / "a.mp4").write_bytes(b"0")
    manifest = folder / "rows.jsonl"
    manifest.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return manifest


def refused(manifest: Path, kind: type[Exception] = DataError, **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        read_manifest(manifest, **arguments)
    return str(caught.value)


def test_reads_every_column(clips: Path) -> None:
    samples = read_manifest(clips / "manifest.jsonl")
    assert [s.id for s in samples] == ["clip0", "clip1", "clip2", "clip3"]
    second = samples[1]
    assert second.video == str(clips / "clip1.mp4")
    assert second.question == "Where does the square go next?"
    assert (second.answer, second.options) == ("B", ("left", "right", "up", "down"))
    assert (second.frames, second.imagine) == ((0, 1, 2, 3), ((4, 5), (6, 7)))
    assert second.extra == {"level": 1}


def test_defaults_limit_and_blank_lines(tmp_path: Path) -> None:
    manifest = write(tmp_path, GOOD, "", GOOD, "not JSON")
    samples = read_manifest(manifest, limit=2)  # stops before the broken line
    assert [s.id for s in samples] == ["rows:1", "rows:3"]
    assert samples[0].options == samples[0].frames == samples[0].imagine == ()
    assert (samples[0].answer, samples[0].extra) == ("up", {})
    assert "limit is 0" in refused(manifest, limit=0)


def test_video_root(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    (root / "b.mp4").write_bytes(b"0")
    manifest = write(tmp_path, GOOD | {"video": "b.mp4"})
    assert read_manifest(manifest, video_root=root)[0].video == str(root / "b.mp4")
    message = refused(manifest, MissingVideoError)
    assert f"{manifest}, line 1" in message and "'b.mp4'" in message and "video root" in message


@pytest.mark.parametrize(
    ("answer", "letter"), [("B", "B"), ("up", "B"), (" up ", "B"), ("down", "A")]
)
def test_answers_become_letters(tmp_path: Path, answer: str, letter: str) -> None:
    manifest = write(tmp_path, GOOD | {"options": ["down", "up"], "answer": answer})
    assert read_manifest(manifest)[0].answer == letter


def test_options_that_are_their_own_letters(tmp_path: Path) -> None:
    manifest = write(tmp_path, GOOD | {"options": ["A", "B"], "answer": "B"})
    assert read_manifest(manifest)[0].answer == "B"


@pytest.mark.parametrize(
    ("change", "problem", "remedy"),
    [
        ({"question": None}, "column 'question' is missing", "add it (the row has: video"),
        ({"question": " "}, "column 'question' is empty", "fill it in"),
        ({"question": ["a"]}, "column 'question' is a list", "write a text, in quotes"),
        ({"answer": 3}, "column 'answer' is a number (3)", "write a text, in quotes"),
        ({"video": 3}, "column 'video' is a number (3)", "write the path of a file"),
        ({"id": True}, "column 'id' is true or false", "leave the column out"),
        ({"options": "up, down"}, "column 'options' is a text", "write a list of texts"),
        ({"options": ["up"]}, "column 'options' is ['up']", "give 2 to 26 different texts"),
        ({"options": ["up", "up"]}, "column 'options'", "give 2 to 26 different texts"),
        (
            {"options": ["left", "right"]},
            "answer 'up' is not among the options (A = 'left', B = 'right')",
            "give a letter or the exact text",
        ),
        (
            {"options": ["left", "right"], "answer": "C"},
            "answer 'C' is not among the options",
            "give a letter",
        ),
        (
            {"options": ["B", "A"], "answer": "A"},
            "answer 'A' is the letter of one option and the text of another",
            "reorder them",
        ),
        ({"frames": 4}, "column 'frames' is a number (4)", "write a list of frame numbers"),
        ({"frames": [0, "1"]}, "column 'frames' is a list", "write a list of frame numbers"),
        ({"frames": []}, "column 'frames' has an empty list", "leave the column out"),
        ({"frames": [-1, 2]}, "column 'frames' holds [-1, 2]", "count from 0 and must ascend"),
        ({"frames": [3, 2]}, "column 'frames' holds [3, 2]", "must ascend"),
        ({"frames": [2, 2]}, "column 'frames' holds [2, 2]", "without repeats"),
        ({"imagine": [4, 5]}, "column 'imagine' is a list ([4, 5])", "[[4, 5], [6, 7]]"),
        ({"imagine": [[4, 5], [7, 6]]}, "column 'imagine' holds [7, 6]", "must ascend"),
    ],
)
def test_wrong_rows_name_line_column_and_remedy(
    tmp_path: Path, change: dict[str, Any], problem: str, remedy: str
) -> None:
    message = refused(write(tmp_path, GOOD, GOOD | change))
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}, line 2: ")
    assert problem in message and remedy in message


@pytest.mark.parametrize("row", [{"question": "q", "answer": "a"}, GOOD | {"video": ""}])
def test_row_without_video(tmp_path: Path, row: dict[str, Any]) -> None:
    message = refused(write(tmp_path, row), MissingVideoError)
    assert "line 1: the row has no video" in message and "in the column 'video'" in message


def test_video_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:  # the standard exception works too
        read_manifest(write(tmp_path, GOOD, GOOD | {"video": "gone.mp4"}))
    message = str(caught.value)
    assert "line 2: column 'video' names 'gone.mp4'" in message
    assert str(tmp_path / "gone.mp4") in message and "correct the path" in message


def test_duplicate_ids(tmp_path: Path) -> None:
    message = refused(write(tmp_path, GOOD | {"id": 7}, GOOD, GOOD | {"id": "7"}))
    assert "line 3: id '7' is already used in line 1" in message and "ids must differ" in message


def test_not_json(tmp_path: Path) -> None:
    message = refused(write(tmp_path, GOOD, '{"video": "a.mp4",'))
    assert "line 2: not valid JSON" in message and "one JSON object a line" in message
    message = refused(write(tmp_path, "[1, 2]"))
    assert "line 1: a row is a JSON object" in message and "not a list" in message


def test_manifests_that_hold_or_are_nothing(tmp_path: Path) -> None:
    assert "has no rows; write one JSON object a line" in refused(write(tmp_path, "", " "))
    message = refused(tmp_path / "none.jsonl")
    assert "none.jsonl" in message and "No such file" in message and "check the path" in message
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not a text file in UTF-8" in refused(binary)
