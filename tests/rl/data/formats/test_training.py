"""Video-R1, EasyR1, V1-33K and LLaVA: rows in the shapes of their releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rl.data.formats import read_samples
from rl.errors import DataError, MissingVideoError
from tests.rl.data.formats.folder import read, write

VIDEO_R1: dict[str, Any] = {
    "problem_id": 7,
    "problem": "Where does it go?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. up", "B. down"],
    "process": "<think>It falls.</think>",
    "solution": "<answer>B</answer>",
    "path": "./set/a.mp4",
    "data_source": "set",
}


def test_video_r1(tmp_path: Path) -> None:
    rows = [
        VIDEO_R1,
        VIDEO_R1 | {"data_type": "image", "path": "i.png", "process": ""},
        VIDEO_R1
        | {"problem_type": "numerical", "options": [], "solution": "<answer> 3.5 </answer>"},
    ]
    file = write(tmp_path, "cot.json", rows, ("set/a.mp4", "i.png"))
    choice, image, number = read(file, "video_r1")
    assert (choice.id, choice.question) == ("7", "Where does it go?")
    assert (choice.options, choice.answer) == (("up", "down"), "B")
    assert choice.reasoning == ("It falls.",) and choice.imagine == ()
    assert choice.extra == {"data_source": "set", "problem_type": "multiple choice"}
    assert image.images == (str(tmp_path / "i.png"),) and image.video == image.images[0]
    assert image.reasoning == () and image.id == "7#2"  # its ids are not its rows' own
    assert (number.answer, number.options, number.id) == ("3.5", (), "7#3")
    with pytest.raises(DataError, match="row 1: column 'solution': answer 'E' is not among"):
        read_samples(write(tmp_path, "bad.json", [VIDEO_R1 | {"solution": "<answer>E</answer>"}]))


def test_easyr1_and_its_keys(tmp_path: Path) -> None:
    row = {"problem": "<image><image>How many?", "answer": "3", "images": ["1.png", "2.png"]}
    file = write(tmp_path, "e.json", [row], ("1.png", "2.png", "a.mp4"))
    (sample,) = read(file, "easyr1")
    assert (sample.question, sample.answer) == ("How many?", "3")
    assert sample.images == (str(tmp_path / "1.png"), str(tmp_path / "2.png"))
    other = {"prompt": "<video>Which?\n(A) up\n(B) down", "answer": "(B)", "videos": ["a.mp4"]}
    file = write(tmp_path, "o.json", [other])
    found = read_samples(file, format="easyr1", columns={"question": "prompt"})
    (sample,) = found.samples
    assert found.recognised == "easyr1: question is prompt, as the mapping says"
    assert (sample.question, sample.options, sample.answer) == ("Which?", ("up", "down"), "B")
    assert sample.video == str(tmp_path / "a.mp4") and sample.images == ()


def test_v1_33k(tmp_path: Path) -> None:
    row = {
        "full_video_path": "video_dataset/act/a.mp4",
        "mc_qa": [{"value": "What next?\nA. up\nB. down"}, {"value": "B"}],
        "oe_qa": [{"value": "What next?"}, {"value": "It falls."}],
        "caption": "A ball.",
        "events": [{"scene": 1, "description": "rolls"}],
    }
    file = write(tmp_path, "v1.json", [row], ("parts/act/a.mp4",))
    choice, open_ended = read(file, "v1_33k", video_root=tmp_path / "parts")
    assert choice.video == open_ended.video == str(tmp_path / "parts/act/a.mp4")
    assert (choice.id, choice.options, choice.answer) == ("v1:1", ("up", "down"), "B")
    assert (open_ended.id, open_ended.answer) == ("v1:1:2", "It falls.")
    assert choice.question == open_ended.question == "What next?"
    assert [s.extra["question_form"] for s in (choice, open_ended)] == ["mc", "oe"]
    # `limit` counts samples, not rows.
    assert len(read_samples(file, video_root=tmp_path / "parts", limit=1).samples) == 1


def test_llava(tmp_path: Path) -> None:
    talk = [
        {"from": "human", "value": "<video>\nWhat is it?"},
        {"from": "gpt", "value": "A ball."},
        {"from": "human", "value": "Where?\nA. left\nB. right\nAnswer with the letter."},
        {"from": "gpt", "value": "B. right."},
    ]
    rows = [
        {"id": "v", "video": "a.mp4", "conversations": talk},
        {"id": "v", "image": "i.png", "conversations": talk[:2], "bboxes": [[0, 1]]},
        {"id": "v", "image": "i.png", "conversations": talk[:2]},
    ]
    file = write(tmp_path, "llava.json", rows, ("a.mp4", "i.png"))
    one, two, image, again = read(file, "llava")
    assert (one.id, one.question, one.answer) == ("v:1", "What is it?", "A ball.")
    assert (two.id, two.answer, two.options) == ("v:2", "B", ("left", "right"))
    assert two.question == "Where?\nAnswer with the letter."
    assert image.images == (str(tmp_path / "i.png"),) and image.extra == {"bboxes": [[0, 1]]}
    assert (image.id, again.id) == ("v", "v#2")
    # Letters in a question whose answer is no such letter are no options.
    asked = "Who wins, A. Smith or B. Jones?"
    open_talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": "The second."}]
    row = {"id": "o", "video": "a.mp4", "conversations": open_talk}
    (sample,) = read(write(tmp_path, "open.json", [row]), "llava")
    assert (sample.question, sample.answer, sample.options) == (asked, "The second.", ())
    text = write(tmp_path, "text.json", [{"id": "t", "video": "", "conversations": talk[:2]}])
    with pytest.raises(MissingVideoError, match="row 1: the row has no video"):
        read_samples(text, format="llava")
