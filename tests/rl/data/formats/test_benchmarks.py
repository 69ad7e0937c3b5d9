"""Benchmarks: rows in the shapes of their releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rl.data.formats import read_samples
from rl.data.media import question_text
from rl.errors import DataError, MissingVideoError
from tests.rl.data.formats.folder import read, write


def test_futurebench(tmp_path: Path) -> None:
    qa = {
        "Question": "What next?",
        "Options": {"A": "It falls.", "B": "It flies.", "C": "B", "D": "none"},
        "Answer": "B",  # the letter, though C's text is "B"
    }
    listed = "What next?\nA) It falls.\nB) It flies.\nC) B\nD) none"
    row = {"id": "x", "video_path": "/their/video_dataset/act/a.mp4", "question_type": "hop1"}
    others = "What next, A) or B)?\nA) one\nB) two"  # lists something else than its options
    rows = [row | {"qa": qa}, row | {"qa": qa | {"Question": listed}, "question_type": "hop5"}]
    rows.append(row | {"qa": qa | {"Question": others}})
    file = write(tmp_path, "futurebench.json", rows, ("act/a.mp4",))
    plain, embedded, left = read(file, "futurebench")
    assert left.question == others and left.options == plain.options
    assert plain.video == str(tmp_path / "act/a.mp4")
    assert (plain.answer, plain.options) == ("B", ("It falls.", "It flies.", "B", "none"))
    assert (embedded.question, embedded.options) == (plain.question, plain.options)
    assert question_text(embedded) == "What next?\nA. It falls.\nB. It flies.\nC. B\nD. none"
    assert [s.extra for s in (plain, embedded)] == [
        {"question_type": "hop1"},
        {"question_type": "hop5"},
    ]


def test_options_by_letter_keep_their_places(tmp_path: Path) -> None:
    row = {"id": "x", "video_path": "a.mp4"}
    qa = {"Question": "?", "Options": {"A": "x", "B": "y", "C": None}, "Answer": "B"}
    (sample,) = read(write(tmp_path, "a.json", [row | {"qa": qa}], ("a.mp4",)), "futurebench")
    assert (sample.options, sample.answer) == (("x", "y"), "B")
    for options in ({"A": "x", "B": None, "C": "y"}, {"A": "x", "C": "y"}, {"1": "x", "2": "y"}):
        file = write(tmp_path, "b.json", [row | {"qa": qa | {"Options": options}}])
        with pytest.raises(DataError, match=r"row 1: column 'qa.Options' is a"):
            read_samples(file)


NEXTQA: dict[str, Any] = {
    "video": 4010069381,
    "frame_count": 369,
    "question": "how do the two man play the instrument",
    "answer": 1,
    "qid": 6,
    "type": "CH",
    **{f"a{i}": text for i, text in enumerate(["roll", "tap", "strum", "hit", "pat"])},
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_nextqa(tmp_path: Path, suffix: str) -> None:
    rows = [NEXTQA, NEXTQA | {"video": 11, "qid": 6, "answer": 4}]
    clips = (f"4010069381{suffix}", f"videos/1164/11{suffix}")  # flat, and in a folder
    first, second = read(write(tmp_path, "mc.parquet", rows, clips), "nextqa")
    assert first.video == str(tmp_path / clips[0]) and second.video == str(tmp_path / clips[1])
    assert (first.id, second.id) == ("4010069381:6", "11:6")
    assert first.options == ("roll", "tap", "strum", "hit", "pat")
    assert (first.answer, second.answer) == ("B", "E")
    assert first.extra == {"frame_count": 369, "type": "CH"}


def test_nextqa_as_csv_and_open(tmp_path: Path) -> None:
    csv = tmp_path / "val.csv"
    csv.write_text(",".join(NEXTQA) + "\n" + ",".join(map(str, NEXTQA.values())) + "\n")
    row = {"video": "4010069381", "question": "why?", "answer": "to play", "qid": 1, "type": "CW"}
    file = write(
        tmp_path, "oe.parquet", [row | {"additional_ref_answer": "fun"}], ("4010069381.mp4",)
    )
    assert read(csv, "nextqa")[0].answer == "B"
    (sample,) = read(file, "nextqa_open")
    assert (sample.answer, sample.options) == ("to play", ())
    assert sample.extra["additional_ref_answer"] == "fun"


def test_mvbench(tmp_path: Path) -> None:
    row = {"video": "T1.webm", "question": "Which?", "candidates": ["B", "A"], "answer": "A"}
    sequence = [row, row | {"start": 1.5, "end": 4, "video": "T2.mp4"}]
    tvqa = row | {"video": "castle", "start": 1.0, "end": 2.0, "fps": 3}
    write(tmp_path, "json/action_sequence.json", sequence, ("video/star/T1.webm", "T2.mp4"))
    frames = tuple(f"video/tvqa/castle/{i}.jpg" for i in range(1, 13))
    write(tmp_path, "json/episodic_reasoning.json", [tvqa], frames)
    first, second, third = read(tmp_path / "json", "mvbench", video_root=tmp_path)
    assert first.video == str(tmp_path / "video/star/T1.webm")
    assert (first.answer, first.options) == ("B", ("B", "A"))  # by its text
    assert (first.window, second.window) == (None, (1.5, 4.0))
    assert [s.extra["task"] for s in (first, second, third)] == [
        *["action_sequence"] * 2,
        "episodic_reasoning",
    ]
    # A folder of images, three a second: seconds 1 to 2, in the order of their numbers.
    assert third.images == tuple(str(tmp_path / frames[i]) for i in (3, 4, 5))
    assert third.window is None and third.video == third.images[0]
    write(tmp_path, "x.json", [], ("video/clevrer/T1.webm",))
    with pytest.raises(DataError, match="several clips are called so"):
        read_samples(tmp_path / "json", video_root=tmp_path)
    with pytest.raises(DataError, match=r"row 1: columns 'start' and 'end' are \[4, 1\]"):
        read_samples(write(tmp_path, "w.json", [sequence[1] | {"start": 4, "end": 1}]))


def test_video_mme(tmp_path: Path) -> None:
    row = {
        "video_id": "001",
        "videoID": "fFjv93ACGo8",
        "question_id": "001-1",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity",
        "task_type": "Counting",
        "url": "somewhere",
        "question": "Which?",
        "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. All three."],
        "answer": "C",
    }
    file = write(tmp_path, "test.parquet", [row], ("fFjv93ACGo8.mp4",))
    (sample,) = read(file, "video_mme")
    assert (sample.id, sample.answer) == ("001-1", "C")
    assert sample.options == ("Apples.", "Candles.", "Berries.", "All three.")
    kept = ("video_id", "duration", "domain", "sub_category", "task_type", "url")
    assert sample.extra == {name: row[name] for name in kept}
    twice = write(tmp_path, "twice.parquet", [row, row])
    with pytest.raises(DataError, match=r"row 2: id '001-1' is already used in row 1"):
        read_samples(twice)


@pytest.mark.parametrize(
    ("name", "row", "options", "answer"),
    [
        (
            "tempcompass",
            {
                "video_id": "v",
                "question": "Which?\nA. up\nB. down",
                "answer": "B. down",
                "dim": "d",
            },
            ("up", "down"),
            "B",
        ),
        (
            "tempcompass",
            {"video_id": "v", "question": "Is it up?", "answer": "yes", "dim": "direction"},
            (),
            "yes",
        ),
        (
            "egoschema",
            {"video_idx": "v", "question": "?", "option": ["A. x", "B. y"], "answer": "1"},
            ("x", "y"),
            "B",
        ),
        (
            "longvideobench",
            {"id": "l", "video_path": "v.mp4", "question": "?", "candidates": ["x", "y", "z"]}
            | {"correct_choice": 2, "subtitle_path": "s", "duration_group": 15},
            ("x", "y", "z"),
            "C",
        ),
        (
            "longvideobench",
            {"id": "l", "video_path": "v.mp4", "question": "?", "option0": "x", "option1": "y"}
            | {"option2": "N/A", "correct_choice": 0},
            ("x", "y"),
            "A",
        ),
        (
            "mlvu",
            {"video_name": "v", "question": "Why?\n(A) x\n(B) y", "answer": "B", "task_type": "t"},
            ("x", "y"),
            "B",
        ),
    ],
)
def test_smaller_ones(
    tmp_path: Path, name: str, row: dict[str, Any], options: tuple[str, ...], answer: str
) -> None:
    (sample,) = read(write(tmp_path, "rows.json", [row], ("v.mp4",)), name)
    assert (sample.options, sample.answer) == (options, answer)
    assert sample.video == str(tmp_path / "v.mp4")
    with pytest.raises(MissingVideoError, match="row 1: column 'video"):
        read_samples(tmp_path / "rows.json", video_root=tmp_path / "elsewhere")
